// The playground: draws pictures and clips through the server's API, and shows what each of them has cost.

import { Refusal, call, drawClip, drawPicture, setKey } from "./server.js";

const $ = (id) => document.getElementById(id);
const settingsForm = $("settings");
const NAMES = ["model", "prompt", "negative_prompt", "size", "seconds", "preset", "speedup", "num_inference_steps",
  "guidance_scale", "seed"];
const PRESETS = {
  faithful: "You can hardly tell the result from the full run.",
  balanced: "Most of the saving, at a small difference.",
  fast: "For previews: differences in fine detail can be seen.",
};
const KEPT = 40; // drawings of the page; each holds its file in memory

let models = []; // as /v1/models lists them
let items = []; // what was drawn on this page, newest first
let shown = null; // the one of them on the stage
let run = null; // what is under way
let retry = null; // what "Try again" and a new key repeat
let countdown = 0;

// ---------------------------------------------------------------------------------------------- settings

/** What /v1/models says of the chosen model. */
const about = () => models.find((model) => model.id === $("model").value)?.speca;

/** The settings that the form has, without those left empty, in the order of the address. */
function readSettings() {
  const given = new FormData(settingsForm);
  const found = NAMES.map((name) => [name, String(given.get(name) ?? "").trim()]);
  return Object.fromEntries(found.filter(([, value]) => value));
}

/** Put settings into the form; what they leave out becomes the model's own. */
function fillSettings(given) {
  const known = models.some((model) => model.id === given.model && model.speca?.task);
  if (given.model && !known) complain(new Refusal(`The model ${given.model} of the link is not served here.`));
  if (known) $("model").value = given.model;
  adaptForm(given.preset);
  for (const field of settingsForm.querySelectorAll("input:enabled:not([type=radio]), textarea:enabled, #class:enabled")) {
    if (field.id !== "class") field.value = given[field.name] ?? "";
    else if ([...field.options].some((option) => option.value === given.prompt)) field.value = given.prompt;
  }
}

/** Show the fields that the chosen model takes, with its limits and its own values as hints. */
function adaptForm(preset = settingsForm.elements.preset?.value) {
  const model = about();
  if (!model) return;
  const takes = (name) => (model.takes ?? []).includes(name);
  const visible = {
    text: !model.classes, class: Boolean(model.classes), seconds: model.task === "video",
    negative_prompt: takes("negative_prompt"), guidance_scale: takes("guidance_scale"), size: takes("size"),
  };
  for (const field of settingsForm.querySelectorAll("[data-field]")) {
    field.hidden = !visible[field.dataset.field];
    field.querySelector("input, select, textarea").disabled = field.hidden; // disabled fields are not sent
  }
  const chosen = $("class").value;
  $("class").replaceChildren(...(model.classes ?? []).map((name) => new Option(name, name)));
  if (model.classes?.includes(chosen)) $("class").value = chosen;
  [$("steps").min, $("steps").max] = model.limits?.num_inference_steps ?? [1, ""];
  $("steps").placeholder = model.defaults?.num_inference_steps ?? "";
  $("guidance").placeholder = model.defaults?.guidance_scale ?? "as model";
  $("size").placeholder = model.size ?? "as model";
  showPresets(model, preset);
}

/** Make the dial of the presets that the model knows. */
function showPresets(model, wanted) {
  const names = Object.keys(PRESETS).filter((name) => model.presets?.includes(name) ?? true);
  const chosen = [wanted, model.defaults?.preset, names[0]].find((name) => names.includes(name));
  $("presets").replaceChildren(...names.map((name) => {
    const label = Object.assign(document.createElement("label"), { textContent: name });
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "preset", value: name });
    input.checked = name === chosen;
    input.setAttribute("aria-describedby", "preset-help");
    label.prepend(input);
    return label;
  }));
  explainPreset();
}

/** Say what the chosen preset is meant for. */
function explainPreset() {
  $("preset-help").textContent = PRESETS[settingsForm.elements.preset?.value] ?? "";
}

/** Put settings into the address, as a new entry of the browser's history unless they stand there already. */
function setAddress(settings, id, replace = false) {
  const address = `?${new URLSearchParams(settings)}`;
  history[replace || address === location.search ? "replaceState" : "pushState"]({ id }, "", address);
}

