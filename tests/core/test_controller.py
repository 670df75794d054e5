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


def play_planned(rule: Controller, estimates: list[float], total: int = 50) -> str:
    """Decisions of one sample whose drafts before step i turn out wrong by `estimates[i]` times their number cubed."""
    t = Trajectory(0, (0,), total=total, linear=True)
    for step in range(total):
        t.step = step
        if rule.plan(t) is Plan.FULL:
            if t.streak:
                rule.observe(t, estimates[step] * (t.streak + 1) ** 3, t.streak)
            t.note(FULL)
        else:
            t.note(ACCEPTED)
    return "".join(t.decisions)


PLANNED = dict(controller="planned", max_draft=12)


def test_planned_period_is_the_one_that_meets_the_tolerance() -> None:
    """The error of a period n is 1e-4 n^3, so tolerance 0.0125 is met by n = 5, and the safety factor asks for 4.8."""
    rule = controller(config(**PLANNED, tolerance=0.0125))
    decisions = play_planned(rule, [1e-4] * 50)
    assert decisions == "FFA" + "FAAA" + "FAAAA" * 8 + "FAA"


def test_planned_period_follows_the_error_of_the_moment() -> None:
    rule = controller(config(**PLANNED, tolerance=0.0125))
    decisions = play_planned(rule, [1e-4] * 20 + [2e-3] * 15 + [1e-5] * 15)
    assert decisions[20:35].count("F") >= 6 and decisions[35:].count("F") <= 3


@pytest.mark.parametrize("speedup", [1.0, 1.7, 2.0, 3.0, 4.9, 5.0, 7.1, 13.0, 25.0, 50.0])
@pytest.mark.parametrize("final", [0, 1])
@pytest.mark.parametrize("tolerance", [0.0, 0.0125, 1.0])
def test_budget_is_never_exceeded(speedup: float, final: int, tolerance: float) -> None:
    rule = controller(config(**PLANNED, speedup=speedup, final=final, tolerance=tolerance))
    for estimates in ([1e-6] * 50, [1.0] * 50, [1e-4] * 25 + [1.0] * 25):
        spent = play_planned(rule, estimates).count("F")
        assert spent <= int(50 / speedup)
        if tolerance == 0.0 and speedup >= 2:
            assert spent >= int(50 / speedup) - 1, "a budget is there to be spent"


def test_budget_is_spread() -> None:
    rule = controller(config(**PLANNED, speedup=5.0, tolerance=0.0))
    decisions = play_planned(rule, [1e-4] * 50)
    assert decisions.count("F") == 10 and max(len(run) for run in decisions[4:].split("F")) <= 6


def test_planned_verifies_where_nothing_is_known_of_the_error() -> None:
    rule = controller(config(**PLANNED, tolerance=0.01, threshold=0.1, threshold_decay=1.0, min_draft=1))
    assert play(rule, [9.0] * 12) == "FFARARARARAR"


def test_planned_is_exact_without_threshold_or_tolerance() -> None:
    assert play_planned(controller(config(**PLANNED, threshold=0.0)), [0.0] * 50) == "F" * 50
    assert play_planned(controller(config(**PLANNED, tolerance=0.0)), [0.0] * 50) == "F" * 50


def test_schedule_is_followed_once_there_are_anchors() -> None:
    rule = controller(config(controller="schedule", schedule=(0, 5, 6, 11)))
    assert play(rule, [9.0] * 12) == "FFAAAFFAAAAF"
