"""Placement: at which steps to compute in full, so that the error expected at the end is smallest.

The run of a schedule is computed on coefficients of the outputs instead of the outputs themselves, with the same
forecasts and corrections. With the moments `C` of a prior that gives the expected error without a model, in a few
milliseconds. A placement is improved by moving full steps until no move lowers the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .prior import DEPTH, Array, Prior
from .transition import Transition, advance

LEAST = 4
"""The fewest full steps that a tolerance may choose."""

MOVES, MOVES_OF_TWO = (-1, 1, -2, 2, -4, 4), (-1, 1, -2, 2)
DENSITIES = (0.9, 1.2, 1.6)
SWEEPS = 12


Change = list[Array]
"""Of the sample at a step and of those after it (`core/correction.py`), each as coefficients (T,) of the outputs."""


@dataclass(frozen=True)
class Placement:
    """The full steps of a run, and the error that `expected` gives for them."""

    steps: tuple[int, ...]
    error: float


def place(prior: Prior, transitions: tuple[Transition, ...], count: int) -> Placement:
    """Return the best `count` full steps known for a run of the linear sampler `transitions`; step 0 is among them."""
    total = len(transitions)
    if count >= total:
        return Placement(tuple(range(total)), 0.0)
    if count in prior.placed:
        return Placement(prior.placed[count], expected(prior, transitions, set(prior.placed[count])))
    return shortlist(prior, transitions, count)[0]


@lru_cache(maxsize=512)
def shortlist(prior: Prior, transitions: tuple[Transition, ...], count: int) -> tuple[Placement, ...]:
    """Return different placements of `count` full steps, fewer than all, which no move improves; the best first.

    Found by exchange from schedules of different density, once with the second step in full: each full step in turn is
    moved where that lowers the expected error, alone or together with the next one. The expected error leaves out
    how outputs change with a sample that is off, so `speca.calibrate` runs the first ones of the list to compare them.
    """
    total, found = len(transitions), dict[tuple[int, ...], Placement]()
    for kept in (1, 2)[:count]:
        for density in DENSITIES:
            start = {
                *range(kept - 1),
                *(step + kept - 1 for step in _start(total - kept + 1, count - kept + 1, density)),
            }
            placement = _improved(prior, transitions, start, kept)
            found[placement.steps] = placement
    return tuple(sorted(found.values(), key=lambda placement: placement.error))


def _start(total: int, count: int, density: float) -> set[int]:
    """`count` steps, the first among them; with a `density` above 1 denser at the beginning."""
    steps, room = {0}, total
    for k in range(count - 1, 0, -1):  # from the end, each at least a step before the next
        room = min(room - 1, max(k, round((total - 1) * (k / (count - 0.5)) ** density)))
        steps.add(room)
    return steps


def _improved(prior: Prior, transitions: tuple[Transition, ...], start: set[int], kept: int) -> Placement:
    """The placement that exchange leads to from `start`, whose first `kept` steps stay."""
    best, least = start, expected(prior, transitions, start)
    for _ in range(SWEEPS):
        before = least
        for index in range(kept, len(start)):
            trials = _moved(sorted(best), index, len(transitions))
            errors = [expected(prior, transitions, trial) for trial in trials]
            if errors and min(errors) < least:
                least = min(errors)
                best = trials[errors.index(least)]
        if least > 0.999 * before:
            break
    return Placement(tuple(sorted(best)), least)


def _moved(steps: list[int], index: int, total: int) -> list[set[int]]:
    """The `steps` with the one at `index` moved, alone or together with the next one."""
    found = []
    for count, moves in ((1, MOVES), (2, MOVES_OF_TWO)):
        part = steps[index : index + count]
        rest = set(steps).difference(part)
        for move in moves if len(part) == count else ():
            there = {step + move for step in part}
            if all(0 < step < total for step in there) and not there & rest:
                found.append(rest | there)
    return found


def with_placements(prior: Prior, transitions: tuple[Transition, ...]) -> Prior:
    """Return the prior with placements of up to half the steps, so that they need not be searched when it is used."""
    counts = range(LEAST, len(transitions) // 2 + 1)
    return replace(prior, placed={count: place(prior, transitions, count).steps for count in counts})


def cheapest(prior: Prior, transitions: tuple[Transition, ...], tolerance: float) -> Placement:
    """Return a placement whose expected error is at most `tolerance`, where one full step fewer would exceed it."""
    few, many = LEAST, len(transitions)
    middle = max(few, many // 2)  # up to here a prior may know its placements
    while few < many:
        few, many = (few, middle) if place(prior, transitions, middle).error <= tolerance else (middle + 1, many)
        middle = (few + many) // 2
    while many > LEAST and place(prior, transitions, many - 1).error <= tolerance:  # errors need not fall at each step
        many -= 1
    return place(prior, transitions, many)


def expected(prior: Prior, transitions: Sequence[Transition], full: set[int], truth: Array | None = None) -> float:
    """Return the expected error of the sample in a run with the `full` steps: root mean square per element.

    The weights are the prior's, the moments (T, T) its own or those of `truth`.

    The mean square of the error at the end is added to that at the steps where outputs are computed, in units of the
    straight path. The latter is corrected and has no effect in first order; but outputs change with it in a way that
    moments cannot show (measured, docs/LOG.md).
    """
    total, moments = len(transitions), prior.moments if truth is None else truth
    none: Change = [np.zeros(total)] * len(transitions[0].keep)
    off = none  # what this sample and those after it are off by, as coefficients of the outputs
    met = 0.0  # mean squares of what the sample is off by where outputs are computed
    drift, drafts = none, list[int]()
    anchors: list[tuple[int, Array]] = []
    for step, t in enumerate(transitions):
        if step in full or not anchors:
            used = t.jacobian * off[0]
            used[step] += 1
            if drafts:
                met += float(off[0] @ moments @ off[0]) / t.size**2
                moves = _moves(prior, transitions, anchors, drafts, step, used, drift)
                off, used = [o + m for o, m in zip(off, moves, strict=True)], used + t.jacobian * moves[0]
            anchors = [(step, used), *anchors][:DEPTH]
            drafts, drift = [], none
        else:
            weights = prior.weights([a for a, _ in anchors], [step])[0]
            used = weights @ np.stack([c for _, c in anchors])
            drift = advance(drift, t, used)
            drafts.append(step)
        error = used.copy()
        error[step] -= 1
        off = advance(off, t, error)
    return math.sqrt(max(0.0, float(off[0] @ moments @ off[0]) + met / len(full)))


def _moves(
    prior: Prior, transitions: Sequence[Transition], anchors: Sequence[tuple[int, Array]], drafts: Sequence[int],
    step: int, output: Array, drift: Change,
) -> Change:  # fmt: skip
    """The corrector's moves (`core/correction.py`), on coefficients."""
    nodes = [step, *(a for a, _ in anchors)]
    omega: Change = [np.zeros(len(nodes))] * len(drift)
    for draft, share in zip(drafts, prior.weights(nodes, drafts), strict=True):
        omega = advance(omega, transitions[draft], share)
    known: Array = np.stack([output, *(c for _, c in anchors)])
    moves = [o @ known - d for o, d in zip(omega, drift, strict=True)]
    jacobian = transitions[step].jacobian
    answer = moves[0] * jacobian / (1 - float(omega[0][0]) * jacobian)
    return [m + answer * float(o[0]) for m, o in zip(moves, omega, strict=True)]
