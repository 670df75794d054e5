"""Many clients at once, and what is to be said of the answers that they got."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from .plan import LOOKS, SEEDS, Client, Look
from .wire import Wire, connected
from .wrong import DRAW, WRONG, request

PATIENCE_S = 120.0
"""Nobody waits longer: who does waits for ever."""

Pictures = Mapping[tuple[int, int], tuple[str, np.ndarray[Any, Any]]]
"""Decisions and pixels by the number of a look and the seed."""


@dataclass
class Storm:
    """What came of some clients.

    Attributes:
        seconds: from the first client to the last answer.
        statuses: answers by kind of client and status; "left" for those who did not wait.
        waited: seconds until the answer, of those who got a picture.
        pictures: how many were compared.
        worst: largest difference of a pixel from the picture that was drawn alone, of 255.
        troubles: what must not be.
    """

    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    waited: list[float] = field(default_factory=list)
    pictures: int = 0
    worst: int = 0
    troubles: list[str] = field(default_factory=list)


async def storm(port: int, clients: Sequence[Client], expected: Pictures) -> Storm:
    """Let the clients come, and return when the last one has gone."""
    found, began = Storm(), time.perf_counter()

    async def one(client: Client) -> None:
        await asyncio.sleep(client.at - (time.perf_counter() - began))
        name = f"client {client.number} ({client.kind}, {_what(client)})"
        try:
            await asyncio.wait_for(_BY_KIND[client.kind](port, client, expected, found), PATIENCE_S)
        except asyncio.TimeoutError:
            found.troubles.append(f"{name} waited for {PATIENCE_S} s")
        except Exception as error:
            found.troubles.append(f"{name}: {error!r}")

    await asyncio.gather(*map(one, clients))
    found.seconds = time.perf_counter() - began
    return found


def _what(client: Client) -> str:
    return WRONG[client.wrong].name if client.kind == "wrong" else client.stage if client.kind == "leaving" else "draws"


async def alone(port: int, looks: Sequence[Look] = LOOKS) -> Pictures:
    """Draw each picture by itself."""
    found = {}
    for look in looks:
        for seed in range(SEEDS):
            async with connected(port) as wire:
                await wire.send([_asked(look, seed, 1, False)])
                (data,) = json.loads(await wire.body())["data"]
                found[LOOKS.index(look), seed] = data["speca"]["decisions"], pixels(data["b64_json"])
    return found


def pixels(text: str) -> np.ndarray[Any, Any]:
    """The pixels of a picture in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), int)


def _asked(look: Look, seed: int, n: int, stream: bool) -> bytes:
    more = dict(stream=True, stream_progress=True) if stream else {}
    return request(DRAW, json.dumps({**look.fields(seed, n), **more}).encode())


def _request(client: Client) -> bytes:
    return _asked(client.look, client.seed, client.n, client.stream)


# ------------------------------------------------------------------------------------------------ clients
async def _draws(port: int, client: Client, expected: Pictures, found: Storm) -> None:
    began = time.perf_counter()
    async with connected(port) as wire:
        whole = _request(client)
        await wire.send([whole[:-9], whole[-9:]], pause=0.5 if client.number % 7 == 0 else 0.0)  # some are slow
        if client.stream:
            events = [event async for event in wire.events()]
            done = [event for event in events if event.get("type") == "image_generation.completed"]
            data, told = sorted(done, key=lambda event: int(event["index"])), str(events[-1:])
        else:
            body = await wire.body()
            data, told = json.loads(body).get("data", []), body.decode()
    found.statuses[f"good {wire.status}"] += 1
    if wire.status != 200 or len(data) != client.n:
        found.troubles.append(f"client {client.number} wanted {client.n} and got {wire.status}: {told[:300]}")
        return
    found.waited.append(time.perf_counter() - began)
    for k, image in enumerate(data):
        compare(client.look, client.seed + k, image, expected, found)


def compare(look: Look, seed: int, image: Mapping[str, Any], expected: Pictures, found: Storm) -> None:
    """Note whether a picture is the one that is drawn alone: same decisions, pixels within one of 255."""
    decisions, picture = expected[LOOKS.index(look), seed]
    apart = int(np.abs(pixels(image["b64_json"]) - picture).max())
    found.pictures, found.worst = found.pictures + 1, max(found.worst, apart)
    if apart > 1 or image["speca"]["decisions"] != decisions or image["speca"]["seed"] != seed:
        found.troubles.append(f"{look} of seed {seed} is {apart} of 255 off, {image['speca']}, alone {decisions}")


async def _leaves(port: int, client: Client, expected: Pictures, found: Storm) -> None:
    whole = _request(client)
    found.statuses["leaving left"] += 1
    async with connected(port, client.abrupt) as wire:
        await wire.send([whole[: -len(whole) // 8] if client.stage == "body" else whole])
        if client.stage in ("body", "running"):
            await asyncio.sleep(client.patience)
        elif client.stage in ("stream", "end"):
            await _reads_some(wire, client)


async def _reads_some(wire: Wire, client: Client) -> None:
    seen = 0
    async with aclosing(wire.events()) as events:
        async for event in events:
            seen += 1
            last = event.get("type") == "speca.progress" and event["step"] == event["total"]
            if last if client.stage == "end" else seen >= client.events:
                return


async def _errs(port: int, client: Client, expected: Pictures, found: Storm) -> None:
    wrong = WRONG[client.wrong]
    async with connected(port) as wire:
        sending = asyncio.ensure_future(wire.send(wrong.pieces, wrong.pause))
        try:
            body = await wire.body()
            if not wrong.formed:
                await wire.reader.read()  # the server closes the connection
        except (asyncio.IncompleteReadError, ConnectionError):  # closed before what it sent was read
            body = b""  # or nothing was to be answered
            if wrong.formed:
                raise
        finally:
            sending.cancel()
    found.statuses[f"wrong {wire.status or 'closed'}"] += 1
    if trouble := trouble_of(wrong.name, wire.status, body, wrong.statuses, wrong.formed):
        found.troubles.append(trouble)


def trouble_of(name: str, status: int, body: bytes, statuses: Sequence[int], formed: bool) -> str:
    """What is not right with the answer to a wrong request; empty if nothing is."""
    shown = f"{name}: {status} {body[:300]!r}"
    if b"Traceback" in body or b'File "' in body or b".py" in body:
        return f"a traceback reached the client, {shown}"
    if not formed:
        return "" if status in (0, *statuses) else f"another status was due, {shown}"
    error = json.loads(body).get("error", {})
    if status not in statuses or set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return f"another answer was due, {shown}"
    return ""


_BY_KIND = {"good": _draws, "leaving": _leaves, "wrong": _errs}
