"""The search for placements: full steps are moved while the error expected falls.

All single moves of a placement are scored at once, each from where it begins to where the run is again as it was; what
the rest of the run then costs is a quadratic form of the state there. The best moves are made together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .batch import Runs, Spans, Steps, played
from .prior import Array, Prior
from .starts import Starts, spread
from .transition import Transition

WHOLE = 64
"""Up to this many steps of a run, each may be chosen as a full step at once. In longer runs only every so many may at
first, and then the steps near those that were chosen."""

FINE, NEAR, FAR = 8, 3, 6
"""Steps tried in the mean distance of two full steps; the longest distance, in mean ones, in starts and after moves."""

OPTIONS = 64
"""Placements of least sums of which the best is where the search starts."""

DENSITY = 0.9
"""Power of the plain schedule that is another start."""

MOVES, MOVES_OF_TWO = (-1, 1, -2, 2, -4, 4), (-1, 1, -2, 2)
ROUNDS = 40
ENOUGH = 5e-4
"""A round that lowers an error by less than this share is the last."""

CHANGED = 5
"""Spans that a move of two neighbouring full steps changes."""

PART = 400
"""Moves scored at once; the arrays of more do not fit into a processor's cache."""


def search(prior: Prior, transitions: tuple[Transition, ...], count: int) -> dict[tuple[int, ...], float]:
    """Return two or three placements of `count` full steps, each found from another start, and their expected errors.

    In one of the placements the second step is full.
    """
    total = len(transitions)
    whole = total <= WHOLE
    stride = 1 if whole else max(1, round(total / count / FINE))
    positions = tuple(sorted({0, 1, *range(0, total, stride)}))
    mean = len(positions) / count
    if whole:  # tables that other counts can share
        tables = _tables(prior, transitions)
        starts = _starts(tables, 1 << math.ceil(math.log2(max(FINE, NEAR * mean))))
    else:
        tables = Runs(prior, transitions, positions, min(len(positions), math.ceil(FAR * mean)))
        starts = Starts(tables, max(FINE, math.ceil(NEAR * mean)))
    begun, kept = _begun(tables, starts, count)
    found, errors = improved(tables, begun, kept)
    if stride > 1:
        return dict(
            _refined(prior, transitions, tables.positions[placement], stride, keep)
            for placement, keep in zip(found, kept, strict=True)
        )
    return {tuple(p): math.sqrt(error) for p, error in zip(found.tolist(), errors.tolist(), strict=True)}


@lru_cache(maxsize=8)
def _tables(prior: Prior, transitions: tuple[Transition, ...]) -> Runs:
    return Runs(prior, transitions, range(len(transitions)), len(transitions))


@lru_cache(maxsize=16)
def _starts(tables: Runs, reach: int) -> Starts:
    return Starts(tables, reach)


def _begun(tables: Runs, starts: Starts, count: int) -> tuple[Steps, list[int]]:
    """Placements (N, count) to start from, and how many of their first full steps are to stay."""
    sets = [(starts.best(count, OPTIONS), 1)]
    sets.append((np.array([spread(tables.size, count, DENSITY)]), 1))
    if count > 1:
        sets.append((starts.best(count, OPTIONS, second=1), 2))
    sets = [(options, kept) for options, kept in sets if len(options)]
    return np.stack([options[tables.errors(options).argmin()] for options, _ in sets]), [kept for _, kept in sets]


def _refined(
    prior: Prior, transitions: tuple[Transition, ...], steps: Steps, stride: int, kept: int
) -> tuple[tuple[int, ...], float]:
    """A placement improved by full steps less than `stride` from its `steps`, and its error."""
    near = (steps[:, None] + np.arange(1 - stride, stride)).ravel()
    positions = np.unique(np.append(near[(near >= 0) & (near < len(transitions))], (0, 1)))
    tables = Runs(prior, transitions, positions.tolist(), len(positions))
    found, errors = improved(tables, np.searchsorted(positions, steps)[None], [kept])
    return tuple(positions[found[0]].tolist()), math.sqrt(errors[0])


def improved(tables: Runs, placements: Steps, kept: Sequence[int]) -> tuple[Steps, Array]:
    """Return placements (N, K) that no move improves much, and the squares of their errors; the first `kept` stay."""
    placements, errors, fixed = placements.copy(), tables.errors(placements), np.array(kept)
    active = np.arange(len(placements))
    for _ in range(ROUNDS):
        before = errors[active]
        placements[active], errors[active] = _round(tables, placements[active], errors[active], fixed[active])
        active = active[errors[active] < (1 - ENOUGH) ** 2 * before]
        if not len(active):
            break
    return placements, tables.errors(placements)  # not by differences of forms, which cancel


