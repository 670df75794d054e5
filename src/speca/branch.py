"""What a speculator works on: the call to be answered, the branch it belongs to, and what was spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .core.controller import FULL, Trajectory
from .core.corrector import Corrector, Transition
from .core.history import History
from .core.prior import Prior
from .executor import Pass
from .model import rows as rowwise
from .model.calls import Position
from .model.gate import Gate, Mode
from .model.probe import Discovery, Forward


@dataclass
class Spent:
    """What the calls so far have cost. FLOPs are PyTorch's count per row times rows, seconds are of the transformer."""

    flops: float = 0.0
    flops_full: float = 0.0
    seconds: float = 0.0
    host_reads: int = 0
    full_rates: list[float] = field(default_factory=list)  # seconds a row of calls in which every row was full

    def add_probe(self, finding: Discovery, rows: int, seconds: float) -> None:
        """The first call of a model: one full step, and the passes of the self-test."""
        full, checked, unchecked = (
            f or 0.0 for f in (finding.flops_full, finding.flops_checked, finding.flops_unchecked)
        )
        self.flops += (rows + 1) * full + rows * (2 * checked + unchecked)
        self.flops_full += rows * full
        self.seconds += seconds


@dataclass
class Branch:
    """One branch of a batch of trajectories, for instance "cond": their records and their features."""

    rows: int
    trajectories: list[Trajectory]
    history: History | None = None
    corrector: Corrector | None = None
    shapes: tuple[torch.Size, ...] = ()  # of one row of each kept feature
    template: Any = None  # an output of one row, where outputs are kept in place of features
    trouble: str = ""  # why drafting was given up in mid-run
    uncorrected: str = ""  # why nothing is corrected
    uses: tuple[float, ...] = ()  # how much of its inputs each row really uses, where that was asked
    idle: bool = False  # the run is too short to draft any step: run plainly, keep nothing

    @classmethod
    def begin(cls, rows: int, per_sample: int) -> Branch:
        """A new batch of `rows` rows; with `per_sample` 2, row i and row i + B/2 are one image's cond and uncond."""
        samples = rows // per_sample
        return cls(rows, [Trajectory(i, tuple(range(i, rows, samples))) for i in range(samples)])

    @property
    def uneven(self) -> bool:
        """Whether rows use their inputs to different lengths, so that they may be ragged."""
        return len(set(self.uses)) > 1

    def untie(self) -> None:
        """Give every row a record of its own: what looked like cond and uncond of one image are different images."""
        tied = {row: t for t in self.trajectories for row in t.rows}
        self.trajectories = [
            dataclasses.replace(
                tied[row], sample=row, rows=(row,), anchors=list(tied[row].anchors),
                steps=list(tied[row].steps), decisions=list(tied[row].decisions), errors=list(tied[row].errors),
            )
            for row in range(self.rows)
        ]  # fmt: skip

    @property
    def last(self) -> int:
        """Index of the last step this branch took part in, -1 before the first."""
        steps = self.trajectories[0].steps
        return steps[-1] if steps else -1

    def restart(self) -> None:
        """Drop the features and begin again with the warm-up; the records stay."""
        self.forget()
        for trajectory in self.trajectories:
            trajectory.restart()

    def forget(self) -> None:
        """Drop all that was kept of full steps."""
        self.history, self.corrector = None, None

    def bytes(self) -> int:
        """Bytes kept for all rows together."""
        return sum(kept.bytes() for kept in (self.history, self.corrector) if kept is not None)

    def give_up(self, position: Position, why: str) -> None:
        """Run this branch plainly from this step on."""
        self.forget()
        self.idle, self.trouble = True, why
        for trajectory in self.trajectories:
            if trajectory.steps[-1] == position.index:
                trajectory.decisions[-1], trajectory.errors[-1] = FULL, None
            else:
                trajectory.note(FULL)

    def stand_at(self, position: Position) -> None:
        """Tell every record where this step stands."""
        for trajectory in self.trajectories:
            trajectory.step, trajectory.total = position.index, position.total

    @property
    def tied(self) -> bool:
        """Whether any image occupies several rows."""
        return any(len(t.rows) > 1 for t in self.trajectories)


@dataclass(frozen=True)
class Work:
    """One call of the model to be answered: whose, where, and how to run it on some of its rows."""

    branch: Branch
    position: Position
    gate: Gate
    finding: Discovery
    forward: Forward
    arguments: dict[str, Any]
    transitions: Sequence[Transition] = ()
    """What the sampler does at each step; empty where that is unknown, and then nothing is corrected."""
    prior: Prior | None = None
    """What is known of the outputs of this run beforehand."""

    def on(self, rows: Sequence[int], mode: Mode, forecast: Sequence[Tensor] = ()) -> Pass:
        """The forward of `rows` of the model's own inputs."""
        part = rowwise.select(self.arguments, rows, self.branch.rows)
        uses = tuple(self.branch.uses[row] for row in rows) if self.branch.uses else ()
        return Pass(self.gate, self.finding, self.forward, part, len(rows), mode, self.position, tuple(forecast), uses)

    @property
    def ragged(self) -> bool:
        """Whether rows alone have fewer tokens than in their batch."""
        return self.finding.learnt is not None and self.finding.learnt.ragged
