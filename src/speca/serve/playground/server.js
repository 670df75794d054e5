// The server's API, without anything of the page.

const KEY = "speca-api-key"; // in the storage of this tab alone
const NUMBERS = ["seed", "num_inference_steps", "guidance_scale", "speedup"]; // fields that are no text in JSON
const LOST = "The connection ended before the picture was finished.";

/** Keep the API key that is sent from now on. */
export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** An error whose message is a sentence for the user. */
export class Refusal extends Error {
  constructor(message, { status = 0, wait = null, param = null } = {}) {
    super(message);
    Object.assign(this, { status, wait, param });
  }
}

/** Ask the server; return its response, or throw a `Refusal` with the server's own sentence. */
export async function call(path, { headers = {}, ...options } = {}) {
  const key = sessionStorage.getItem(KEY);
  const sent = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
  let response;
  try {
    response = await fetch(path, { ...options, headers: sent });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refusal("The server cannot be reached.");
  }
  if (response.ok) return response;
  const told = (await response.json().catch(() => null))?.error;
  const wait = response.headers.get("retry-after");
  throw new Refusal(told?.message ?? `The server answered with the status ${response.status}.`, {
    status: response.status, param: told?.param, wait: wait === null ? null : Number(wait),
  });
}

/** Yield the data of each server-sent event of a response; they end with an empty line. */
async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Refusal(LOST);
    });
    if (done) return;
    text = (text + value).replaceAll("\r\n", "\n");
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const data = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n").trim();
      const type = lines.find((line) => line.startsWith("event:"))?.slice(6).trim();
      if (data && data !== "[DONE]") yield { type, ...JSON.parse(data) };
    }
  }
}

/**
 * Draw a picture; return its file and what it has cost.
 * `job` has the `signal` that cancels it, `onProgress(share, text)` and `onPartial(url)`, and is given a `cancelPath`.
 */
export async function drawPicture(settings, job) {
  const request = Object.fromEntries(Object.entries(settings).map(([n, v]) => [n, NUMBERS.includes(n) ? Number(v) : v]));
  const wanted = { output_format: "png", stream: true, stream_progress: true, partial_images: 3 };
  const response = await call("v1/images/generations", {
    method: "POST", headers: { "Content-Type": "application/json" }, signal: job.signal,
    body: JSON.stringify({ ...request, ...wanted }),
  });
  const id = response.headers.get("x-request-id");
  job.cancelPath = id && `v1/requests/${encodeURIComponent(id)}`;
  for await (const event of serverEvents(response)) {
    const format = `image/${event.output_format ?? "png"}`;
    if (event.type === "speca.progress") job.onProgress(event.step / event.total, `Step ${event.step} of ${event.total}`);
    else if (event.error) throw new Refusal(event.error.message, { param: event.error.param });
    else if (event.type === "image_generation.partial_image") job.onPartial(`data:${format};base64,${event.b64_json}`);
    else if (event.type === "image_generation.completed") {
      const bytes = Uint8Array.from(atob(event.b64_json), (c) => c.charCodeAt(0));
      return { ...event.speca, blob: new Blob([bytes], { type: format }) };
    }
  }
  throw new Refusal(LOST);
}

/** Draw a clip, as a job of the server; see `drawPicture`. */
export async function drawClip(settings, job) {
  const form = new FormData();
  Object.entries(settings).forEach(([name, value]) => form.append(name, value));
  // Without the signal: the answer holds the name by which a job is cancelled.
  let told = await (await call("v1/videos", { method: "POST", body: form })).json();
  const path = `v1/videos/${encodeURIComponent(told.id)}`;
  job.cancelPath = path;
  while (told.status === "queued" || told.status === "in_progress") {
    job.onProgress(told.progress / 100, told.status === "queued" ? "Waiting" : `${Math.round(told.progress)} %`);
    await new Promise((resolve) => setTimeout(resolve, 500));
    job.signal.throwIfAborted();
    told = await (await call(path, { signal: job.signal })).json();
  }
  if (told.status !== "completed") throw new Refusal(told.error?.message ?? `The job ended as ${told.status}.`);
  // Not as the address of <video>, which could not send the API key.
  const blob = await (await call(`${path}/content`, { signal: job.signal })).blob();
  return { ...told.speca, blob };
}
