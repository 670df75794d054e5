"""The executor of one request in an engine: it asks for each evaluation and waits for the answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ..denoiser.executor import Evaluation, Executor
from .activations import Peak
from .components import Call
from .scheduler import Scheduler

T = TypeVar("T")


@dataclass(frozen=True)
class Plain:
    """A call of the model to be run alone, without forecasts."""

    forward: Callable[[], Any]


@dataclass(frozen=True)
class Read:
    """Numbers (n,) to be read from the device."""

    numbers: Tensor


@dataclass(frozen=True)
class Compute:
    """Something that takes long and runs no model; what is of one `lane` runs one after the other."""

    function: Callable[[], Any]
    lane: str


Question = Evaluation | Plain | Read | Call | Compute


class Asking(Protocol):
    """Where evaluations are handed: returns the result, and this request's share of the seconds that it took."""

    def ask(self, question: Any) -> tuple[Any, float]: ...


class RequestExecutor(Executor):
    """Hands every evaluation to the loop of the engine. Its clock leaves out the time spent on other requests."""

    joins = True

    def __init__(self, loop: Asking, scheduler: Scheduler) -> None:
        self._loop, self._scheduler, self._away = loop, scheduler, 0.0

    def run(self, evaluation: Evaluation) -> Any:
        """Return what an evaluation gives, run together with those of other requests if there are any that fit."""
        return self._ask(evaluation)

    def plain(self, forward: Callable[[], Any]) -> Any:
        """Return what a call of the model gives, run alone."""
        return self._ask(Plain(forward))

    def component(self, call: Call) -> Any:
        """Return what another component gives, run together with those of other requests if there are any that fit."""
        return self._ask(call)

    def read(self, numbers: Tensor) -> list[float]:
        """Return numbers from the device; all requests are read at once in a tick."""
        found: list[float] = self._ask(Read(numbers))
        return found

    def first(self, run: Callable[[], Any], rows: int) -> Any:
        """Return what the first call of its kind gives; its memory is measured where memory is limited."""
        if self._scheduler.memory is None:
            return run()
        with Peak() as peak:
            found = run()
        self._scheduler.forward = max(self._scheduler.forward, peak.most // rows)
        return found

    def compute(self, function: Callable[[], T], lane: str) -> T:
        """Return what a function gives; it runs in another thread, and other requests go on meanwhile."""
        found: T = self._ask(Compute(function, lane))
        return found

    def now(self) -> float:
        """Return seconds without those spent waiting, but with this request's share of each batch it took part in."""
        return time.perf_counter() - self._away

    def _ask(self, question: Question) -> Any:
        began = time.perf_counter()
        answer, share = self._loop.ask(question)
        self._away += time.perf_counter() - began - share
        return answer
