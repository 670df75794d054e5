"""The run of a schedule in batches: many placements are scored at once, and changes of one from where they begin.

Between two full steps, on a *span*, all that matters is how far this sample and those after it are off (p vectors), and
the outputs of the last DEPTH full steps. A span is linear in both. So it is a small matrix, and what it costs is a
quadratic form. With moments `C = L L^T`, coefficients `c` of the outputs are kept as `c L`: its length is the root mean
square. `expected` in `core/placement.py` is the same computation step by step; tests compare the two.

The corrector's moves are computed as a gain times an innovation. Interpolation through the full step b changes the
estimate of a draft d by `cov(d, b) / var(b)` times what the output of b is beyond its forecast, where `cov` and `var`
are those that remain once the full steps before b are known. That is the same as to solve with b among the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .prior import DEPTH, NUGGET, Array, Prior
from .transition import Transition

Steps = np.ndarray[Any, np.dtype[np.int64]]

NEGLIGIBLE = 1e-15
"""Share of the largest eigenvalue of the moments below which others are left out."""


class Spans(NamedTuple):
    """N spans, each from one full step to the next. A span turns the state `x` (n, r), n = p + DEPTH, before it into
    `change @ [x, given]` and adds `weight |loss @ [x, given]|^2` to the squared error of the run."""

    change: Array  # (N, n, n + p + 1)
    loss: Array  # (N, n + p + 1)
    weight: Array  # (N,)
    given: Array  # (N, p + 1, r)


class Runs:
    """Tables of a run, for placements on m of its steps.

    Steps are meant by their index in `positions`; the index m stands for the end of the run, and for no step at all.
    """

    def __init__(
        self,
        prior: Prior,
        transitions: Sequence[Transition],
        positions: Sequence[int],
        reach: int,
    ) -> None:
        """Prepare placements on the steps `positions`, rising from 0, with full steps at most `reach` indices apart."""
        self.total, self.size, self.reach = len(transitions), len(positions), reach
        self.memory = len(transitions[0].keep)
        self.positions = np.array([*positions, self.total])
        roots = _roots(prior.moments)
        self.outputs = np.concatenate([roots[self.positions[:-1]], np.zeros((1, roots.shape[1]))])  # L
        self.covariance = np.eye(self.size + 1)
        self.covariance[:-1, :-1] = prior.moments[np.ix_(self.positions[:-1], self.positions[:-1])]
        self.steps = np.stack([_matrix(t) for t in transitions])  # (T, p, p)
        self.effects = np.array([t.effect for t in transitions])  # (T, p)
        self.follow = np.array([t.jacobian for t in transitions])
        here = [transitions[p] for p in positions]
        self.jacobians = np.array([*(t.jacobian for t in here), 0.0])
        self.sizes = np.array([*(t.size for t in here), 1.0])
        self.drifts, self.transports = self._integrals(roots)
        self.ends = self._ends()

    def _ends(self) -> Array:
        """What a change of the p samples at a full step makes of the last sample, (m + 1, p), if all outputs follow."""
        found, ends = np.eye(self.memory)[0], np.zeros((self.total + 1, self.memory))
        ends[-1] = found
        for step in reversed(range(self.total)):
            follow = self.steps[step].copy()
            follow[:, 0] += self.effects[step] * self.follow[step]
            ends[step] = found = found @ follow
        chosen: Array = ends[self.positions]
        return chosen

    def _integrals(self, roots: Array) -> tuple[Array, Array]:
        """Effects between full steps a and b = a + gap: of the outputs on the p samples at b, (m + 1, gaps, p, r), and
        of the p samples after step a on those, (m + 1, gaps, p, p)."""
        p, r = self.memory, roots.shape[1]
        both = np.zeros((self.size + 1, self.reach + 1, p, r + p))
        now = np.zeros((self.size, p, r + p))
        now[:, :, r:] = np.eye(p)
        both[:, 0, :, r:] = np.eye(p)
        behind = 0  # how many of the positions lie before the step
        for step in range(self.total + 1):
            first = max(0, behind - self.reach)
            if step == self.positions[behind]:
                here = np.arange(first, behind)
                both[here, behind - here] = now[here]
            if step == self.total:
                break
            now[first:behind] = self.steps[step] @ now[first:behind]
            now[first:behind, :, :r] += self.effects[step][:, None] * roots[step]
            behind += step == self.positions[behind]
        return np.ascontiguousarray(both[..., :r]), np.ascontiguousarray(both[..., r:])

    def begin(self, runs: int) -> Array:
        """Return the state (runs, n, r) after step 0."""
        x = np.zeros((runs, self.memory + DEPTH, self.outputs.shape[1]))
        x[:, self.memory] = self.outputs[0]
        return x

    def windows(self, placements: Steps, beyond: int = 0) -> Steps:
        """Return the spans (N, K + beyond, 4) of placements (N, K): three full steps and where the span leads."""
        around = [(0, 0), (2, 1 + beyond)]
        padded = np.pad(placements, around, constant_values=self.size)
        return np.lib.stride_tricks.sliding_window_view(padded, 4, axis=1)

    def spans(self, windows: Steps, count: int) -> Spans:
        """Return the spans that `windows` (N, 4) describe, in runs with `count` full steps."""
        p, n = self.memory, self.memory + DEPTH
        last, to = windows[:, 2], windows[:, 3]
        anchors = windows[:, 2::-1]
        drifts = self.drifts[last, to - last]
        known = self.outputs[anchors].transpose(0, 2, 1)
        wanted = [self.covariance[anchors, to[:, None]][:, None], drifts @ known]
        weights = self.solved(anchors, np.concatenate(wanted, 1))
        forecast, drift = weights[:, 0], weights[:, 1:]
        before = self.covariance[anchors, to[:, None]]
        spread = self.covariance[to, to] * (1 + NUGGET) - (forecast * before).sum(1)
        shared = np.einsum("npr,nr->np", drifts, self.outputs[to]) - np.einsum("npk,nk->np", drift, before)
        gain = shared / spread[:, None]
        jacobian = self.jacobians[to][:, None]
        gain /= 1 - gain[:, :1] * jacobian

        off = np.zeros((len(windows), p, n + p + 1))
        off[:, :, :p] = self.transports[last, to - last]
        off[:, :, p:n] = drift
        off[:, range(p), range(n, n + p)] = -1
        used = jacobian * off[:, 0]
        used[:, -1] += 1
        beyond = used.copy()
        beyond[:, p:n] -= forecast
        change = np.zeros((len(windows), n, n + p + 1))
        used += jacobian * gain[:, :1] * beyond
        change[:, p] = used
        change[:, range(p + 1, n), range(p, n - 1)] = 1
        used = used.copy()
        used[:, -1] -= 1
        step = np.minimum(self.positions[to], self.total - 1)
        after = self.steps[step] @ (off + gain[:, :, None] * beyond[:, None])
        after += self.effects[step][:, :, None] * used[:, None]
        change[:, :p] = after
        met = (self.positions[to] - self.positions[last] > 1) / (self.sizes[to] ** 2 * count)
        weight = np.where(to < self.size, met, last < self.size)
        return Spans(change, off[:, 0], weight, np.concatenate([drifts, self.outputs[to][:, None]], 1))

    def solved(self, anchors: Steps, wanted: Array) -> Array:
        """The weights (N, q, DEPTH) of the outputs at `anchors` (N, DEPTH) whose covariances with them are `wanted`."""
        matrix = np.ascontiguousarray(self.covariance[anchors[:, :, None], anchors[:, None]].transpose(1, 2, 0))
        found = np.ascontiguousarray(wanted.transpose(2, 1, 0))
        for i in range(DEPTH):
            matrix[i, i] *= 1 + NUGGET
        for i in range(DEPTH):  # by elimination: the matrices are positive, and LAPACK is slow on many small ones
            for j in range(i + 1, DEPTH):
                share = matrix[j, i] / matrix[i, i]
                matrix[j, i:] -= share * matrix[i, i:]
                found[j] -= share * found[i]
        for i in reversed(range(DEPTH)):
            for j in range(i + 1, DEPTH):
                found[i] -= matrix[i, j] * found[j]
            found[i] /= matrix[i, i]
        weights: Array = found.transpose(2, 1, 0)
        return weights

    def errors(self, placements: Steps) -> Array:
        """Return the squares (N,) of the errors expected of placements (N, K)."""
        runs, count = placements.shape
        spans = self.spans(self.windows(placements).reshape(-1, 4), count)
        x, total = self.begin(runs), np.zeros(runs)
        for span in range(count):
            cost, x = played(Spans(*(part.reshape(runs, count, *part.shape[1:])[:, span] for part in spans)), x)
            total += cost
        return total


def played(spans: Spans, x: Array) -> tuple[Array, Array]:
    """Return the costs (N,) of spans and the states (N, n, r) after them."""
    both = np.concatenate([x, spans.given], 1)
    lost = (spans.loss[:, None] @ both)[:, 0]
    return spans.weight * np.einsum("nr,nr->n", lost, lost), spans.change @ both


def _roots(moments: Array) -> Array:
    """`L` (T, r) with `L L^T = moments`."""
    values, vectors = np.linalg.eigh(moments)
    kept = values > NEGLIGIBLE * values[-1]
    found: Array = np.ascontiguousarray(vectors[:, kept] * np.sqrt(values[kept]))
    return found


def _matrix(step: Transition) -> Array:
    """What `advance` does without an output, as a matrix (p, p)."""
    p = len(step.keep)
    return np.concatenate([np.eye(p)[1:], np.array([step.keep])])
