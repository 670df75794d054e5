"""Starts of searches: no other placement has a lower sum of costs, and the sums resemble the errors."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from speca.core.batch import Runs
from speca.core.prior import Prior
from speca.core.starts import Starts, spread
from speca.core.transition import Transition

STEPS, COUNT = 12, 5


@pytest.fixture(scope="module")
def tables() -> Runs:
    t = np.linspace(0, 1, STEPS)
    prior = Prior(tuple(1 - t), np.exp(-8 * (t[:, None] - t) ** 2) + 1e-3 * np.eye(STEPS))
    steps = [Transition((-0.2, 1.2), (-0.1, -0.02), 0.0, 1 + 0.02 * j) for j in range(STEPS)]
    return Runs(prior, steps, range(STEPS), STEPS)


def total(starts: Starts, steps: list[int]) -> float:
    gaps = np.diff([0, *steps, STEPS])
    spans = list(zip(steps, gaps[:-1], gaps[1:], strict=True))
    return sum(starts.fresh[span] / COUNT + starts.left[span] for span in spans[:-1]) + starts.fresh[spans[-1]]


def test_no_placement_has_a_lower_sum(tables: Runs) -> None:
    starts = Starts(tables, STEPS)
    every = [[0, *rest] for rest in combinations(range(1, STEPS), COUNT - 1)]
    found = starts.best(COUNT, 6).tolist()
    assert found[0] == min(every, key=lambda steps: total(starts, steps))
    assert len({tuple(steps[-2:]) for steps in found}) == 6
    assert [total(starts, steps) for steps in found] == sorted(total(starts, steps) for steps in found)
    second = min((steps for steps in every if steps[1] == 1), key=lambda steps: total(starts, steps))
    assert starts.best(COUNT, 1, second=1).tolist() == [second]


def test_sums_rank_placements_as_errors_do(tables: Runs) -> None:
    starts = Starts(tables, STEPS)
    every = np.array([[0, *rest] for rest in combinations(range(1, STEPS), COUNT - 1)])
    sums, errors = np.array([total(starts, steps) for steps in every.tolist()]), tables.errors(every)
    ranks = [np.argsort(np.argsort(values)) for values in (sums, errors)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9


def test_legs_are_not_longer_than_they_may_be(tables: Runs) -> None:
    assert np.diff([*Starts(tables, 3).best(COUNT, 1)[0].tolist(), STEPS]).max() <= 3
    assert not len(Starts(tables, 2).best(COUNT, 1))


def test_plain_schedules_are_denser_where_they_should_be() -> None:
    assert spread(10, 5, 1.0) == (0, 2, 4, 6, 8)
    assert sum(spread(50, 10, 1.6)) < sum(spread(50, 10, 1.0)) < sum(spread(50, 10, 0.6))
    assert spread(6, 6, 3.0) == tuple(range(6))
