"""Images: generations and edits, at once or as a stream of events."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.sse import format_sse_event
from PIL import Image
from starlette.types import Receive, Scope, Send

from ...engine import Event, Future, Result
from ..backend import Backend, Task
from ..draw import Drawing, told
from ..faults import Fault, closing, of_error, wrong
from ..pictures import encode
from ..schema import EditRequest, ImageRequest, Pictures, parse
from ..server import Server
from .common import caller_of, decoded, form_of, json_of, server_of, while_connected

router = APIRouter(tags=["images"])
USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
         "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}  # fmt: skip
"""OpenAI's clients expect it; nothing here is counted in tokens."""


@router.post("/v1/images/generations", openapi_extra={
    "requestBody": {"required": True, "content": {"application/json": {
        "schema": ImageRequest.model_json_schema(),
        "example": {"model": "emoji-flux", "prompt": "a red apple", "n": 2, "seed": 7, "preset": "balanced"},
    }}},
})  # fmt: skip
async def generations(request: Request) -> Response:
    """Draw images."""
    server = server_of(request)
    server.demand_open()
    body = await request.body()
    asked = parse(ImageRequest, json_of(body))
    backend = _image_model(server, asked)
    backend.check(asked, "generate")
    return await _answer(
        request, Drawing(backend, "generate", asked, (), server.metrics, backend.most_wait(asked)), body
    )


@router.post("/v1/images/edits", openapi_extra={
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
        **EditRequest.model_json_schema(),
        "description": "Beside these fields: `image`, a picture, and for inpainting `mask`, transparent where to draw.",
    }}}},
})  # fmt: skip
async def edits(request: Request) -> Response:
    """Draw images that begin with a picture; with a mask only where it is transparent, or white if it has no alpha."""
    server = server_of(request)
    server.demand_open()
    fields, files = await form_of(request, ("image", "mask"))
    asked = parse(EditRequest, fields, text=True)
    backend = _image_model(server, asked)
    if len(files["image"]) != 1:
        raise wrong(f"{len(files['image'])} pictures came in `image`; one is needed.", "image")
    if len(files["mask"]) > 1:
        raise wrong("give one mask.", "mask")
    task: Task = "inpaint" if files["mask"] else "edit"
    backend.check(asked, task)
    most = server.config.limits.upload_pixels
    pictures = await decoded(files["image"], most, "image")
    pictures = [
        pictures[0].convert("RGB"),
        *(_mask(m, pictures[0]) for m in await decoded(files["mask"], most, "mask")),
    ]
    _demand_size(pictures[0], server)
    drawing = Drawing(backend, task, asked, pictures, server.metrics, backend.most_wait(asked))
    body = json.dumps(fields, sort_keys=True).encode() + b"".join(files["image"] + files["mask"])
    return await _answer(request, drawing, body)


@router.get("/v1/images/{name}/content")
async def content(request: Request, name: str, index: int = 0) -> Response:
    """Return the picture of an image that was given by URL, or picture `index` of an image job."""
    server = server_of(request)
    job = await asyncio.to_thread(server.jobs.get, name, caller_of(request))
    if job is None or job.kind not in ("image", "picture") or not 0 <= index < len(job.files):
        raise Fault(404, f"there is no image {name!r}, or it has expired.", code="not_found")
    return FileResponse(server.jobs.place(name) / job.files[index])


@router.delete("/v1/requests/{request_id}")
async def cancel(request: Request, request_id: str) -> Response:
    """Cancel a request for images by its `x-request-id`."""
    server_of(request).running.cancel(request_id, caller_of(request))
    return JSONResponse({"id": request_id, "object": "request.cancelled", "deleted": True})


# ------------------------------------------------------------------------------------------------ answers
async def _answer(request: Request, drawing: Drawing, body: bytes) -> Response:
    server, caller, asked = server_of(request), caller_of(request), drawing.request
    assert isinstance(asked, Pictures)
    if asked.partial_images and not asked.stream:
        raise wrong("partial_images needs stream=true.", "partial_images")
    if asked.stream:
        if asked.response_format == "url":
            raise wrong("a stream carries its images itself; leave response_format away.", "response_format")
        return await _streamed(request, drawing, caller)

    async def draw() -> dict[str, Any]:
        with server.running.counted(caller, asked.n):
            return await _body(request, drawing, await drawing.results())

    key = request.headers.get("idempotency-key")
    work = server.running.answered_once(caller, key, body, draw)
    return JSONResponse(await while_connected(request, work))


