"""The paper's rule and other rules: plan full steps and drafts, and accept or reject checked drafts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..config import VerifiedConfig
from ..core.controller import Plan, Record
from ..errors import ConfigError, nearest


class Rule(ABC):
    """Plans each step of each sample and accepts or rejects its drafts. Rules have no state; it is in the records."""

    def __init__(self, config: VerifiedConfig) -> None:
        self.config = config

    def threshold(self, record: Record) -> float:
        """Return `tau_t = tau_0 * beta ** ((T - t) / T)`, the paper's schedule: loose at the noisy start, tight at the
        end."""
        c = self.config
        return max(c.threshold * float(c.threshold_decay**record.progress), c.threshold_floor)

    def idle(self, steps: int) -> bool:
        """Return whether a run is too short for drafts."""
        return steps <= self.config.warmup + self.config.final

    @abstractmethod
    def plan(self, record: Record) -> Plan:
        """Return the mode of this sample at its current step."""

    def judged(self, errors: Sequence[float]) -> list[float]:
        """Return the errors that are compared with the threshold: each sample's own."""
        return list(errors)

    def accept(self, records: Sequence[Record], errors: Sequence[float]) -> list[bool]:
        """Return the verdict on each checked draft: accepted while `e <= tau`; never where e is NaN or tau is 0."""
        return [0 < (tau := self.threshold(r)) and e <= tau for r, e in zip(records, errors, strict=True)]

    def _must_be_full(self, record: Record) -> bool:
        c = self.config
        return record.fulls < c.warmup or record.step >= record.total - c.final or record.streak >= c.max_draft


class PaperRule(Rule):
    """The paper's rule, per sample: check each draft, recompute a rejected one at that very step."""

    def plan(self, record: Record) -> Plan:
        if self._must_be_full(record):
            return Plan.FULL
        if record.streak >= self.config.min_draft:
            return Plan.CHECKED
        return Plan.DRAFT if self.threshold(record) > 0 else Plan.FULL


class IntervalRule(Rule):
    """Full every `max_draft + 1` steps after the warm-up, drafts never checked (FORA, TaylorSeer)."""

    def plan(self, record: Record) -> Plan:
        return Plan.FULL if self._must_be_full(record) else Plan.DRAFT


class ScheduleRule(Rule):
    """Full at the steps of `schedule` and wherever too few full steps are kept, drafts never checked."""

    def plan(self, record: Record) -> Plan:
        due = record.step in self.config.schedule or record.fulls < self.config.anchors
        return Plan.FULL if due else Plan.DRAFT


class ReleasedRule(Rule):
    """The state machine of the authors' released code, which never rejects. For comparison only.

    The step after a full one is always a draft, even inside the warm-up; a draft whose error, averaged over the whole
    batch, exceeds the threshold is kept all the same and only makes the *next* step full.
    """

    def idle(self, steps: int) -> bool:
        return steps < 2

    def plan(self, record: Record) -> Plan:
        c = self.config
        if record.fulls == 0:
            return Plan.FULL
        if record.streak:
            late = record.streak >= c.min_draft and record.error is not None and record.error > self.threshold(record)
            if record.step < c.warmup or record.streak >= c.max_draft or late:
                return Plan.FULL
        return Plan.CHECKED if record.streak >= c.min_draft else Plan.DRAFT

    def judged(self, errors: Sequence[float]) -> list[float]:
        return [sum(errors) / len(errors)] * len(errors)

    def accept(self, records: Sequence[Record], errors: Sequence[float]) -> list[bool]:
        return [True] * len(errors)


RULES: dict[str, type[Rule]] = {
    "paper": PaperRule,
    "interval": IntervalRule,
    "schedule": ScheduleRule,
    "released": ReleasedRule,
}


def rule(config: VerifiedConfig) -> Rule:
    """Return the rule named by `config.rule`.

    Raises:
        ConfigError: no such rule; the nearest valid name is given.
    """
    if config.rule not in RULES:
        raise ConfigError(f"unknown rule {config.rule!r}; {nearest(config.rule, RULES)}")
    return RULES[config.rule](config)
