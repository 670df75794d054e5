"""A small server that speaks the API which the playground uses, to try the page without a model.

Words of the prompt choose what it does: "slow", "busy", "wrong", "broken" and "cut".
`python tests/serve/playground_server.py` serves it at port 8123.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image

PAGE = Path(__file__).parents[2] / "src" / "speca" / "serve" / "playground"
POLICY = "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:"
PATTERN = {"faithful": "FFAAFFFA", "balanced": "FAAAARAA", "fast": "FAAAAAAA", "full": "F"}
CLASSES = ["t-shirt", "trouser", "ankle boot"]
SPREAD = {"faithful": 2, "balanced": 5, "fast": 12}
PROGRESS = (40, 90, 100)


def about(task: str, takes: list[str], **more: Any) -> dict[str, Any]:
    defaults = {"num_inference_steps": 24, "guidance_scale": None, "preset": "balanced", **more.pop("defaults", {})}
    limits = {"num_inference_steps": [4, 250], "n": 10, "pixels": 1048576}
    base = ["prompt", "num_inference_steps", "seed", "preset", "speedup", "tolerance"]
    return {"task": task, "takes": base + takes, "classes": None, "size": None, "defaults": defaults,
            "presets": ["faithful", "balanced", "fast", "paper", "full"], "limits": limits} | more  # fmt: skip


MODELS = {
    "pictures": about("image", ["negative_prompt", "guidance_scale", "size"], size="64x64",
                      defaults={"guidance_scale": 4.0}),
    "garments": about("image", ["guidance_scale"], classes=CLASSES),
    "clips": about("video", ["guidance_scale"]),
    "unready": {"task": None, "error": "its weights are missing."},
}  # fmt: skip


def drawn(seed: int, preset: str, noise: float = 0.0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture of a few discs; presets other than "full" differ from it a little."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]] / max(size)
    found = np.ones((size[1], size[0], 3)) * random.uniform(180, 240, 3)
    for cx, cy, radius, *colour in random.uniform(0.1, 0.9, (6, 6)):
        found[(x - cx) ** 2 + (y - cy) ** 2 < (radius / 3) ** 2] = np.array(colour) * 255
    if preset != "full":
        found = found + np.random.default_rng(seed + 1).normal(0, SPREAD[preset], found.shape)
    found = (1 - noise) * found + noise * random.uniform(0, 255, found.shape)
    return Image.fromarray(found.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def mp4(seed: int, preset: str) -> bytes:
    """A clip of one second, or nothing that plays where there is no encoder."""
    try:
        import av
    except ImportError:
        return b"no clip"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for k in range(8):
            frame = np.roll(np.asarray(drawn(seed, preset)), 4 * k, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def told(seed: int, steps: int, preset: str) -> dict[str, Any]:
    """The `speca` object of an answer."""
    decisions = (PATTERN[preset] * steps)[:steps]
    counts = {"full": decisions.count("F"), "accepted": decisions.count("A"), "rejected": decisions.count("R")}
    notes = ["a note of the fake server."] if preset == "faithful" else []
    seconds = 0.05 * (steps - counts["accepted"])
    return {"seed": seed, "steps": steps, **counts, "decisions": decisions, "waited": 0.01, "seconds": seconds,
            "flops_speedup": round(steps / (steps - counts["accepted"]), 2), "notes": notes}  # fmt: skip


@dataclass
class Fake:
    """The server's memory.

    Attributes:
        key: the API key that is asked for, "" for none.
        asked: bodies of the requests for pictures and clips, in order.
        deleted: paths of all DELETE requests.
        left: how many streams ended because the client had left.
        wait: seconds of Retry-After for "busy" prompts; they are refused once.
        jobs: of clips.
    """

    key: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    left: int = 0
    wait: int = 2
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def refusal(self, prompt: str) -> JSONResponse | None:
        """What a prompt is refused with, None if it is not."""
        if "busy" in prompt and sum("busy" in one["prompt"] for one in self.asked) == 1:
            return error(429, "too many requests are waiting.", code="busy", headers={"retry-after": str(self.wait)})
        if "wrong" in prompt:
            return error(400, "size='1x1' is too small; at least 8x8.", param="size")
        return None


def error(status: int, message: str, *, param: str | None = None, code: str = "invalid_value",
          headers: dict[str, str] | None = None) -> JSONResponse:  # fmt: skip
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": body}, status, headers)


def event(kind: str, **data: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def create_app(fake: Fake) -> FastAPI:
    """The server with its page."""
    app = FastAPI()
    app.mount("/playground", StaticFiles(directory=PAGE))

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if (
            fake.key
            and request.url.path.startswith("/v1")
            and request.headers.get("authorization") != f"Bearer {fake.key}"
        ):
            return error(401, "the API key is missing or unknown.", code="invalid_api_key")
        response: Response = await call_next(request)
        response.headers["content-security-policy"] = POLICY
        return response

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        data = [{"id": n, "object": "model", "created": 0, "owned_by": "speca", "speca": m} for n, m in MODELS.items()]
        return {"object": "list", "data": data}

    @app.post("/v1/images/generations")
    async def pictures(request: Request) -> Response:
        asked = await request.json()
        fake.asked.append(asked)
        refused = fake.refusal(asked["prompt"])
        if refused is not None:
            return refused
        headers = {"x-request-id": f"req_{len(fake.asked)}"}
        return StreamingResponse(stream(fake, asked), media_type="text/event-stream", headers=headers)

    @app.delete("/v1/requests/{name}")
    def cancel(name: str) -> dict[str, Any]:
        fake.deleted.append(f"requests/{name}")
        return {"id": name, "cancelled": True}

    _add_videos(app, fake)
    return app


def _add_videos(app: FastAPI, fake: Fake) -> None:
    @app.post("/v1/videos")
    async def clips(request: Request) -> Any:
        asked = dict(await request.form())
        fake.asked.append(asked)
        name = f"video_{len(fake.asked)}"
        fake.jobs[name] = asked | {"polls": 0}
        return {"id": name, "object": "video", "status": "queued", "progress": 0, "error": None, "speca": None}

    @app.get("/v1/videos/{name}")
    def job(name: str) -> Any:
        asked = fake.jobs[name]
        polls = asked["polls"] = asked["polls"] + 1
        found = {"id": name, "object": "video", "error": None, "speca": None, "model": asked["model"]}
        if "broken" in asked["prompt"]:
            return found | {"status": "failed", "progress": 10, "error": {"message": "the clip failed.", "code": "x"}}
        if polls <= len(PROGRESS) or "slow" in asked["prompt"]:
            return found | {"status": "in_progress", "progress": PROGRESS[min(polls, len(PROGRESS)) - 1]}
        speca = told(int(asked.get("seed", 5)), 24, asked["preset"])
        return found | {"status": "completed", "progress": 100, "speca": speca}

    @app.get("/v1/videos/{name}/content")
    def content(name: str) -> Response:
        asked = fake.jobs[name]
        return Response(mp4(int(asked.get("seed", 5)), asked["preset"]), media_type="video/mp4")

    @app.delete("/v1/videos/{name}")
    def forget(name: str) -> dict[str, Any]:
        fake.deleted.append(f"videos/{name}")
        return {"id": name, "object": "video.deleted", "deleted": True}


async def stream(fake: Fake, asked: dict[str, Any]) -> AsyncIterator[str]:
    """The events of a drawing."""
    seed, steps = asked.get("seed", 1000 + len(fake.asked)), asked.get("num_inference_steps", 24)
    width, height = (int(side) for side in asked.get("size", "64x64").split("x"))
    small = width, height
    previews = {steps * (k + 1) // (asked["partial_images"] + 1): k for k in range(asked["partial_images"])}
    pause = 0.25 if "slow" in asked["prompt"] else 0.01
    try:
        for step in range(1, steps + 1):
            await asyncio.sleep(pause)
            yield event("speca.progress", index=0, step=step, total=steps)
            if "cut" in asked["prompt"] and step == 3:
                return
            if "broken" in asked["prompt"] and step == 3:
                yield f"event: error\ndata: {json.dumps({'error': {'message': 'the model failed.', 'code': None}})}\n\n"
                return
            if step in previews:
                image = encoded(drawn(seed, "full", 1 - step / steps, small))
                kind = "image_generation.partial_image"
                yield event(kind, b64_json=image, partial_image_index=previews[step], output_format="png")
    except asyncio.CancelledError:
        fake.left += 1
        raise
    image = encoded(drawn(seed, asked["preset"], size=small))
    yield event("image_generation.completed", b64_json=image, output_format="png", size=f"{width}x{height}",
                usage={}, speca=told(seed, steps, asked["preset"]))  # fmt: skip


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an app in a thread, at a free port; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
        if not thread.is_alive():
            raise RuntimeError("the fake server did not start")
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)


if __name__ == "__main__":
    uvicorn.run(create_app(Fake()), port=8123)
