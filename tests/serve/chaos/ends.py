"""Servers that are killed with jobs pending, and that are told to end while many wait."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from .plan import LOOKS, SEEDS
from .process import Keeper, Process
from .storm import Pictures, Storm, compare
from .wire import connected
from .wrong import DRAW, request

JOBS = 20
FULL: dict[str, Any] = dict(model="emoji-flux", prompt="moon", preset="full")
LONG = {**FULL, "num_inference_steps": 250, "n": 4}
"""A request that takes much longer than a server waits after SIGTERM, if there are some of it."""


def until(check: Callable[[], Any], seconds: float = 120) -> Any:
    """What `check` returns once it is true."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


# ------------------------------------------------------------------------------------------------ kill -9
def kills(keeper: Keeper, expected: Pictures, times: int) -> Storm:
    """Hand in jobs of both models, kill the server so many times with jobs pending, and look at all results."""
    found, began = Storm(), time.perf_counter()
    url = keeper.up().url
    asked = [(LOOKS[k % len(LOOKS)], k % (SEEDS - 1)) for k in range(JOBS)]
    with httpx.Client(base_url=url, timeout=60) as http:
        names = [http.post("/v1/jobs", json=look.fields(seed, 2)).json()["id"] for look, seed in asked]
    for number in range(times):
        until(lambda n=number: len(_done(url, names)) >= JOBS * n // (times + 1) + 1)
        if len(done := _done(url, names)) == JOBS:
            found.troubles.append(f"kill {number + 1} came when all jobs were done")
        keeper.kill()
        keeper.up()
        if lost := done - _done(url, names):
            found.troubles.append(f"{lost} were done and are not any more")
    until(lambda: len(_done(url, names)) == JOBS)
    with httpx.Client(base_url=url, timeout=60) as http:
        for name, (look, seed) in zip(names, asked, strict=True):
            told = http.get(f"/v1/jobs/{name}").json()
            for k, image in enumerate(told["data"]):
                content = base64.b64encode(http.get(image["url"]).content).decode()
                compare(look, seed + k, {"b64_json": content, "speca": image["speca"]}, expected, found)
    if found.pictures != 2 * JOBS:
        found.troubles.append(f"{found.pictures} pictures of {JOBS} jobs for two")
    found.seconds = time.perf_counter() - began
    return found


def _done(url: str, names: list[str]) -> set[str]:
    """Jobs that are completed. Fails if one is lost or has failed."""
    jobs = httpx.get(f"{url}/v1/jobs?limit=100", timeout=60).json()["data"]
    states = {job["id"]: job["status"] for job in jobs}
    assert all(states.get(name) in ("queued", "in_progress", "completed") for name in names), states
    return {name for name in names if states[name] == "completed"}


# ------------------------------------------------------------------------------------------------ SIGTERM
@dataclass
class Ended:
    """How a server ended.

    Attributes:
        code: exit code of its process.
        seconds: from the signal to the end.
        answers: what those got who were under way, by status; of streams that were cut off the code of the error.
        refused: status of a request that came after the signal.
        troubles: what must not be.
    """

    code: int = -1
    seconds: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    troubles: list[str] = field(default_factory=list)


async def terminated(process: Process, short: int = 12, long: int = 6) -> Ended:
    """Send SIGTERM to a server with so many requests under way, half of them streams, and wait for its end."""
    found = Ended()
    fields = [{**FULL, "num_inference_steps": 8}] * short + [LONG] * long
    tasks = [asyncio.create_task(_asks(process.port, one, k % 2 == 1, found)) for k, one in enumerate(fields)]
    while True:  # until all that have not been answered are under way
        counts = (await asyncio.to_thread(process.figures))["counts"]
        if counts >= 4 * long + short - sum(found.answers.values()):
            break
    process.popen.send_signal(signal.SIGTERM)
    began = time.perf_counter()
    while await _status(process.port, request("/ready", b"", method="GET")) != 503:
        await asyncio.sleep(0)
    found.refused = await _status(process.port, request(DRAW, json.dumps(FULL).encode()))
    await asyncio.wait_for(asyncio.gather(*tasks), 120)
    found.code = await asyncio.to_thread(process.popen.wait, 60)
    found.seconds = time.perf_counter() - began
    return found


async def _status(port: int, what: bytes) -> int:
    async with connected(port) as wire:
        await wire.send([what])
        await wire.body()
        return wire.status


async def _asks(port: int, fields: dict[str, Any], stream: bool, found: Ended) -> None:
    """Ask, and note an answer that is neither pictures nor an error in OpenAI's form."""
    async with connected(port) as wire:
        await wire.send([request(DRAW, json.dumps({**fields, "stream": stream}).encode())])
        try:
            last = [event async for event in wire.events()][-1] if stream else json.loads(await wire.body())
        except Exception as error:  # of any kind: an answer cut off, or none
            found.troubles.append(f"{fields} with stream={stream}: {error!r}")
            return
    error = last.get("error")
    found.answers[f"{wire.status} {error['code']}" if error else str(wire.status)] += 1
    if error is None and wire.status != 200:
        found.troubles.append(f"{wire.status}: {last}")
