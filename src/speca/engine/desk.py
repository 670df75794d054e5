"""The executor of one request in an engine: it asks for each evaluation and waits for the answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..denoiser.executor import Evaluation, Executor
from .activations import Peak
from .components import Call
from .scheduler import Scheduler


@dataclass(frozen=True)
class Plain:
    """A call of the model that is to be run as it is, alone."""

    forward: Callable[[], Any]


@dataclass(frozen=True)
class Read:
    """Numbers (n,) to be read from the device."""

    numbers: Tensor


Question = Evaluation | Plain | Read | Call


class Asking(Protocol):
    """Where to ask: it gives the answer, and the seconds of the transformer that are this request's share."""

    def ask(self, question: Any) -> tuple[Any, float]: ...


class Desk(Executor):
    """An executor that hands everything on. Its clock leaves out the time spent on others."""

    joins = True

    def __init__(self, hub: Asking, scheduler: Scheduler) -> None:
        self._hub, self._scheduler, self._away = hub, scheduler, 0.0

    def run(self, evaluation: Evaluation) -> Any:
        """Return what an evaluation gives, run together with those of other requests if there are any that fit."""
        return self._ask(evaluation)

    def plain(self, forward: Callable[[], Any]) -> Any:
        """A call of the model alone, when it is its turn."""
        return self._ask(Plain(forward))

    def component(self, call: Call) -> Any:
        """What another component gives, together with those of other requests if there are any that fit."""
        return self._ask(call)

    def read(self, numbers: Tensor) -> list[float]:
        """Numbers from the device, in the one read of a tick."""
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

    def now(self) -> float:
        """Seconds, without those that passed while waiting, but with the share of the batches taken part in."""
        return time.perf_counter() - self._away

    def _ask(self, question: Question) -> Any:
        began = time.perf_counter()
        answer, share = self._hub.ask(question)
        self._away += time.perf_counter() - began - share
        return answer