/** Ask the server for its models, again while none is ready. */
async function loadModels() {
  models = (await (await call("v1/models")).json()).data;
  $("model").replaceChildren(...models.map((model) => {
    const ready = Boolean(model.speca?.task);
    const option = new Option(ready ? model.id : `${model.id} (not ready)`, model.id);
    option.disabled = !ready;
    return option;
  }));
  const first = models.find((model) => model.speca?.task);
  if (!first) {
    const reason = models.find((model) => model.speca?.error)?.speca.error;
    say(reason ? `No model could be loaded: ${reason}` : "No model is ready yet.");
    setTimeout(() => attempt(loadModels), 3000);
    return;
  }
  say("");
  settingsForm.hidden = false;
  $("model").value = first.id;
  fillSettings(Object.fromEntries(new URLSearchParams(location.search)));
}

// ---------------------------------------------------------------------------------------------- drawing

/** Draw with these settings; with `original` it is the full run beside that drawing. */
async function draw(settings, original = null) {
  if (run) return;
  clearProblem();
  const before = shown;
  const place = figure(original ? "Full run" : titleOf(settings));
  const controller = new AbortController();
  run = { controller, signal: controller.signal, cancelPath: null, onProgress: showProgress,
    onPartial: (url) => place.querySelector(".media").replaceChildren(picture(url, "Preview")) };
  setRunning(true);
  const id = Date.now(); // of the entry in the browser's history; numbers from zero would repeat after a reload
  if (!original) {
    setAddress(settings, id);
    show(null);
  }
  $("drawings").append(place);
  if ($("stage").getBoundingClientRect().top > innerHeight / 2) $("stage").scrollIntoView(); // below the form on phones
  say(original ? "The full run is being drawn." : "Drawing.");
  try {
    const video = models.find((model) => model.id === settings.model)?.speca.task === "video";
    const drawn = await (video ? drawClip : drawPicture)(settings, run);
    drawn.url = URL.createObjectURL(drawn.blob);
    if (original) await addFull(original, drawn);
    else addItem({ id, settings, video, drawn, full: null, psnr: null });
  } catch (error) {
    place.remove();
    show(shown ?? before);
    if (!run.signal.aborted) complain(error, () => draw(settings, original));
    else {
      say("Cancelled.");
      if (run.cancelPath) call(run.cancelPath, { method: "DELETE" }).catch(() => {}); // it may have ended by itself
    }
  } finally {
    run = null;
    setRunning(false);
  }
}

/** Keep a finished drawing and show it; its address has the seed that the server chose. */
function addItem(item) {
  if (item.drawn.seed !== undefined) item.settings = { ...item.settings, seed: String(item.drawn.seed) };
  setAddress(item.settings, item.id, history.state?.id === item.id);
  items.unshift(item);
  for (const old of items.splice(KEPT)) [old.drawn, old.full].forEach((d) => d && URL.revokeObjectURL(d.url));
  show(item);
  const { cost, flops, time } = facts(item.drawn);
  say(["Finished", cost && `full steps: ${cost}`, flops, time].filter(Boolean).join("; ") + ".");
}

/** Keep the full run of a drawing, and say how far they are apart. */
async function addFull(item, full) {
  item.full = full;
  if (!item.video) item.psnr = psnr(await pixels(item.drawn.blob), await pixels(full.blob));
  if (shown === item || !shown) show(item);
  say(item.video ? "The full run is finished." : `The full run is finished. ${distance(item.psnr)}`);
}

/** Cancel what is under way. */
function cancel() {
  run?.controller.abort();
}

/** Red, green and blue of all pixels of a picture's file. */
async function pixels(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const canvas = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

/** PSNR of two pictures in dB, infinite if they are equal, null if their sizes differ. */
function psnr(one, other) {
  if (one.length !== other.length) return null;
  let sum = 0;
  for (let i = 0; i < one.length; i++) if (i % 4 !== 3) sum += (one[i] - other[i]) ** 2; // every fourth is opacity
  return 10 * Math.log10(255 ** 2 / (sum / (one.length * 0.75)));
}

// ---------------------------------------------------------------------------------------------- what is shown

/** Say something in the line that screen readers announce. */
function say(text) {
  $("status").textContent = text;
}

/** Show an error; `again` is what to repeat after waiting, or with a key. */
function complain(error, again = null) {
  if (!(error instanceof Refusal)) console.error(error); // a fault of this page
  $("problem").textContent = error.message;
  say("");
  retry = again;
  const field = error.param && settingsForm.querySelector(`[name="${CSS.escape(error.param)}"]:enabled`);
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-errormessage", "problem");
    field.focus({ preventScroll: true }); // on phones the message stays in view
  }
  if (error.status === 401) {
    $("access").hidden = false;
    $("key").focus();
  } else if (again && [0, 429, 503].includes(error.status) && !field) offerAgain(error.wait);
}

