"""Runs in batches: the errors are those of the run computed step by step."""

from __future__ import annotations

import numpy as np
import pytest

from core.schedules import STEPS, placements, rough, sampler
from speca.core.batch import Runs
from speca.core.placement import expected


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_errors_are_those_of_the_run(memory: int) -> None:
    prior, steps = rough(), sampler(memory)
    tables = Runs(prior, steps, range(STEPS), STEPS)
    for count in (1, 2, 3, 5, 9, STEPS):
        some = placements(count)
        wanted = [expected(prior, steps, set(p)) ** 2 for p in some.tolist()]
        assert tables.errors(some) == pytest.approx(wanted, rel=2e-9, abs=1e-20)


def test_errors_on_some_of_the_steps_within_reach() -> None:
    prior, steps, positions = rough(), sampler(2), [0, 1, 4, 6, 9, 13]
    tables = Runs(prior, steps, positions, 3)
    some = np.array([[0, 1, 3], [0, 2, 4], [0, 3, 5], [0, 2, 3]])
    wanted = [expected(prior, steps, {positions[k] for k in p}) ** 2 for p in some.tolist()]
    assert tables.errors(some) == pytest.approx(wanted, rel=2e-9)
