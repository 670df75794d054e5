"""What the routes share: the server, whose request it is, bodies and forms, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from PIL import Image
from starlette.datastructures import UploadFile

from ..faults import Fault, closing, wrong
from ..pictures import decode
from ..server import Server

Found = TypeVar("Found")

LEFT = Fault(499, "the client left.", code="client_left")


def server_of(request: Request) -> Server:
    """Return the server."""
    found: Server = request.app.state.server
    return found


def caller_of(request: Request) -> str:
    """Return whose request it is."""
    return str(request.state.caller)


def json_of(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body. Raises `Fault` 400 if it is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise wrong(f"the body is no valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise wrong("the body is no JSON object.", code="invalid_json")
    return found


async def form_of(request: Request, files: Sequence[str]) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    """Return the fields of a form, and the contents of its `files`, by name.

    A field `image[]` counts as `image`. Raises `Fault` 400 for a file by another name, or a form that cannot be read.
    """
    if not request.headers.get("content-type", "").startswith(("multipart/form-data", "application/x-www-form-urlen")):
        raise wrong("send a form (multipart/form-data).", code="invalid_content_type")
    fields: dict[str, str] = {}
    found: dict[str, list[bytes]] = {name: [] for name in files}
    async with request.form(max_files=16, max_fields=64) as form:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                if name not in found:
                    raise wrong(f"there is no file {name!r}; send {' or '.join(files)}.", name, "unknown_parameter")
                found[name].append(await value.read())
            else:
                fields[name] = value
    return fields, found


async def decoded(uploads: Sequence[bytes], most_pixels: int, param: str) -> list[Image.Image]:
    """Return uploaded pictures, decoded beside the event loop. Raises `Fault` 400."""
    return [await asyncio.to_thread(decode, data, most_pixels, param) for data in uploads]


async def while_connected(request: Request, work: Awaitable[Found]) -> Found:
    """Return what `work` gives; if the client leaves before, cancel it.

    Raises:
        Fault: 499 where the client has left or has cancelled the request, 503 where the server waits no longer.
    """
    server, key = server_of(request), (str(request.state.request_id), caller_of(request))
    task: asyncio.Task[Found] = asyncio.ensure_future(work)
    gone = asyncio.create_task(_left(request))
    server.running.cancels[key] = task.cancel
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise LEFT
        return task.result()
    except asyncio.CancelledError:
        if task.cancelled():
            cancelled = Fault(499, "the request was cancelled.", code="cancelled")
            raise (closing() if server.running.over else cancelled) from None
        raise
    finally:
        server.running.cancels.pop(key, None)
        gone.cancel()
        task.cancel()


async def _left(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