/** Offer to try again, once the seconds that the server asks for are over. */
function offerAgain(seconds) {
  const ready = Date.now() + (seconds ?? 0) * 1000;
  const tick = () => {
    const left = Math.ceil((ready - Date.now()) / 1000);
    $("retry").setAttribute("aria-disabled", String(left > 0));
    $("wait").textContent = left > 0 ? `The server asks to wait ${left} s.` : "";
    if (left <= 0) clearInterval(countdown);
  };
  $("again").hidden = false;
  countdown = setInterval(tick, 250);
  tick();
}

/** Take away the last error. */
function clearProblem() {
  clearInterval(countdown);
  $("problem").textContent = "";
  $("again").hidden = true;
  settingsForm.querySelectorAll("[aria-invalid]").forEach((field) => field.removeAttribute("aria-invalid"));
}

/** Show whether something is under way. Buttons are not disabled, as that would lose the focus. */
function setRunning(on) {
  if (!on && document.activeElement === $("cancel")) $("draw").focus();
  for (const id of ["draw", "compare"]) $(id).setAttribute("aria-disabled", String(on));
  $("running").hidden = !on;
  $("empty").hidden = on || Boolean(shown);
  $("progress").removeAttribute("value");
  $("step").textContent = on ? "Waiting for the first step" : "";
}

/** Show how far the drawing is, from 0 to 1. */
function showProgress(share, text) {
  $("progress").value = share;
  $("step").textContent = text;
}

/** An image element; small pictures are enlarged without blur, up to eight times. */
function picture(url, alt) {
  const image = Object.assign(new Image(), { alt, src: url });
  image.addEventListener("load", () => {
    image.classList.toggle("small", image.naturalWidth <= 128);
    image.style.maxWidth = `${image.naturalWidth * (image.naturalWidth <= 128 ? 8 : 1)}px`;
  });
  return image;
}

/** A video element; it starts by itself unless the user wants no motion. */
function clip(url, label) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const given = { src: url, controls: true, loop: true, muted: true, playsInline: true, autoplay: !still };
  const video = Object.assign(document.createElement("video"), given);
  video.setAttribute("aria-label", label);
  return video;
}

/** What a drawing was asked for, in a few words. */
function titleOf({ prompt = "", preset = "" }) {
  return `${prompt.length > 60 ? `${prompt.slice(0, 60)}…` : prompt}, ${preset}`;
}

/** Numbers in words, with runs of them as "3 to 7". */
function ranges(numbers) {
  const runs = [];
  for (const n of numbers) {
    if (runs.at(-1)?.[1] === n - 1) runs.at(-1)[1] = n;
    else runs.push([n, n]);
  }
  return runs.map(([a, b]) => (a === b ? a : `${a}${b === a + 1 ? "," : " to"} ${b}`)).join(", ");
}

/** What a drawing has cost, in words. */
function facts({ steps, full, rejected, flops_speedup: flops, seconds, waited }) {
  const redone = rejected ? `, ${rejected} of them for a rejected draft` : "";
  return {
    cost: steps === undefined ? "" : `${full + rejected} of ${steps}${redone}`,
    flops: !flops ? "" : flops > 1.005 ? `${flops.toFixed(2)} times fewer FLOPs` : "nothing is saved",
    time: seconds === undefined ? "" : `${seconds.toFixed(2)} s, after ${(waited ?? 0).toFixed(2)} s of waiting`,
  };
}

/** The strip of full steps and drafts. */
function showTimeline(place, decisions) {
  place.classList.toggle("dense", decisions.length > 80);
  place.replaceChildren(...[...decisions].map((letter, i) => {
    const cell = document.createElement("i");
    cell.className = letter;
    cell.title = `Step ${i + 1}`;
    return cell;
  }));
  const of = (letter) => ranges([...decisions].flatMap((found, i) => (found === letter ? [i + 1] : [])));
  const rejected = of("R") && ` Rejected drafts, computed in full: ${of("R")}.`;
  const label = `${decisions.length} steps. Full steps: ${of("F") || "none"}.${rejected} The others are drafts.`;
  place.setAttribute("aria-label", of("A") ? label : label.replace(" The others are drafts.", ""));
}

