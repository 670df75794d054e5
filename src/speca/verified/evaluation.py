"""One forward through a gated model: in full, as a checked draft, or as an unchecked one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..denoiser.executor import Evaluation
from . import layouts
from .gate import Features, Gate, Mode
from .probe import Discovery


@dataclass(frozen=True)
class Passed:
    """Result of a forward through a gate.

    Attributes:
        out: the model's own output.
        features: of the verify block, rows first (n, ...): after a full forward its state and then its outputs, after a
            checked draft its outputs alone, else nothing.
    """

    out: Any
    features: tuple[Tensor, ...]


@dataclass(frozen=True)
class GatedEvaluation(Evaluation):
    """One forward through a gated model.

    Attributes:
        gate: the gate of the model.
        finding: result of the self-test of this kind of call.
        mode: full, checked or unchecked.
        forecast: forecasts for the verify block in a draft, rows first (n, ...): its state, then its outputs.
        uses: amount of its inputs that each row uses, such as the length of its prompt; see `rows.weights`.
    """

    gate: Gate
    finding: Discovery
    mode: Mode
    forecast: tuple[Tensor, ...] = ()
    uses: tuple[float, ...] = ()

    @property
    def kind(self) -> Hashable:
        """Return a key; forwards with equal keys can be batched."""
        return self.model, id(self.finding.learnt), self.mode

    def run(self) -> Passed:
        """Run the forward alone in the gate, and clear the gate afterwards."""
        gate, learnt = self.gate, self.finding.learnt
        assert learnt is not None
        with gate.lock:
            gate.arm(learnt)
            gate.mode = self.mode
            try:
                if self.mode.drafts:
                    given = [layouts.as_given(f, kind) for f, kind in zip(self.forecast, learnt.layouts, strict=True)]
                    gate.forecast = Features(given[: len(learnt.state)], given[len(learnt.state) :])
                out, found = self.invocation(), gate.features
            finally:
                gate.forget()
        if found is None:
            return Passed(out, ())
        kinds = learnt.layouts if found.state else learnt.layouts[len(learnt.state) :]
        return Passed(out, rows_first(found, self.rows, kinds))


def rows_first(found: Features, rows: int, kinds: Sequence[layouts.Layout]) -> tuple[Tensor, ...]:
    """Return the state and the outputs of a verify block as (n, ...) each."""
    streams = zip([*found.state, *found.outputs], kinds, strict=True)
    return tuple(layouts.rows_first(stream, rows, kind) for stream, kind in streams)
