"""How a forward is run and a number is read from the device: at once, and here. An engine may put its own way in its
place (`engine/`), so that forwards of many requests become one; what is decided never depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .model import rows as rowwise
from .model.calls import Position
from .model.gate import Features, Gate, Mode
from .model.probe import Discovery, Forward, discover


@dataclass(frozen=True)
class Pass:
    """One forward through a gated model.

    Attributes:
        gate: of the model.
        finding: what is known of this kind of call.
        forward: the model's original forward.
        arguments: its arguments by name, of the rows of this pass only.
        rows: their number n.
        mode: full, checked or unchecked.
        position: the step.
        forecast: what the verify block is fed in a draft, rows first (n, ...): its state, then its outputs.
        uses: how much of its inputs each row really uses, such as the length of its prompt; see `rows.weights`.
    """

    gate: Gate
    finding: Discovery
    forward: Forward
    arguments: dict[str, Any]
    rows: int
    mode: Mode
    position: Position
    forecast: tuple[Tensor, ...] = ()
    uses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ran:
    """What a pass gave.

    Attributes:
        out: the model's own output.
        features: of the verify block, rows first (n, ...): after a full pass its state and then its outputs, after a
            checked draft its outputs alone, else nothing.
    """

    out: Any
    features: tuple[Tensor, ...]


class Executor:
    """Runs what it is asked for at once.

    Attributes:
        packs: whether it wants to know what a row uses of its inputs, also where there is only one.
    """

    packs = False

    def run(self, asked: Pass) -> Ran:
        """One forward through the gate; nothing of it stays in the gate."""
        gate, learnt = asked.gate, asked.finding.learnt
        assert learnt is not None
        gate.arm(learnt)
        gate.mode = asked.mode
        try:
            if asked.mode.drafts:
                given = [rowwise.as_given(f, kind) for f, kind in zip(asked.forecast, learnt.layouts, strict=True)]
                gate.forecast = Features(given[: len(learnt.state)], given[len(learnt.state) :])
            out, found = asked.forward(**asked.arguments), gate.features
        finally:
            gate.forget()
        if found is None:
            return Ran(out, ())
        layouts = learnt.layouts if found.state else learnt.layouts[len(learnt.state) :]
        return Ran(out, rows_first(found, asked.rows, layouts))

    def plain(self, forward: Callable[[], Any]) -> Any:
        """A call of the model that nothing is to be done about."""
        return forward()

    def read(self, numbers: Tensor) -> list[float]:
        """Numbers (n,) from the device: the one thing that waits for it."""
        return [float(number) for number in numbers.tolist()]

    def discover(
        self, gate: Gate, forward: Forward, arguments: dict[str, Any], rows: int
    ) -> tuple[Any, Discovery, tuple[Tensor, ...]]:
        """The first call of its kind, in full: its output, what was found, and the features to be recorded."""
        out, finding = discover(gate, forward, arguments, rows)
        features = gate.features
        gate.forget()
        if features is None or finding.learnt is None:
            return out, finding, ()
        return out, finding, rows_first(features, rows, finding.learnt.layouts)

    def now(self) -> float:
        """Seconds on the clock that calls are timed by."""
        return time.perf_counter()


def rows_first(found: Features, rows: int, layouts: Sequence[rowwise.Layout]) -> tuple[Tensor, ...]:
    """State and outputs as (n, ...) each."""
    streams = zip([*found.state, *found.outputs], layouts, strict=True)
    return tuple(rowwise.rows_first(stream, rows, kind) for stream, kind in streams)
