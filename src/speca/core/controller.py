"""Decisions: which samples are computed in full at a step and which are forecast. Plain numbers, no torch.

A `Record` is what is known of one sample in one guidance branch. Planners keep nothing themselves, so the decisions
of a sample cannot depend on the other samples of its batch.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..config import SpecaConfig


class Plan(enum.Enum):
    """What a sample does at a step."""

    FULL = "full"
    DRAFT = "draft"  # forecast, taken as it is
    CHECKED = "checked"  # forecast, and compared with one real block before it is taken (`verified/`)


FULL, ACCEPTED, REJECTED = "F", "A", "R"


@dataclass(slots=True)
class Record:
    """What happened to one sample in one branch so far. Players write it; planners and reports read it.

    Attributes:
        sample: index of the sample in its batch.
        rows: rows of the batch that it occupies; two where guidance stacks cond and uncond in one call.
        step, total: index of the current step, from 0, and number of steps of the run.
        fulls: full steps since the run or its last restart, rejected drafts included.
        streak: drafts since the last full step.
        period: steps from the last but one full step to the last one, 1 if there were no drafts between them.
        planned: steps until the next full step as planned from the last known error, 0 while no error is known.
        placement: the steps to compute in full where they were chosen beforehand, else None.
        density: exponent by which a budget is spread: 1 evenly, above 1 denser at the beginning.
        error: error of the last checked draft since the last full step, None if there is none.
        anchors: indices of the kept full steps, newest first.
        measured: whether the prior is taken to hold for this sample.
        surprises: at full steps after drafts, the mean square of the innovation over the one that the prior expected.
        steps: indices of the steps that the sample took part in; guidance may leave some out.
        decisions: one letter for each of them: F full, A draft accepted, R draft rejected and recomputed.
        errors: error of each checked draft, None at other steps.
    """

    sample: int
    rows: tuple[int, ...]
    step: int = 0
    total: int = 1
    fulls: int = 0
    streak: int = 0
    planned: float = 0.0
    placement: frozenset[int] | None = None
    density: float = 1.0
    period: int = 1
    error: float | None = None
    anchors: list[float] = field(default_factory=list)
    measured: bool = True
    surprises: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)

    @property
    def progress(self) -> float:
        """Share of the steps already done, in [0, 1): the paper's `(T - t) / T`."""
        return self.step / self.total

    def note(self, letter: str, error: float | None = None) -> None:
        """Write down what happened at the current step: FULL, ACCEPTED or REJECTED."""
        self.steps.append(self.step)
        self.decisions.append(letter)
        self.errors.append(error)
        if letter == ACCEPTED:
            self.streak += 1
            self.error = self.error if error is None else error
        else:
            self.fulls, self.period = self.fulls + 1, self.streak + 1
            self.streak, self.error = 0, None

    @property
    def spent(self) -> int:
        """Steps computed in full so far, rejected drafts included."""
        return len(self.decisions) - self.decisions.count(ACCEPTED)

    def restart(self) -> None:
        """Forget the kept full steps, so that the next step is full; what was noted stays."""
        self.fulls, self.streak, self.error, self.anchors = 0, 0, None, []


class Planner:
    """Chooses the full steps of each sample by a tolerance, a budget, a fixed schedule or a placement.

    *Tolerance.* Drafts of order k over a period of n steps have an error of order `n^(k+2)`, and each correction
    estimates it (Milne, see `core/correction.py`). The period that meets a tolerance is therefore
    `n (tolerance / error)^(1 / (k+2))`: the step-size control of ODE solvers, with their safety factor and limits of
    change. A full step that follows a full step tells the same of the draft that was not taken.

    *Budget.* Of `steps / speedup` full steps, no period is shorter than an even share of what is left.

    *Placement.* Where a prior has placed the full steps (`core/placement.py`), they are as placed.
    """

    SAFETY, SHRINK, GROW, LEAP = 0.9, 0.4, 2.0, 3.0  # a period is at most LEAP times as long as the one before it

    def __init__(self, config: SpecaConfig) -> None:
        self.config = config

    @property
    def exact(self) -> bool:
        """Whether the settings ask for every step in full."""
        c = self.config
        return not c.schedule and (c.threshold == 0 or (c.tolerance == 0 and not c.speedup))

    @property
    def measures(self) -> bool:
        """Whether estimated errors change the plan, so that they have to be read from the device."""
        return self.config.tolerance > 0 and not self.config.schedule

    def budget(self, steps: int) -> int:
        """Full steps that a sample may take: `steps / speedup` rounded down, at least one; without a budget all."""
        return max(1, math.floor(steps / self.config.speedup + 1e-9)) if self.config.speedup else steps

    def idle(self, steps: int) -> bool:
        """Whether a run of so few steps leaves nothing to forecast."""
        return self.budget(steps) >= steps and steps <= self.config.warmup

    def plan(self, record: Record) -> Plan:
        """Return what this sample does at its current step."""
        return Plan.FULL if self._is_full(record) else Plan.DRAFT

    def _is_full(self, r: Record) -> bool:
        c = self.config
        if self.exact or not r.anchors:
            return True
        if c.schedule:
            return r.step in c.schedule or (r.placement is None and r.fulls < c.warmup)
        if r.placement is not None:
            return r.step in r.placement
        left = self.budget(r.total) - r.spent
        if r.fulls < min(c.warmup, self.budget(r.total)):
            return True
        if left <= 0:
            return False
        even = self._even_period(r, left) if c.speedup else 1.0
        # The first steps of a flow are worth most, so no draft before its error is known. Elsewhere a short one tells.
        unknown = 2.0 if c.tolerance and r.density == 1 else 1.0
        period = max(even, min(r.planned or unknown, c.max_draft + 1.0))
        return r.streak + 1 >= round(min(period, self.LEAP * r.period))

    @staticmethod
    def _even_period(r: Record, spare: int) -> float:
        """The period to the next full step where `spare` more are spread evenly on the axis `step^(1 / density)`.

        Half a period is left after the last one, as drafts there are never corrected.
        """
        last, end = r.step - r.streak - 1, max(1, r.total - 1)
        warped = min(1.0, last / end) ** (1 / r.density)
        return float(end * (warped + (1 - warped) / (spare + 0.5)) ** r.density - last)

    def observe(self, record: Record, error: float, drafts: int) -> None:
        """Plan the next period, now that the `drafts` before a full step are known to have had this `error`.

        `error` is a root mean square per element in units of the straight path. After a full step that followed a full
        step it is that of the one draft that was not taken.
        """
        known = math.inf if math.isnan(error) else max(error, 1e-12)  # of a broken sample: as short as possible
        factor = (self.SAFETY * self.config.tolerance / known) ** (1 / (self.config.anchors + 1))
        record.planned = (drafts + 1) * min(self.GROW, max(self.SHRINK, factor))


def rows_of(records: Sequence[Record]) -> list[int]:
    """Return the rows of the batch that `records` occupy, in order."""
    return sorted(row for record in records for row in record.rows)


def worst(errors: Sequence[float]) -> float:
    """Return the largest error; NaN if any is NaN, so that a broken row is never accepted."""
    return max(errors, key=lambda e: math.inf if math.isnan(e) else e)
