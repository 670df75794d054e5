"""How long requests take, estimated from how long the last ones took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .future import Future, Result
from .request import STEPS, Request

KEEP = 0.98
"""How much what was measured before counts after each round of the loop, or after each request."""


@dataclass
class Pace:
    """What was measured of late, all 0 before anything was.

    Attributes:
        steps: of requests that do not say how many they want.
        share: of its steps a request computes in full.
    """

    steps: int
    share: float = 1.0
    _spent: float = 0.0  # seconds of rounds, those long ago counting less
    _rounds: float = 0.0  # with full steps in them
    _full: float = 0.0  # full steps of single requests
    _ended: float = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds that one full step of one request takes, all that goes with it included."""
        return self._spent / self._full if self._full else 0.0

    @property
    def round(self) -> float:
        """Return the seconds from one batch of full steps to the next."""
        return self._spent / self._rounds if self._rounds else 0.0

    def ticked(self, seconds: float, full: int) -> None:
        """Take in a round of the loop, and how many requests had a full step in it."""
        if full:
            self._spent, self._rounds, self._full = (
                KEEP * self._spent,
                KEEP * self._rounds + 1,
                KEEP * self._full + full,
            )
        self._spent += seconds

    def ended(self, result: Result) -> None:
        """Take in a request that has ended."""
        samples = result.report.samples if result.error is None and result.report is not None else ()
        steps = sum(len(sample.decisions) for sample in samples)
        if steps:
            computed = sum(sample.full + sample.rejected for sample in samples) / steps
            kept = KEEP * self._ended
            self.share, self._ended = (self.share * kept + computed) / (kept + 1), kept + 1

    def left(self, futures: Iterable[Future]) -> float:
        """Return the full steps that these requests are likely to need from now on."""
        return sum(
            max(1, (future.last.total or self._asked(future.request)) - future.last.step) * self.share
            for future in futures
        )

    def estimate(self, request: Request, ahead: Iterable[Future]) -> float:
        """Return the seconds until a request would be done that comes now, after those `ahead` of it."""
        own = self._asked(request) * self.share
        return max(self.seconds * (self.left(ahead) + own), self.round * own)

    def backlog(self, futures: Iterable[Future]) -> float:
        """Return the seconds that these requests still need, together."""
        return self.seconds * self.left(futures)

    def until_room(self, futures: Iterable[Future]) -> float:
        """Return the seconds until one of these requests is likely to have ended; 1 before anything was measured."""
        under_way = list(futures)
        found = self.seconds * self.left(under_way) / max(1, len(under_way))
        return max(0.05, found) if self.seconds else 1.0

    def _asked(self, request: Request) -> int:
        return int(request.arguments.get(STEPS) or self.steps)
