"""The rules of verified drafts, on plain numbers."""

from __future__ import annotations

import pytest

import speca
from speca.core.controller import ACCEPTED, FULL, REJECTED, Plan, Record
from speca.verified.rules import Rule, rule


def config(**settings: object) -> speca.VerifiedConfig:
    given = {"order": 1, "warmup": 2, "final": 0, "max_draft": 3, **settings}
    return speca.VerifiedConfig(**given)  # type: ignore[arg-type]


def play(rule: Rule, errors: list[float], total: int = 12) -> str:
    """Decisions of one sample whose draft at step i has the error `errors[i]`."""
    r = Record(0, (0,), total=total)
    for step in range(total):
        r.step = step
        plan = rule.plan(r)
        if plan is Plan.FULL:
            r.note(FULL)
        elif plan is Plan.DRAFT:
            r.note(ACCEPTED)
        else:
            r.note(ACCEPTED if rule.accept([r], [errors[step]])[0] else REJECTED, errors[step])
    return "".join(r.decisions)


def test_the_papers_rule_rejects_at_that_very_step() -> None:
    errors = [0.0] * 12
    errors[3] = 0.5
    assert play(rule(config(threshold=0.1, threshold_decay=1.0)), errors) == "FFARAAAFAAAF"


def test_warmup_final_and_longest_draft_are_full() -> None:
    assert play(rule(config(warmup=3, final=2, max_draft=4, threshold=1.0)), [0.0] * 12) == "FFFAAAAFAAFF"


def test_min_draft_is_taken_unchecked() -> None:
    assert play(rule(config(min_draft=2, threshold=0.1)), [9.0] * 12) == "FFAARAARAARA"


def test_threshold_zero_accepts_nothing_and_plans_no_unchecked_draft() -> None:
    assert play(rule(config(threshold=0.0)), [0.0] * 12) == "FF" + "R" * 10
    assert play(rule(config(threshold=0.0, min_draft=3)), [0.0] * 12) == "F" * 12


def test_nan_is_rejected() -> None:
    assert play(rule(config(threshold=1e9)), [float("nan")] * 12) == "FF" + "R" * 10


def test_threshold_schedule_is_the_papers() -> None:
    papers = rule(config(threshold=0.3, threshold_decay=0.05))
    got = [papers.threshold(Record(0, (0,), step=s, total=50)) for s in (0, 25, 49)]
    assert got == pytest.approx([0.3, 0.3 * 0.05**0.5, 0.3 * 0.05**0.98])
    floored = rule(config(threshold=0.3, threshold_decay=0.05, threshold_floor=0.1))
    assert floored.threshold(Record(0, (0,), step=49, total=50)) == 0.1


def test_short_drafts_of_a_planned_run_are_checked_where_nothing_is_known_of_the_error() -> None:
    settings = {**speca.config.UNPLANNED.to_dict(), "threshold": 0.1}
    assert play(rule(speca.VerifiedConfig(**settings)), [9.0] * 12) == "FFARARARARAR"


def test_interval_is_fixed() -> None:
    assert play(rule(config(rule="interval")), [9.0] * 12) == "FFAAAFAAAFAA"


def test_schedule_is_followed_once_enough_full_steps_are_kept() -> None:
    assert play(rule(config(rule="schedule", schedule=(0, 5, 6, 11))), [9.0] * 12) == "FFAAAFFAAAAF"


def test_released_code_as_published() -> None:
    """DiT's bulk script: warm-up 3, at least 3 and at most 8 drafts; traces derived from the published code."""
    shipped = rule(config(rule="released", warmup=3, order=2, min_draft=3, max_draft=8, threshold=0.3))
    assert play(shipped, [9.0] * 50, total=50).startswith("FAFAAAAFAAAAF")
    assert play(shipped, [9.0] * 50, total=50).count("F") == 11
    assert play(shipped, [0.0] * 50, total=50).startswith("FAFAAAAAAAAF")
    assert play(shipped, [0.0] * 50, total=50).count("F") == 7


def test_released_verdict_is_the_batch_mean() -> None:
    released = rule(config(rule="released"))
    rows = [Record(i, (i,)) for i in range(2)]
    assert released.accept(rows, [0.0, 1.0]) == [True, True]
    assert released.judged([0.0, 1.0]) == [0.5, 0.5]
    rows[0].note(ACCEPTED, 0.5)
    assert rows[0].error == 0.5


def test_config_is_frozen_and_strict() -> None:
    with pytest.raises(AttributeError):
        config().order = 2  # type: ignore[misc]
    for wrong in (
        dict(order=5), dict(order=2), dict(threshold=-1.0), dict(threshold_decay=0.0), dict(max_draft=0),
        dict(forecaster="tailor"), dict(min_draft=4), dict(order=1.5), dict(final=True), dict(warmup=True),
        dict(rule="planned"), dict(schedule=[1]),
    ):  # fmt: skip
        with pytest.raises(speca.ConfigError):
            config(**wrong)
    assert speca.VerifiedConfig(**config().to_dict()) == config()
