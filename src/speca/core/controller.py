"""Controllers: who runs in full, who drafts, which drafts are accepted. Pure Python on numbers, no torch.

One `Trajectory` is what a controller knows of one sample in one branch. Controllers keep nothing themselves, so a
sample's decisions cannot depend on its batch-mates; only `ReleasedController` looks across the batch, as published.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..config import SpecaConfig
from ..errors import ConfigError, nearest


class Plan(enum.Enum):
    """What a sample does at a step, before any verdict."""

    FULL = "full"
    CHECKED = "checked"  # draft, verified by the real verify block
    UNCHECKED = "unchecked"  # draft, taken as it is; the verify block does not run


FULL, ACCEPTED, REJECTED = "F", "A", "R"


@dataclass(slots=True)
class Trajectory:
    """The record of one sample in one branch. The speculator fills it; controllers read it.

    Attributes:
        sample: index of the image this belongs to.
        rows: rows of the batch it occupies; two when the pipeline stacks cond and uncond in one call.
        step, total: current step index, counted from 0, and number of steps.
        fulls: full steps so far, rejected ones included.
        streak: drafts since the last full step.
        period: steps from the full step before the last one to the last one, 1 if there were no drafts between.
        planned: the period that was planned at the last full step, by a controller that plans ahead.
        placement: the steps to compute in full, where a prior has placed them.
        bend: how a budget is spread: 1 evenly, above 1 denser at the beginning.
        linear: whether its corrections are known, and with them how wrong its drafts were.
        error: error of the last verified draft since the last full step, None if there is none.
        anchors: positions of kept full steps, newest first.
        steps: indices of the steps it took part in; guidance may leave some out.
        decisions: one letter for each of them: F full, A accepted, R rejected and recomputed.
        errors: verification error of each step, None where nothing was verified.
    """

    sample: int
    rows: tuple[int, ...]
    step: int = 0
    total: int = 1
    fulls: int = 0
    streak: int = 0
    planned: float = 0.0  # nothing is known of its error yet
    linear: bool = False
    placement: frozenset[int] | None = None
    bend: float = 1.0
    period: int = 1
    error: float | None = None
    anchors: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)

    @property
    def progress(self) -> float:
        """Share of the steps already done, from 0 up to but excluding 1: the paper's (T - t) / T."""
        return self.step / self.total

    def note(self, letter: str, error: float | None = None) -> None:
        """Write down what happened at the current step."""
        self.steps.append(self.step)
        self.decisions.append(letter)
        self.errors.append(error)
        if letter == ACCEPTED:
            self.streak += 1
            self.error = self.error if error is None else error
        else:
            self.fulls, self.period = self.fulls + 1, self.streak + 1
            self.streak, self.error = 0, None

    def restart(self) -> None:
        """Begin again with the warm-up, as after steps that were left out; what was noted stays."""
        self.fulls, self.streak, self.error, self.anchors = 0, 0, None, []


class Controller(ABC):
    """Plans each step of each sample and judges its drafts."""

    plans_ahead = False  # whether `observe` wants to know how large corrections are
    heeds_prior = False  # whether a prior may replace the forecaster

    def __init__(self, config: SpecaConfig) -> None:
        self.config = config

    def threshold(self, trajectory: Trajectory) -> float:
        """`tau_t = tau_0 * beta ** ((T - t) / T)`, SpeCa's schedule: loose at the noisy start, tight at the end."""
        c = self.config
        return max(c.threshold * float(c.threshold_decay**trajectory.progress), c.threshold_floor)

    def budget(self, steps: int) -> int:
        """Full steps that a sample may take in all: `steps / speedup` rounded down, at least one; no budget: all."""
        return max(1, math.floor(steps / self.config.speedup + 1e-9)) if self.config.speedup else steps

    def idle(self, steps: int) -> bool:
        """Whether a run of so few steps leaves nothing to draft."""
        return steps <= self.config.warmup + self.config.final

    @abstractmethod
    def plan(self, trajectory: Trajectory) -> Plan:
        """What this sample does at its current step."""

    def observe(self, trajectory: Trajectory, estimate: float, drafts: int) -> None:  # noqa: B027, most need not know
        """Told at a full step that the `drafts` before it were wrong by `estimate`, in units of the straight path; or,
        where there were none, that one there would have been."""

    def judged(self, errors: Sequence[float]) -> list[float]:
        """The errors verdicts are passed on: each sample's own."""
        return list(errors)

    def accept(self, trajectories: Sequence[Trajectory], errors: Sequence[float]) -> list[bool]:
        """Verdict on each checked draft: accept while `e <= tau`. NaN is never accepted, nor anything at tau 0."""
        return [0 < (tau := self.threshold(t)) and e <= tau for t, e in zip(trajectories, errors, strict=True)]

    def _must_be_full(self, trajectory: Trajectory) -> bool:
        c = self.config
        return (
            trajectory.fulls < c.warmup
            or trajectory.step >= trajectory.total - c.final
            or trajectory.streak >= c.max_draft
        )


class SpecaController(Controller):
    """The paper's rule, per sample: verify each draft, recompute a rejected one at that very step."""

    def plan(self, trajectory: Trajectory) -> Plan:
        if self._must_be_full(trajectory):
            return Plan.FULL
        if self.config.verify and trajectory.streak >= self.config.min_draft:
            return Plan.CHECKED
        return Plan.UNCHECKED if self.threshold(trajectory) > 0 else Plan.FULL


class IntervalController(Controller):
    """Full every `max_draft + 1` steps after the warm-up, drafts never verified (FORA, TaylorSeer)."""

    def plan(self, trajectory: Trajectory) -> Plan:
        return Plan.FULL if self._must_be_full(trajectory) else Plan.UNCHECKED