def _round(tables: Runs, placements: Steps, errors: Array, kept: Array) -> tuple[Steps, Array]:
    """The best of placements (N, K) as they are, after one move, or several far apart; and the squared errors."""
    moves = moves_of(tables, placements, kept)
    scores = scores_of(tables, placements, moves)
    gaining = np.flatnonzero(scores < errors[moves.run])
    gaining = gaining[np.argsort(scores[gaining], kind="stable")]
    found, least = placements.copy(), errors.copy()
    owners, merged = list[int](), list[Steps]()
    for run in np.unique(moves.run[gaining]):
        mine = gaining[moves.run[gaining] == run]
        found[run], least[run] = moves.to[mine[0]], scores[mine[0]]
        taken = _apart(moves, mine)
        for size in {len(taken), -(-len(taken) // 2), -(-len(taken) // 4)} - {1}:
            together = placements[run].copy()
            for move in taken[:size]:
                part = slice(moves.first[move], moves.first[move] + moves.width[move])
                together[part] = moves.to[move, part]
            owners.append(run)
            merged.append(together)
    if merged:
        for run, together, error in zip(owners, merged, tables.errors(np.stack(merged)), strict=True):
            if error < least[run]:
                found[run], least[run] = together, error
    return found, least


class Moves(NamedTuple):
    """N moves: of which placement, the index of the first full step moved, how many are, and the placement after it."""

    run: Steps
    first: Steps
    width: Steps
    to: Steps  # (N, K)


def moves_of(tables: Runs, placements: Steps, kept: Array) -> Moves:
    """All moves of the full steps but the first `kept` of each placement (runs, K) that keep their order."""
    runs, count = placements.shape
    bounds = np.concatenate([placements, np.full((runs, 1), tables.size)], 1)
    parts = []
    for width, moves in ((1, MOVES), (2, MOVES_OF_TWO)):
        index = np.arange(1, count - width + 1)
        room_before = placements[:, index] - placements[:, index - 1]
        room_after = bounds[:, index + width] - placements[:, index + width - 1]
        for move in moves:
            before, after = room_before + move, room_after - move
            valid = (before > 0) & (after > 0) & (before <= tables.reach) & (after <= tables.reach)
            run, which = np.nonzero(valid & (index >= kept[:, None]))
            to = placements[run]
            for k in range(width):
                to[np.arange(len(run)), index[which] + k] += move
            parts.append(Moves(run, index[which], np.full(len(run), width), to))
    return Moves(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _apart(moves: Moves, order: Steps) -> list[int]:
    """Those of the moves `order`, best first, that move no full step beside one that a better move has moved."""
    taken, free = list[int](), np.ones(moves.to.shape[1] + 2, dtype=bool)
    for move in order.tolist():
        first, after = int(moves.first[move]), int(moves.first[move] + moves.width[move])
        if free[first:after].all():
            taken.append(move)
            free[max(0, first - 1) : after + 1] = False
    return taken


def scores_of(tables: Runs, placements: Steps, moves: Moves) -> Array:
    """The squares (N,) of the errors expected after each move."""
    count = placements.shape[1]
    states, spent, squares, slopes, rest = _around(tables, placements)
    begin, total = moves.first - 1, np.empty(len(moves.first))  # span k leads to full step k + 1
    for part in np.array_split(np.arange(len(begin)), max(1, -(-len(begin) // PART))):
        first, run = begin[part], moves.run[part]
        changed = first[None] + np.arange(CHANGED)[:, None]
        windows = tables.windows(moves.to[part], CHANGED)[np.arange(len(part)), changed]
        spans = tables.spans(windows.reshape(-1, 4), count)
        x, cost = states[first, run], spent[first, run]
        for span in range(CHANGED):
            lost, x = played(Spans(*(v[span * len(part) : (span + 1) * len(part)] for v in spans)), x)
            cost = cost + lost
        after = np.minimum(first + CHANGED, count)
        ahead = squares[after, run] @ x + 2 * slopes[after, run]
        total[part] = cost + np.einsum("nzr,nzr->n", ahead, x) + rest[after, run]
    return total


def _around(tables: Runs, placements: Steps) -> tuple[Array, Array, Array, Array, Array]:
    """The state before each span of placements (runs, K), and what the spans before it cost; then, as a quadratic form
    of the state (`_before`), what it and those after it cost. Each (K, runs, ...), the forms with a zero at the end."""
    runs, count = placements.shape
    flat = tables.spans(tables.windows(placements).reshape(-1, 4), count)
    spans = [Spans(*(v.reshape(runs, count, *v.shape[1:])[:, span] for v in flat)) for span in range(count)]
    x = tables.begin(runs)
    n, r = x.shape[1:]
    states, spent = np.empty((count, runs, n, r)), np.zeros((count + 1, runs))
    for span in range(count):
        states[span] = x
        lost, x = played(spans[span], x)
        spent[span + 1] = spent[span] + lost
    squares, slopes, rest = (np.zeros((count + 1, runs, *shape)) for shape in ((n, n), (n, r), ()))
    for span in reversed(range(count)):
        squares[span], slopes[span], rest[span] = _before(
            spans[span], squares[span + 1], slopes[span + 1], rest[span + 1]
        )
    return states, spent, squares, slopes, rest


def _before(spans: Spans, square: Array, slope: Array, rest: Array) -> tuple[Array, Array, Array]:
    """`Q`, `N` and `c` of the cost `tr x'Qx + 2 tr N'x + c` of spans and what follows, from those of what follows."""
    n = square.shape[1]
    change, given, loss = (
        spans.change[:, :, :n],
        spans.change[:, :, n:] @ spans.given,
        spans.loss[:, :n],
    )
    fixed = spans.loss[:, None, n:] @ spans.given
    weighted = spans.weight[:, None, None] * loss[:, :, None]
    turned = change.transpose(0, 2, 1)
    ahead = square @ given + slope
    rest = rest + np.einsum("nzr,nzr->n", ahead + slope, given) + spans.weight * np.einsum("nor,nor->n", fixed, fixed)
    return turned @ square @ change + weighted * loss[:, None], turned @ ahead + weighted * fixed, rest
