"""The search for placements: moves are scored as the runs after them, and a start is the best sum there is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from core.schedules import STEPS, placements, rough, sampler
from speca.core.batch import Runs
from speca.core.search import improved, moves_of, scores_of, search


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_moves_are_scored_as_the_runs_after_them(memory: int) -> None:
    tables = Runs(rough(), sampler(memory), range(STEPS), STEPS)
    for count in (2, 3, 4, 8):
        some = placements(count, 3)
        moves = moves_of(tables, some, np.array([1, 2, 1]))
        assert scores_of(tables, some, moves) == pytest.approx(tables.errors(moves.to), rel=1e-8)


def test_moves_are_different_placements_in_order_and_leave_what_is_kept() -> None:
    tables = Runs(rough(), sampler(1), range(STEPS), STEPS)
    some = np.array([[0, 1, 5, 6, 12], [0, 1, 2, 9, 13]])
    moves = moves_of(tables, some, np.array([1, 2]))
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
    tables = Runs(rough(), sampler(memory), range(STEPS), STEPS)
    begun = placements(5, 6)
    found, errors = improved(tables, begun, [1] * 6)
    assert (errors <= tables.errors(begun)).all() and errors == pytest.approx(tables.errors(found))
    every = tables.errors(np.array([(0, *rest) for rest in combinations(range(1, STEPS), 4)]))
    assert (every < errors.min() * (1 - 1e-9)).sum() <= len(every) // 100
    best = min(search(rough(), sampler(memory), 5).values())
    assert (every < best**2 * (1 - 1e-9)).sum() <= len(every) // 100
