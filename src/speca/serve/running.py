"""What is under way: whose requests, so that they can be counted, cancelled and answered once."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .faults import Fault, busy, wrong

REMEMBERED, REMEMBERED_S = 2**28, 600.0
"""Answers kept for repeats with the same idempotency key: how many bytes at most, and for how many seconds."""

REPEATED_S = 10.0
"""Seconds for which a request with an idempotency key goes on after its client has left."""


@dataclass
class Running:
    """Requests under way.

    Attributes:
        per_key: most images and jobs of one caller.
        draining: whether the server ends, so that nothing new is taken.
        over: whether it does not wait any longer for what is under way.
        counts: images and jobs under way of each caller.
        cancels: what gives up each request for images, by request id and caller.
    """

    per_key: int
    draining: bool = False
    over: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    cancels: dict[tuple[str, str], Callable[[], object]] = field(default_factory=dict)
    _answers: OrderedDict[tuple[str, str], _Answer] = field(default_factory=OrderedDict)

    @contextmanager
    def counted(self, caller: str, count: int) -> Iterator[None]:
        """Count so many images of a caller as under way. Raises `Fault` 429 if that is more than one may have."""
        if self.counts[caller] + count > self.per_key:
            raise busy(2.0, f"{self.counts[caller]} images are under way for this key, and {self.per_key} may be.")
        self.counts[caller] += count
        try:
            yield
        finally:
            self.counts[caller] -= count
            if self.counts[caller] <= 0:
                del self.counts[caller]

    def cancel(self, request_id: str, caller: str) -> None:
        """Cancel a request. Raises `Fault` 404 if the caller has none of this id under way."""
        give_up = self.cancels.get((request_id, caller))
        if give_up is None:
            raise Fault(404, f"no request {request_id!r} is under way.", code="not_found")
        give_up()

    def give_up(self) -> None:
        """Cancel all requests for images, as the server waits no longer; their clients are told so."""
        self.over = True
        for cancel in list(self.cancels.values()):
            cancel()

    async def answered_once(
        self, caller: str, key: str | None, body: bytes, answer: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Return an answer; a repeat with the same idempotency key gets that of the first request.

        Raises:
            Fault: 400, if the key came with another request before; or what the request failed with.
        """
        if key is None:
            return await answer()
        now, digest = time.monotonic(), hashlib.blake2b(body, digest_size=16).digest()
        self._forget(now)
        kept = self._answers.get((caller, key))
        if kept is not None and kept.digest != digest:
            raise wrong(f"the idempotency key {key!r} was used for another request.", "Idempotency-Key")
        if kept is None or (kept.task.done() and (kept.task.cancelled() or kept.task.exception() is not None)):
            task = asyncio.ensure_future(answer())
            kept = self._answers[caller, key] = _Answer(digest, task, now + REMEMBERED_S)
        kept.waiters += 1
        try:
            found = await asyncio.shield(kept.task)
            kept.bytes = len(str(found))
            return found
        finally:
            kept.waiters -= 1
            # A client that lost its connection repeats its request within seconds; only then is the work wanted.
            asyncio.get_running_loop().call_later(REPEATED_S, kept.cancel_if_unwanted)

    def _forget(self, now: float) -> None:
        """Drop the oldest answers: those that were kept long enough, or are too many."""
        total = sum(answer.bytes for answer in self._answers.values())
        while self._answers:
            oldest = next(iter(self._answers.values()))
            if oldest.until >= now and total <= REMEMBERED:
                return
            total -= oldest.bytes
            self._answers.popitem(last=False)


@dataclass
class _Answer:
    digest: bytes
    task: asyncio.Future[Any]
    until: float
    waiters: int = 0
    bytes: int = 0

    def cancel_if_unwanted(self) -> None:
        """Cancel the work if nobody waits for it any more."""
        if not self.waiters:
            self.task.cancel()
