"""Placement: at which steps to compute in full, so that the error expected at the end is smallest.

The run of a schedule is computed on coefficients of the outputs instead of the outputs themselves, with the same
forecasts and corrections. With the moments `C` of a prior that gives the expected error without a model (`expected`).
Placements are found by dynamic programming and moving full steps (`core/starts.py`, `core/search.py`), which score many
at once (`core/batch.py`): some tens of milliseconds for 50 steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .batch import Runs
from .prior import DEPTH, Array, Prior
from .search import search
from .starts import spread
from .transition import Transition, advance

LEAST = 4
"""The fewest full steps that a tolerance may choose."""

COARSE = 5
"""A budget of fewer full steps, of which nothing is known, is spent as the sampler with so many steps would."""

FLOW_DENSITY = 1.15
"""How much denser evenly placed full steps of a flow are at the beginning: the power of their index. More is better for
some models, and worse than as many plain steps for others (docs/LOG.md)."""

Change = list[Array]
"""Of the sample at a step and of those after it (`core/correction.py`), each as coefficients (T,) of the outputs."""


@dataclass(frozen=True)
class Placement:
    """The full steps of a run, and the error that `expected` gives for them."""

    steps: tuple[int, ...]
    error: float


def even(total: int, count: int, flow: bool) -> tuple[int, ...]:
    """Return `count` of `total` steps about evenly apart, step 0 among them: a placement where no prior is known.

    For a flow they are denser at the beginning and end with the last step, as drafts after the last full step are never
    corrected; for other samplers half a period is left after it. Fewer than COARSE are those of the sampler with
    `count` steps. Chosen by measurement (docs/LOG.md).
    """
    if count < COARSE:
        return tuple(round(k * total / count) for k in range(count))
    return spread(total, count, FLOW_DENSITY, rest=0.0) if flow else spread(total, count, 1.0)


def place(prior: Prior, transitions: tuple[Transition, ...], count: int) -> Placement:
    """Return the best `count` full steps known for a run of the linear sampler `transitions`; step 0 is among them.

    What the prior has placed is taken as it is.
    """
    total = len(transitions)
    if count >= total:
        return Placement(tuple(range(total)), 0.0)
    if count in prior.placed:
        return _scored(prior, transitions, tuple(prior.placed[count]))
    return shortlist(prior, transitions, count)[0]


@lru_cache(maxsize=512)
def shortlist(prior: Prior, transitions: tuple[Transition, ...], count: int) -> tuple[Placement, ...]:
    """Return different placements of `count` full steps, fewer than all, which no move improves; the best first.

    In one of them the second step is in full. The expected error leaves out how outputs change with a sample that is
    off, so `speca.calibrate` runs the first ones of the list to compare them.

    Args:
        prior: of the run's T steps.
        transitions: of the linear sampler, T.
        count: number of full steps.
    """
    found = (Placement(steps, error) for steps, error in search(prior, transitions, count).items())
    return tuple(sorted(found, key=lambda placement: placement.error))


@lru_cache(maxsize=512)  # asked for each sample of each run
def _scored(prior: Prior, transitions: tuple[Transition, ...], steps: tuple[int, ...]) -> Placement:
    """A placement with the error that is expected of it."""
    positions = sorted({0, *steps})
    tables = Runs(prior, transitions, positions, len(positions))
    return Placement(steps, float(np.sqrt(tables.errors(np.searchsorted(positions, [steps]))[0])))


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


def expected(
    prior: Prior,
    transitions: Sequence[Transition],
    full: set[int],
    truth: Array | None = None,
) -> float:
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
