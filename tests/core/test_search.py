"""The search for placements: moves are scored as the runs after them, and a start is the best sum there is."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest

from speca.core.course import Course
from speca.core.prior import Prior
from speca.core.search import improved, moves_of, scores_of, search
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


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_moves_are_scored_as_the_runs_after_them(memory: int) -> None:
    course = Course(rough(), sampler(memory), GROWTH, range(STEPS), STEPS)
    for count in (2, 3, 4, 8):
        some = placements(count, 3)
        moves = moves_of(course, some, np.array([1, 2, 1]))
        assert scores_of(course, some, moves) == pytest.approx(course.errors(moves.to), rel=1e-8)


def test_moves_are_different_placements_in_order_and_leave_what_is_kept() -> None:
    course = Course(rough(), sampler(1), GROWTH, range(STEPS), STEPS)
    some = np.array([[0, 1, 5, 6, 12], [0, 1, 2, 9, 13]])
    moves = moves_of(course, some, np.array([1, 2]))
    assert (np.diff(moves.to) > 0).all() and moves.to.max() < STEPS and (moves.to[:, 0] == 0).all()
    assert (moves.to[moves.run == 1, 1] == 1).all() and (moves.to[moves.run == 0, 1] != 1).any()
    assert (moves.to != some[moves.run]).any(1).all()
    assert len(np.unique(np.column_stack([moves.run, moves.to]), axis=0)) == len(moves.to)
    assert {tuple(p) for p in moves.to[moves.run == 0].tolist()} >= {
        (0, 2, 5, 6, 12),
        (0, 1, 6, 7, 12),
        (0, 1, 5, 6, 8),
    }


@pytest.mark.parametrize("memory", [1, 2])
def test_improved_placements_are_better_and_nearly_the_best(memory: int) -> None:
    course = Course(rough(), sampler(memory), GROWTH, range(STEPS), STEPS)
    begun = placements(5, 6)
    found, errors = improved(course, begun, [1] * 6)
    assert (errors <= course.errors(begun)).all() and errors == pytest.approx(course.errors(found))
    every = course.errors(np.array([(0, *rest) for rest in combinations(range(1, STEPS), 4)]))
    assert (every < errors.min() * (1 - 1e-9)).sum() <= len(every) // 100
    best = min(search(rough(), sampler(memory), 5, GROWTH).values())
    assert (every < best**2 * (1 - 1e-9)).sum() <= len(every) // 100