async def _body(request: Request, drawing: Drawing, results: Sequence[Result]) -> dict[str, Any]:
    asked, server = drawing.request, server_of(request)
    assert isinstance(asked, Pictures)
    pictures = [result.images[0] for result in results]
    files = [await asyncio.to_thread(encode, p, asked.output_format, asked.output_compression) for p in pictures]
    data: list[dict[str, Any]] = [{"speca": told(result)} for result in results]
    if asked.response_format == "url":
        names = {f"image-{k}.{asked.output_format}": file for k, file in enumerate(files)}
        caller, model = caller_of(request), drawing.backend.name
        job = await asyncio.to_thread(server.jobs.add, "picture", caller, model, {})
        await asyncio.to_thread(server.jobs.keep, job.id, names, [one["speca"] for one in data])
        address = request.url_for("content", name=job.id)
        for k, one in enumerate(data):
            one["url"] = str(address.include_query_params(index=k))
    else:
        for one, file in zip(data, files, strict=True):
            one["b64_json"] = base64.b64encode(file).decode()
    return {"created": int(time.time()), "data": data, **_form(asked, pictures[0]), "usage": USAGE}


class _Stream(StreamingResponse):
    """Server-sent events. What the stream holds is let go when the answer ends, also if it never began."""

    def __init__(self, content: AsyncIterator[bytes], held: ExitStack) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def _streamed(request: Request, drawing: Drawing, caller: str) -> Response:
    """A stream of events. What the engine refuses is answered with its status, before the stream begins."""
    running, key = server_of(request).running, (str(request.state.request_id), caller)
    asked = drawing.request
    assert isinstance(asked, Pictures)
    with ExitStack() as stack:
        stack.enter_context(running.counted(caller, asked.n))
        futures = drawing.post(asked.partial_images)
        for future in futures:
            stack.callback(future.cancel)  # harmless where it has ended
        held = stack.pop_all()

    async def stream() -> AsyncIterator[bytes]:
        running.cancels[key] = partial(_cancel, futures)
        try:
            async with aclosing(drawing.events(futures)) as events:
                async for chunk in _chunks(events, drawing):
                    yield chunk
        except Exception as error:
            fault = closing() if running.over else of_error(error)
            yield format_sse_event(event="error", data_str=json.dumps(fault.body))
        finally:
            running.cancels.pop(key, None)

    return _Stream(stream(), held)


def _cancel(futures: Sequence[Future]) -> None:
    for future in futures:
        future.cancel()


async def _chunks(events: AsyncIterator[tuple[int, Event | Result]], drawing: Drawing) -> AsyncIterator[bytes]:
    asked = drawing.request
    assert isinstance(asked, Pictures)
    kind = "image_edit" if isinstance(asked, EditRequest) else "image_generation"
    shown = [0] * asked.n  # previews sent of each image
    async for number, what in events:
        if isinstance(what, Result):
            yield await _picture(
                f"{kind}.completed", asked, what.images[0], index=number, usage=USAGE, speca=told(what)
            )
        elif what.kind == "step" and what.image is not None:
            sent = {"index": number, "partial_image_index": shown[number]}
            yield await _picture(f"{kind}.partial_image", asked, what.image, **sent)
            shown[number] += 1
        elif what.kind == "step" and asked.stream_progress:
            yield _event("speca.progress", index=number, step=what.step, total=what.total)


async def _picture(name: str, asked: Pictures, image: Any, **more: Any) -> bytes:
    picture = image[0] if isinstance(image, (list, tuple)) else image
    file = await asyncio.to_thread(encode, picture, asked.output_format, asked.output_compression)
    form = _form(asked, picture)
    return _event(name, b64_json=base64.b64encode(file).decode(), created_at=int(time.time()), **form, **more)


def _event(name: str, **values: Any) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps({"type": name, **values}))


def _form(asked: Pictures, picture: Image.Image) -> dict[str, Any]:
    width, height = picture.size
    return {
        "output_format": asked.output_format, "size": f"{width}x{height}", "quality": asked.quality or "auto",
        "background": "opaque",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ checks
def _image_model(server: Server, asked: Pictures) -> Backend:
    backend = server.backend(asked.model)
    if backend.task != "image":
        raise wrong(f"{backend.name} makes videos; ask for them at /v1/videos.", "model")
    return backend


def _mask(mask: Image.Image, picture: Image.Image) -> Image.Image:
    """The mask as pipelines take it, white where to draw: OpenAI's masks are transparent there."""
    if "A" in mask.getbands():
        mask = mask.getchannel("A").point([255 - value for value in range(256)])
    return mask.convert("L").resize(picture.size)


def _demand_size(picture: Image.Image, server: Server) -> None:
    pixels, most = picture.width * picture.height, server.config.limits.pixels
    if pixels > most:
        raise wrong(f"the picture has {pixels} pixels; pictures of at most {most} are edited.", "image")
