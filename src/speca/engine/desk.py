"""How the steps of one request are run in an engine: by asking for them, and waiting for the answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..executor import Executor, Pass, Ran
from ..model import rows as rowwise
from ..model.gate import Gate
from ..model.overrides import PACKED
from ..model.probe import Discovery, Forward, scaled
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


Question = Pass | Plain | Read | Call


class Asking(Protocol):
    """Where to ask: it gives the answer, and the seconds of the transformer that are this request's share."""

    def ask(self, question: Any) -> tuple[Any, float]: ...


class Desk(Executor):
    """An executor that hands everything on. Its clock leaves out the time spent on others."""

    packs = True

    def __init__(self, hub: Asking, scheduler: Scheduler) -> None:
        self._hub, self._scheduler, self._away = hub, scheduler, 0.0

    def run(self, asked: Pass) -> Ran:
        """One forward, together with those of other requests if there are any that fit."""
        ran: Ran = self._ask(asked)
        return ran

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

    def discover(
        self, gate: Gate, forward: Forward, arguments: dict[str, Any], rows: int
    ) -> tuple[Any, Discovery, tuple[Tensor, ...]]:
        """The first call of its kind. One row is tested beside another one, as it is going to be run: only with two can
        be seen where features carry their rows, and that rows do not touch each other."""
        if rows == 1 and type(gate.model).__name__ not in PACKED:
            try:
                two = rowwise.join([arguments, scaled(arguments)], [1, 1])
                out, finding, features = self._weighed(gate, forward, two, 2)
            except Exception:  # of a model that cannot take two: then each call of this kind is run alone
                gate.forget()
            else:
                if finding.supported:
                    return rowwise.split(out, [1, 1])[0], finding, tuple(f[:1] for f in features)
        return self._weighed(gate, forward, arguments, rows)

    def _weighed(
        self, gate: Gate, forward: Forward, arguments: dict[str, Any], rows: int
    ) -> tuple[Any, Discovery, tuple[Tensor, ...]]:
        """`discover`, and what it takes while it runs, where that is wanted."""
        if self._scheduler.memory is None:
            return super().discover(gate, forward, arguments, rows)
        with Peak() as peak:
            found = super().discover(gate, forward, arguments, rows)
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