/** A figure; without `drawn` it is for something under way. */
function figure(title, drawn = null, video = false) {
  const found = $("drawing").content.cloneNode(true).firstElementChild;
  found.querySelector("h2").textContent = title;
  found.querySelector("figcaption").hidden = !drawn;
  if (!drawn) return found;
  found.querySelector(".media").replaceChildren((video ? clip : picture)(drawn.url, title));
  const decisions = drawn.decisions ?? "";
  found.querySelector(".timeline").hidden = found.querySelector(".legend").hidden = !decisions;
  found.querySelector(".legend .R").hidden = !decisions.includes("R");
  showTimeline(found.querySelector(".timeline"), decisions);
  const { cost, flops, time } = facts(drawn);
  for (const [name, value] of [["Full steps", cost], ["Work", flops], ["Time", time], ["Seed", drawn.seed]]) {
    if (value === "" || value === undefined) continue;
    for (const [tag, text] of [["dt", name], ["dd", value]]) {
      found.querySelector("dl").append(Object.assign(document.createElement(tag), { textContent: text }));
    }
  }
  found.querySelector(".notes").replaceChildren(...(drawn.notes ?? []).map((note) => {
    return Object.assign(document.createElement("li"), { textContent: note });
  }));
  return found;
}

/** The difference of two pictures, in a sentence. */
function distance(value) {
  if (value === null) return "The pictures differ in size.";
  return value === Infinity ? "Both pictures are equal." : `PSNR between both pictures: ${value.toFixed(1)} dB.`;
}

/** Show a drawing of the page, or none. */
function show(item) {
  shown = item;
  const figures = item ? [figure(titleOf(item.settings), item.drawn, item.video)] : [];
  if (item?.full) figures.push(figure("Full run", item.full, item.video));
  $("drawings").replaceChildren(...figures);
  $("tools").hidden = !item;
  $("empty").hidden = Boolean(item || run);
  $("compared").hidden = !item?.full;
  if (item?.full) {
    const ratio = item.full.seconds / item.drawn.seconds;
    const slower = Number.isFinite(ratio) ? ` The full run took ${ratio.toFixed(1)} times as long.` : "";
    $("compared").textContent = (item.video ? "" : distance(item.psnr)) + slower;
  }
  showItems();
  if (!item) return;
  $("compare").hidden = Boolean(item.full);
  $("keep").hidden = item.drawn.seed === undefined;
  const ending = item.drawn.blob.type.split("/")[1] ?? "png";
  Object.assign($("download"), { href: item.drawn.url, download: `${item.settings.model}-${item.drawn.seed}.${ending}` });
}

/** Show the list of what was drawn. */
function showItems() {
  $("history").hidden = !items.length;
  $("items").replaceChildren(...items.map((item) => {
    const button = Object.assign(document.createElement("button"), { type: "button", title: titleOf(item.settings) });
    const small = item.video ? Object.assign(document.createElement("video"), { src: item.drawn.url, muted: true, preload: "auto" })
      : picture(item.drawn.url, "");
    const label = Object.assign(document.createElement("span"), { textContent: titleOf(item.settings) });
    button.setAttribute("aria-label", `${titleOf(item.settings)}, seed ${item.drawn.seed ?? "unknown"}`);
    if (item === shown) button.setAttribute("aria-current", "true");
    button.append(small, label);
    button.addEventListener("click", () => {
      setAddress(item.settings, item.id);
      goTo(item);
    });
    const entry = document.createElement("li");
    entry.append(button);
    return entry;
  }));
}

/** Show a drawing, or none, with the settings of the address in the form. */
function goTo(item) {
  clearProblem();
  fillSettings(Object.fromEntries(new URLSearchParams(location.search)));
  show(item);
}

// ---------------------------------------------------------------------------------------------- events

/** Do something with the server outside of drawing; show its error. */
function attempt(action) {
  return action().catch((error) => complain(error, () => attempt(action)));
}

settingsForm.addEventListener("submit", (event) => {
  event.preventDefault();
  draw(readSettings());
});
settingsForm.addEventListener("change", (event) => {
  if (event.target.id === "model") adaptForm();
  else if (event.target.name === "preset") explainPreset();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) settingsForm.requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && cancel());
$("cancel").addEventListener("click", cancel);
$("compare").addEventListener("click", () => {
  if (!shown) return;
  const { speedup, ...settings } = shown.settings;
  draw({ ...settings, preset: "full" }, shown);
});
$("keep").addEventListener("click", () => {
  $("seed").value = shown.drawn.seed;
  say(`The next drawing begins with seed ${shown.drawn.seed}.`);
});
$("retry").addEventListener("click", () => {
  if ($("retry").getAttribute("aria-disabled") === "true") return;
  clearProblem();
  retry?.();
});
$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("access").hidden = true;
  clearProblem();
  retry?.();
});
addEventListener("popstate", (event) => goTo(items.find((item) => item.id === event.state?.id) ?? null));
say("Asking for the models.");
attempt(loadModels);
