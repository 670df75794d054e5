"""Controllers as pure rules on numbers."""

from __future__ import annotations

import pytest

import speca
from speca.core.controller import ACCEPTED, FULL, REJECTED, Controller, Plan, Trajectory, controller


def config(**settings: object) -> speca.SpecaConfig:
    return speca.SpecaConfig(**{"order": 1, "warmup": 2, "final": 0, "max_draft": 3, **settings})  # type: ignore[arg-type]


def play(rule: Controller, errors: list[float], total: int = 12) -> str:
    """Decisions of one sample whose draft at step i has the error `errors[i]`."""
    t = Trajectory(0, (0,), total=total)
    for step in range(total):
        t.step = step
        plan = rule.plan(t)
        if plan is Plan.FULL:
            t.note(FULL)
        elif plan is Plan.UNCHECKED:
            t.note(ACCEPTED)
        else:
            t.note(ACCEPTED if rule.accept([t], [errors[step]])[0] else REJECTED, errors[step])
    return "".join(t.decisions)


def test_speca_rejects_at_that_very_step() -> None:
    errors = [0.0] * 12
    errors[3] = 0.5
    rule = controller(config(threshold=0.1, threshold_decay=1.0))
    assert play(rule, errors) == "FFARAAAFAAAF"


def test_warmup_final_and_longest_draft_are_full() -> None:
    rule = controller(config(warmup=3, final=2, max_draft=4, threshold=1.0))
    assert play(rule, [0.0] * 12) == "FFFAAAAFAAFF"


def test_min_draft_is_taken_unchecked() -> None:
    rule = controller(config(min_draft=2, threshold=0.1))
    assert play(rule, [9.0] * 12) == "FFAARAARAARA"


def test_threshold_zero_accepts_nothing_and_without_verification_plans_full() -> None:
    assert play(controller(config(threshold=0.0)), [0.0] * 12) == "FF" + "R" * 10
    assert play(controller(config(threshold=0.0, verify=False)), [0.0] * 12) == "F" * 12


def test_nan_is_rejected() -> None:
    assert play(controller(config(threshold=1e9)), [float("nan")] * 12) == "FF" + "R" * 10


def test_threshold_schedule_is_the_papers() -> None:
    rule = controller(config(threshold=0.3, threshold_decay=0.05))
    got = [rule.threshold(Trajectory(0, (0,), step=s, total=50)) for s in (0, 25, 49)]
    assert got == pytest.approx([0.3, 0.3 * 0.05**0.5, 0.3 * 0.05**0.98])
    floored = controller(config(threshold=0.3, threshold_decay=0.05, threshold_floor=0.1))
    assert floored.threshold(Trajectory(0, (0,), step=49, total=50)) == 0.1


def test_interval_is_fixed() -> None:
    assert play(controller(config(controller="interval")), [9.0] * 12) == "FFAAAFAAAFAA"


def test_released_machine_as_published() -> None:
    """DiT's bulk script: warm-up 3, at least 3 and at most 8 drafts; traces derived from the published code."""
    shipped = config(controller="released", warmup=3, order=2, min_draft=3, max_draft=8, threshold=0.3)
    assert play(controller(shipped), [9.0] * 50, total=50).startswith("FAFAAAAFAAAAF")
    assert play(controller(shipped), [9.0] * 50, total=50).count("F") == 11
    assert play(controller(shipped), [0.0] * 50, total=50).startswith("FAFAAAAAAAAF")
    assert play(controller(shipped), [0.0] * 50, total=50).count("F") == 7


def test_released_verdict_is_the_batch_mean() -> None:
    rule = controller(config(controller="released"))
    rows = [Trajectory(i, (i,)) for i in range(2)]
    assert rule.accept(rows, [0.0, 1.0]) == [True, True]
    assert rule.judged([0.0, 1.0]) == [0.5, 0.5]
    rows[0].note(ACCEPTED, 0.5)
    assert rows[0].error == 0.5


def test_config_is_frozen_and_strict() -> None:
    with pytest.raises(AttributeError):
        config().order = 2  # type: ignore[misc]
    for wrong in (
        dict(order=5), dict(order=2), dict(threshold=-1.0), dict(threshold_decay=0.0), dict(max_draft=0),
        dict(forecaster="tailor"), dict(min_draft=4), dict(order=1.5), dict(verify=1), dict(warmup=True),
    ):  # fmt: skip
        with pytest.raises(speca.ConfigError):
            config(**wrong)
    assert speca.SpecaConfig(**config().to_dict()) == config()
