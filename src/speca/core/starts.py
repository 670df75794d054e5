"""Where a search for placements starts: the least sum of costs of spans, by dynamic programming.

The square of the error of a run is nearly a sum over its spans (from one full step to the next): of the mean square of
what the forecasts of a span lead to, and of what the correction after it leaves. Both depend on the full steps around
the span alone, so for any number of full steps the placement of the least sum is found without trying others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .batch import Runs, Steps
from .prior import DEPTH, NUGGET, Array

PART = 4096
"""Spans computed at once; the arrays of more do not fit into a processor's cache."""


class Starts:
    """Costs of spans from `a` to `a + j` after one from `a - i`; the span before both is taken to be i long, too."""

    def __init__(self, tables: Runs, reach: int) -> None:
        """Compute the costs for placements whose full steps are at most `reach` indices apart."""
        self.tables, self.reach, m = tables, min(reach, tables.reach), tables.size
        shape = (m, self.reach + 1, self.reach + 1)
        a, i, j = (k.ravel() for k in np.indices(shape))
        valid = np.flatnonzero((j > 0) & (a + j <= m) & np.where(i == 0, a == 0, i <= a))
        first = np.zeros_like(tables.ends)
        first[:, 0] = 1
        now, end = (self._integrals(weights) for weights in (first, tables.ends))
        self.fresh, self.left = np.full(shape, np.inf), np.zeros(shape)
        for part in np.array_split(valid, max(1, -(-len(valid) // PART))):
            self.fresh.flat[part], self.left.flat[part] = self._costs(a[part], i[part], j[part], now, end)

    def _integrals(self, weights: Array) -> _Integrals:
        """What the outputs of spans make of the samples after them, summed with `weights` (m + 1, p)."""
        m, g = self.tables.size, self.reach
        to = np.minimum(np.arange(m)[:, None] + np.arange(g + 1), m)
        sums = (weights[to][:, :, None] @ self.tables.drifts[:m, : g + 1])[:, :, 0]
        outputs = self.tables.outputs
        before = np.concatenate([np.zeros((2 * g, outputs.shape[1])), outputs[:m]])
        around = np.lib.stride_tricks.sliding_window_view(before, 2 * g + 1, axis=0)[:, :, ::-1]
        return _Integrals(sums @ around, (sums * outputs[to]).sum(2), (sums * sums).sum(2))

    def _costs(self, a: Steps, i: Steps, j: Steps, now: _Integrals, end: _Integrals) -> tuple[Array, Array]:
        """What spans (N,) cost: by the forecasts in them, to be divided by the number of full steps, and for good."""
        tables, to = self.tables, a + j
        old = np.where(i > 0, a - i, -1)  # -1 is no step
        oldest = np.where(old > 0, np.maximum(old - i, 0), -1)
        anchors = np.stack([a, old, oldest], 1)
        back = np.minimum(a[:, None] - anchors, 2 * self.reach)
        before = tables.covariance[anchors, to[:, None]]
        among = tables.covariance[anchors[:, :, None], anchors[:, None]]
        of_now, of_end = now.earlier[a[:, None], j[:, None], back], end.earlier[a[:, None], j[:, None], back]
        forecast, along, lasting = tables.solved(anchors, np.stack([before, of_now, of_end], 1)).transpose(1, 0, 2)
        spread = tables.covariance[to, to] * (1 + NUGGET) - _dot(forecast, before)
        gain = (end.there[a, j] - _dot(lasting, before)) / spread
        gain /= 1 - tables.jacobians[to] * (now.there[a, j] - _dot(along, before)) / spread
        fresh = _dot(_times(among, along) - 2 * of_now, along) + now.square[a, j]
        kept = lasting - gain[:, None] * forecast
        left = _dot(_times(among, kept) + 2 * gain[:, None] * before - 2 * of_end, kept) + end.square[a, j]
        left += gain * (gain * tables.covariance[to, to] - 2 * end.there[a, j])
        later = 1 - tables.positions[to] / tables.total  # at later full steps the sample is off by it, too
        return np.maximum(fresh, 0) / tables.sizes[to] ** 2, np.maximum(left, 0) * (1 + later)

    def best(self, count: int, options: int, early: float = 1.0, second: int | None = None) -> Steps:
        """Return up to `options` placements (N, count) of the least sums, each with other last spans, best first.

        Args:
            count: number of full steps.
            options: how many placements.
            early: what the errors of forecasts, where the model runs, count for.
            second: the second full step, if it is given.
        """
        m, g = self.tables.size, self.reach
        cost = self.fresh * (early / count) + self.left
        steps, lengths = np.arange(m), np.arange(g + 1)
        begun = steps[:, None] - lengths
        value = np.full((m, g + 1), np.inf)  # least sums that lead to a full step by a span of a length
        value[0, 0] = 0
        origins = []
        for span in range(1, count):
            reached = value[:, :, None] + cost
            origins.append(reached.argmin(1))
            least = np.take_along_axis(reached, origins[-1][:, None], 1)[:, 0]
            value = np.where((begun >= 0) & (lengths > 0), least[np.maximum(begun, 0), lengths], np.inf)
            if span == 1 and second is not None:
                value[steps != second] = np.inf
        rest = m - steps
        value += np.where(rest[:, None] <= g, self.fresh[steps, :, np.minimum(rest, g)], np.inf)
        order = np.argsort(value, axis=None, kind="stable")[:options]
        step, length = np.unravel_index(order[np.isfinite(value.flat[order])], value.shape)
        found = [step]
        for origin in reversed(origins):
            step, length = step - length, origin[step - length, length]
            found.append(step)
        return np.stack(found[::-1], 1)


def spread(total: int, count: int, density: float, rest: float = 0.5) -> tuple[int, ...]:
    """Return `count` of `total` steps, step 0 among them.

    Args:
        total: number of steps.
        count: how many of them, at most all.
        density: power of their index; 1 places them evenly, more places them more densely at the beginning.
        rest: what is left after the last one, as a share of the mean distance; 0 ends with the last step.
    """
    steps, room = [0], total
    for k in range(count - 1, 0, -1):  # from the end, each at least a step before the next
        room = min(room - 1, max(k, round((total - 1) * (k / (count - 1 + rest)) ** density)))
        steps.append(room)
    return tuple(sorted(steps))


class _Integrals(NamedTuple):
    """Inner products of the vectors of spans from `a` to `a + j`."""

    earlier: Array  # (m, gaps, 2 reach + 1), with the output of step a - k
    there: Array  # (m, gaps), with the output of step a + j
    square: Array  # (m, gaps), with themselves


def _dot(left: Array, right: Array) -> Array:
    found: Array = left[:, 0] * right[:, 0]
    for k in range(1, DEPTH):
        found = found + left[:, k] * right[:, k]
    return found


def _times(matrix: Array, vector: Array) -> Array:
    return (matrix @ vector[:, :, None])[:, :, 0]
