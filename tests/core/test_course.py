"""Runs in batches: the errors are those of the run computed step by step."""

from __future__ import annotations

import random

import numpy as np
import pytest

from speca.core.course import Course
from speca.core.placement import expected
from speca.core.prior import Prior
from speca.core.transition import Transition

STEPS = 14


def rough() -> Prior:
    t = np.linspace(0, 1, STEPS)
    return Prior(tuple(1 - t), np.exp(-3 * np.abs(t[:, None] - t)) * (1 + t[:, None] * t))


def sampler(memory: int) -> tuple[Transition, ...]:
    """Steps of a sampler that remembers, and whose outputs follow the sample."""
    keep, effect = (0.1, -0.2, 1.1)[3 - memory :], (-0.15, -0.1, 0.05)[:memory]
    return tuple(
        Transition(tuple(k + 0.002 * j for k in keep), tuple(e - 0.002 * j for e in effect), 0.3, 1 + 0.03 * j)
        for j in range(STEPS)
    )


GROWTH = tuple(1 + 0.3 * (-1) ** j for j in range(STEPS))


def placements(count: int, number: int = 20) -> np.ndarray:
    chance = random.Random(count)
    return np.array([[0, *sorted(chance.sample(range(1, STEPS), count - 1))] for _ in range(number)])


@pytest.mark.parametrize("growth", [(1.0,) * STEPS, GROWTH], ids=["plain", "growing"])
@pytest.mark.parametrize("memory", [1, 2, 3])
def test_errors_are_those_of_the_run(memory: int, growth: tuple[float, ...]) -> None:
    prior, steps = rough(), sampler(memory)
    course = Course(prior, steps, growth, range(STEPS), STEPS)
    for count in (1, 2, 3, 5, 9, STEPS):
        some = placements(count)
        wanted = [expected(prior, steps, set(p), growth=growth) ** 2 for p in some.tolist()]
        assert course.errors(some) == pytest.approx(wanted, rel=2e-9, abs=1e-20)


def test_errors_on_some_of_the_steps_within_reach() -> None:
    prior, steps, positions = rough(), sampler(2), [0, 1, 4, 6, 9, 13]
    course = Course(prior, steps, GROWTH, positions, 3)
    some = np.array([[0, 1, 3], [0, 2, 4], [0, 3, 5], [0, 2, 3]])
    wanted = [expected(prior, steps, {positions[k] for k in p}, growth=GROWTH) ** 2 for p in some.tolist()]
    assert course.errors(some) == pytest.approx(wanted, rel=2e-9)
