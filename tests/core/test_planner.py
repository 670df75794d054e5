"""The planner of full steps, on plain numbers."""

from __future__ import annotations

import pytest

import speca
from speca.core.controller import ACCEPTED, FULL, Plan, Planner, Record


def config(**settings: object) -> speca.SpecaConfig:
    return speca.SpecaConfig(**{"order": 1, "max_draft": 12, **settings})  # type: ignore[arg-type]


def play(
    planner: Planner, estimates: list[float], total: int = 50, placement: frozenset[int] | None = None,
    density: float = 1.0,
) -> str:  # fmt: skip
    """Decisions of one sample whose drafts before step i turn out wrong by `estimates[i]` times their number cubed."""
    r = Record(0, (0,), total=total, placement=placement, density=density)
    for step in range(total):
        r.step = step
        plan = planner.plan(r)
        assert plan is not Plan.CHECKED
        if plan is Plan.FULL:
            if r.streak:
                planner.observe(r, estimates[step] * (r.streak + 1) ** 3, r.streak)
            r.note(FULL)
            r.anchors = [float(step), *r.anchors][: planner.config.anchors]
        else:
            r.note(ACCEPTED)
    return "".join(r.decisions)


def test_period_is_the_one_that_meets_the_tolerance() -> None:
    """The error of a period n is 1e-4 n^3, so tolerance 0.0125 is met by n = 5, and the safety factor asks for 4.8."""
    decisions = play(Planner(config(tolerance=0.0125)), [1e-4] * 50)
    assert decisions == "FFA" + "FAAA" + "FAAAA" * 8 + "FAA"


def test_period_follows_the_error_of_the_moment() -> None:
    decisions = play(Planner(config(tolerance=0.0125)), [1e-4] * 20 + [2e-3] * 15 + [1e-5] * 15)
    assert decisions[20:35].count("F") >= 6 and decisions[35:].count("F") <= 3


@pytest.mark.parametrize("speedup", [1.0, 1.7, 2.0, 3.0, 4.9, 5.0, 7.1, 13.0, 25.0, 50.0])
@pytest.mark.parametrize("density", [1.0, 1.75])
@pytest.mark.parametrize("tolerance", [0.0, 0.0125, 1.0])
def test_budget_is_never_exceeded(speedup: float, density: float, tolerance: float) -> None:
    planner = Planner(config(speedup=speedup, tolerance=tolerance))
    for estimates in ([1e-6] * 50, [1.0] * 50, [1e-4] * 25 + [1.0] * 25):
        spent = play(planner, estimates, density=density).count("F")
        assert spent <= int(50 / speedup)
        if tolerance == 0.0 and speedup >= 2:
            assert spent >= int(50 / speedup) - 1, "a budget is there to be spent"


def test_budget_of_one_is_one_full_step() -> None:
    assert play(Planner(config(speedup=50.0, tolerance=0.0)), [1e-4] * 50) == "F" + "A" * 49


def test_budget_is_spread() -> None:
    decisions = play(Planner(config(speedup=5.0, tolerance=0.0)), [1e-4] * 50)
    assert decisions.count("F") == 10 and max(len(run) for run in decisions[4:].split("F")) <= 6


def test_budget_is_denser_at_the_beginning_of_a_flow() -> None:
    flow = play(Planner(config(speedup=5.0, tolerance=0.0)), [1e-4] * 50, density=1.75)
    even = play(Planner(config(speedup=5.0, tolerance=0.0)), [1e-4] * 50)
    assert flow[:20].count("F") > even[:20].count("F") and flow[30:].count("F") < even[30:].count("F")


def test_every_step_is_full_without_threshold_or_tolerance() -> None:
    assert play(Planner(config(threshold=0.0)), [0.0] * 50) == "F" * 50
    assert play(Planner(config(tolerance=0.0)), [0.0] * 50) == "F" * 50
    assert Planner(config(threshold=0.0)).exact and Planner(config(tolerance=0.0)).exact
    assert not Planner(config(tolerance=0.0, speedup=2.0)).exact


def test_schedule_is_followed_once_enough_full_steps_are_kept() -> None:
    planner = Planner(config(schedule=(0, 5, 6, 11), tolerance=0.0))
    assert play(planner, [9.0] * 12, total=12) == "FFAAAFFAAAAF"
    assert not planner.exact and not planner.measures


def test_placement_is_followed() -> None:
    planner = Planner(config(tolerance=0.0125))
    assert play(planner, [9.0] * 12, total=12, placement=frozenset({0, 4, 9})) == "FAAAFAAAAFAA"


def test_a_restart_begins_with_full_steps() -> None:
    """Also where the steps are placed: nothing is kept that a forecast could be made of."""
    for placement in (None, frozenset({0, 9})):
        record = Record(0, (0,), step=4, total=12, placement=placement)
        record.anchors, record.fulls, record.streak = [1.0, 0.0], 2, 1
        planner = Planner(config(tolerance=0.0, speedup=3.0))
        assert placement is None or planner.plan(record) is Plan.DRAFT
        record.restart()
        assert planner.plan(record) is Plan.FULL


def test_config_is_frozen_and_strict() -> None:
    with pytest.raises(AttributeError):
        config().order = 2  # type: ignore[misc]
    for wrong in (
        dict(order=5), dict(order=1.5), dict(threshold=-1.0), dict(tolerance=-1.0), dict(max_draft=0),
        dict(speedup=0.5), dict(speedup=True), dict(prior="measurd"), dict(corrector=1), dict(schedule=[1]),
    ):  # fmt: skip
        with pytest.raises(speca.ConfigError):
            config(**wrong)
    assert speca.SpecaConfig(**config().to_dict()) == config()


def test_an_error_that_is_no_number_plans_the_shortest_period() -> None:
    planner, record = Planner(speca.SpecaConfig(tolerance=0.01)), Record(0, (0,))
    planner.observe(record, float("nan"), 3)
    assert record.planned == 4 * Planner.SHRINK