class ScheduleController(Controller):
    """Full at the steps of `schedule` and wherever too few anchors are kept, drafts never verified."""

    heeds_prior = True

    def plan(self, trajectory: Trajectory) -> Plan:
        c = self.config
        due = trajectory.step in c.schedule or trajectory.fulls < c.anchors
        return Plan.FULL if due else Plan.UNCHECKED


class PlannedController(Controller):
    """Drafts as long as their error, or the budget, allows, for each sample on its own.

    Drafts of order p over a period of n steps leave an error of order `n^(p+2)`, and each correction estimates it
    (Milne, see `core/corrector.py`). So the period that meets a tolerance is `n * (tolerance / estimate)^(1 / (p+2))`:
    the step-size control of ODE solvers, with their safety factor and limits of change. A full step after a full step
    tells the same of the draft that was not taken. Of a budget of
    `steps / speedup` full steps, no period is shorter than its share of what is left; on a flow shares grow on the way,
    as its early steps are worth more (measured, docs/LOG.md).

    With a prior, the full steps are where it has placed them, see `core/placement.py`.

    Planned drafts are not verified. Where a sampler is not linear nothing is estimated: short drafts are verified.
    """

    plans_ahead = heeds_prior = True
    SAFETY, SHRINK, GROW, LEAP = 0.9, 0.4, 2.0, 3.0  # a period is at most LEAP times as long as the one before it
    UNSURE = 4  # longest draft where nothing is known of its error

    def __init__(self, config: SpecaConfig) -> None:
        super().__init__(config)
        self.verifying = SpecaController(replace(config, max_draft=min(config.max_draft, self.UNSURE)))

    def idle(self, steps: int) -> bool:
        return self.budget(steps) >= steps and super().idle(steps)

    def plan(self, trajectory: Trajectory) -> Plan:
        c, t = self.config, trajectory
        left = self.budget(t.total) - t.fulls
        exact = self.threshold(t) == 0 or (c.tolerance == 0 and not c.speedup)
        if t.placement is not None and t.fulls >= min(1, t.step) and not exact:
            return Plan.FULL if t.step in t.placement else Plan.UNCHECKED
        if exact or t.fulls < min(c.warmup, self.budget(t.total)):
            return Plan.FULL
        if left <= 0:
            return Plan.UNCHECKED
        if not (t.linear or c.speedup):
            return self.verifying.plan(t)
        to_come, spare = t.total - t.step, left - c.final
        if to_come <= min(left, c.final):
            return Plan.FULL
        if spare <= 0:
            return Plan.UNCHECKED
        even = self._share(t, spare) if c.speedup else 1.0
        # A flow's first steps are worth most: no draft before its error is known. Elsewhere a short one may tell.
        unknown = 2.0 if c.tolerance and t.bend == 1 else 1.0
        period = max(even, min(t.planned or unknown, c.max_draft + 1.0))
        return Plan.FULL if t.streak + 1 >= round(min(period, self.LEAP * t.period)) else Plan.UNCHECKED

    def _share(self, t: Trajectory, spare: int) -> float:
        """The period to the next full step where `spare` more are spread evenly on the axis `step^(1 / bend)`.

        Half a period is left after the last one, as what is drafted there is never corrected.
        """
        last, end = t.step - t.streak - 1, max(1, t.total - self.config.final - 1)
        warped = min(1.0, last / end) ** (1 / t.bend)
        return float(end * (warped + (1 - warped) / (spare + 0.5)) ** t.bend - last)

    def observe(self, trajectory: Trajectory, estimate: float, drafts: int) -> None:
        factor = (self.SAFETY * self.config.tolerance / max(estimate, 1e-12)) ** (1 / (self.config.anchors + 1))
        trajectory.planned = (drafts + 1) * min(self.GROW, max(self.SHRINK, factor))

    def accept(self, trajectories: Sequence[Trajectory], errors: Sequence[float]) -> list[bool]:
        return self.verifying.accept(trajectories, errors)


class ReleasedController(Controller):
    """The state machine of the authors' released code, which never rejects. For comparison only.

    The step after a full one is always a draft, even inside the warm-up; a draft whose error, averaged over the whole
    batch, exceeds the threshold is kept all the same and only makes the *next* step full.
    """

    def idle(self, steps: int) -> bool:
        return steps < 2

    def plan(self, trajectory: Trajectory) -> Plan:
        c, t = self.config, trajectory
        after_full = t.streak == 0
        if t.fulls == 0:
            return Plan.FULL
        if not after_full:
            late = t.streak >= c.min_draft and t.error is not None and t.error > self.threshold(t)
            if t.step < c.warmup or t.streak >= c.max_draft or late:
                return Plan.FULL
        return Plan.CHECKED if t.streak >= c.min_draft else Plan.UNCHECKED

    def judged(self, errors: Sequence[float]) -> list[float]:
        return [sum(errors) / len(errors)] * len(errors)

    def accept(self, trajectories: Sequence[Trajectory], errors: Sequence[float]) -> list[bool]:
        return [True] * len(errors)


CONTROLLERS: dict[str, type[Controller]] = {
    "speca": SpecaController,
    "interval": IntervalController,
    "released": ReleasedController,
    "schedule": ScheduleController,
    "planned": PlannedController,
}


def controller(config: SpecaConfig) -> Controller:
    """The controller named by `config.controller`.

    Raises:
        ConfigError: no such controller; the nearest valid name is given.
    """
    if config.controller not in CONTROLLERS:
        raise ConfigError(f"unknown controller {config.controller!r}; {nearest(config.controller, CONTROLLERS)}")
    return CONTROLLERS[config.controller](config)
