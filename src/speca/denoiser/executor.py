"""How a model is run on some rows and numbers are read from its device: at once, or by an engine that puts the calls of
many requests together (`engine/`). What is decided never depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from .rows import Invocation

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a model in full, on some rows of a call.

    Attributes:
        invocation: the model's own forward and its arguments by name, of these rows only.
        rows: their number n.
        step: index of the step.
        total: steps of the run.
        model: identity of the model; evaluations of one model may be put together.
    """

    invocation: Invocation
    rows: int
    step: int
    total: int
    model: int

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        return self.invocation.arguments

    @property
    def kind(self) -> Hashable:
        """Equal for evaluations that may be one, as far as the way they are run decides."""
        return self.model, "full"

    def run(self) -> Any:
        """Return the model's own output."""
        return self.invocation()


class Executor:
    """Runs what it is asked for at once.

    Attributes:
        joins: whether it may put the rows of several requests together, so that it must know how they use their inputs.
    """

    joins = False

    def run(self, evaluation: Any) -> Any:
        """Return what an evaluation gives."""
        return evaluation.run()

    def first(self, run: Callable[[], Any], rows: int) -> Any:
        """Return what the first call of its kind gives, of `rows` rows; an engine measures its memory."""
        return run()

    def plain(self, forward: Callable[[], Any]) -> Any:
        """Return what a call of the model gives that is neither forecast nor recorded."""
        return forward()

    def read(self, numbers: Tensor) -> list[float]:
        """Return numbers (n,) from the device; the only thing that waits for it."""
        return [float(number) for number in numbers.tolist()]

    def compute(self, function: Callable[[], T], lane: str) -> T:
        """Return what a function gives that may take long and runs no model; an engine serves others meanwhile. What
        is of one `lane` runs one after the other."""
        return function()

    def now(self) -> float:
        """Return the seconds of the clock that calls are timed by."""
        return time.perf_counter()
