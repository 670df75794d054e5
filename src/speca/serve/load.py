"""An open-loop load generator: requests come at a given rate, whether or not earlier ones have been answered.

So a server that is too slow is seen to be, where clients that wait for each answer would slow down with it. A sample of
the images is drawn again with every step computed, which says what the acceleration changed.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..reports.comparison import psnr, quantile

QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Load:
    """What to ask of a server.

    Attributes:
        url: its address.
        rate: images a second, on average; times between them are exponential.
        seconds: for how long new ones come.
        model: which model, None for the only one.
        prompts: they take turns.
        fields: further fields of each request.
        compared: how many of the images are drawn again in full, to be compared.
        key: API key, or empty.
        timeout: seconds after which a request is given up.
        seed: of the first image; the next ones follow.
    """

    url: str
    rate: float
    seconds: float
    model: str | None
    prompts: Sequence[str]
    fields: dict[str, Any]
    compared: int = 8
    key: str = ""
    timeout: float = 120.0
    seed: int = 0


@dataclass
class Outcome:
    """What a server gave.

    Attributes:
        seconds: from the first request to the last answer.
        total, waited: seconds of each image that was drawn: until its answer, and in the server's queue.
        statuses: answers by status; 0 for connections that failed or timed out.
        retry_after: seconds that refusals named.
        told: the `speca` object of each image.
        psnr: of images to their full run, in dB.
    """

    seconds: float = 0.0
    total: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    retry_after: list[float] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures: seconds at P50, P95 and P99, images a second, refusals, the share of full steps, PSNR."""
        full, steps = (sum(told.get(name, 0) for told in self.told) for name in ("full", "steps"))
        refused = self.statuses[429] + self.statuses[503]
        answers = sum(self.statuses.values())
        return {
            "images": len(self.total), "images_a_second": len(self.total) / self.seconds if self.seconds else 0.0,
            "seconds": _quantiles(self.total), "waited": _quantiles(self.waited),
            "refused": refused, "refused_share": refused / answers if answers else 0.0,
            "retry_after": _quantiles(self.retry_after),
            "failed": answers - refused - self.statuses[200], "statuses": {str(k): v for k, v in self.statuses.items()},
            "full_share": full / steps if steps else None,
            "psnr": {"median": quantile(self.psnr, 0.5), "p5": quantile(self.psnr, 0.05)}
            if self.psnr else None,
        }  # fmt: skip


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    return {f"p{round(100 * q)}": quantile(values, q) for q in QUANTILES} if values else None


async def run(load: Load, progress: Callable[[int, int], None] | None = None) -> Outcome:
    """Return what a server gives under a load.

    Args:
        load: what to ask.
        progress: called with the number of requests that were sent and of those that were answered.

    Raises:
        InputError: there is no server, or it is not ready.
    """
    chance, outcome, kept = random.Random(load.seed), Outcome(), dict[int, Tensor]()
    headers = {"authorization": f"Bearer {load.key}"} if load.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=load.url, headers=headers, timeout=load.timeout, limits=limits) as client:
        await _demand_ready(client, load.url)
        began, tasks, answered = time.perf_counter(), list[asyncio.Task[None]](), 0
        due = began

        def count(_: object) -> None:
            nonlocal answered
            answered += 1
            if progress is not None:
                progress(len(tasks), answered)

        while due < began + load.seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(_ask(client, load, len(tasks), outcome, kept))
            task.add_done_callback(count)
            tasks.append(task)
            due += chance.expovariate(load.rate)
        await asyncio.gather(*tasks)
        outcome.seconds = time.perf_counter() - began
        some = chance.sample(sorted(kept), min(load.compared, len(kept)))
        for number in some:
            full = await _drawn(client, {**_fields(load, number), "preset": "full", "speedup": None, "tolerance": None})
            if full is not None:
                outcome.psnr.append(float(psnr(kept[number], full)))
    return outcome


async def _demand_ready(client: httpx.AsyncClient, url: str) -> None:
    try:
        answer = await client.get("/ready")
    except httpx.HTTPError as error:
        raise InputError(f"there is no server at {url} ({error}); start one with: speca serve MODEL.") from error
    if answer.status_code != 200:
        raise InputError(f"the server at {url} is not ready: {answer.text}")


def _fields(load: Load, number: int) -> dict[str, Any]:
    fields = {"model": load.model, "prompt": load.prompts[number % len(load.prompts)], "seed": load.seed + number}
    return {**fields, **load.fields}


async def _ask(client: httpx.AsyncClient, load: Load, number: int, outcome: Outcome, kept: dict[int, Tensor]) -> None:
    began = time.perf_counter()
    try:
        answer = await client.post("/v1/images/generations", json=_fields(load, number))
    except httpx.HTTPError:
        outcome.statuses[0] += 1
        return
    outcome.statuses[answer.status_code] += 1
    if answer.status_code != 200:
        if "retry-after" in answer.headers:
            outcome.retry_after.append(float(answer.headers["retry-after"]))
        return
    outcome.total.append(time.perf_counter() - began)
    (image,) = answer.json()["data"]
    outcome.told.append(image["speca"])
    outcome.waited.append(image["speca"]["waited"])
    kept[number] = _picture(image["b64_json"])


async def _drawn(client: httpx.AsyncClient, fields: dict[str, Any]) -> Tensor | None:
    answer = await client.post("/v1/images/generations", json=fields)
    return _picture(answer.json()["data"][0]["b64_json"]) if answer.status_code == 200 else None


def _picture(text: str) -> Tensor:
    """A picture (1, height, width, 3) in [0, 1]."""
    image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).unsqueeze(0)
