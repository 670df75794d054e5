"""Corrections: once a step is computed in full, the drafts before it are integrated again with what it shows.

A linear sampler holds the output of step j with weight `W_ij` in the sample at step i. Drafts used a forecast `v_j`,
extrapolated from full steps before them. When step i is computed in full, the interpolation through its output and the
outputs of the earlier full steps is one order more accurate. With weights `l_q(t_j)` of that interpolation, outputs
`V_q` of the full steps, and j over the drafts since the last full step, the sample at step i should change by

    d = sum_j W_ij (sum_q l_q(t_j) V_q - v_j) = sum_q omega_q V_q - drift.

`omega` are quadrature weights. No further evaluation of the model is needed: this is how predictor-corrector methods
work (Adams-Moulton; for diffusion samplers UniPC, arXiv:2302.04867). The size of `d` is Milne's estimate of the error
of the drafts.

The correction is applied through the output that is handed to the sampler, so the sampler is not changed. For a
one-step sampler, `a (x + d) + b v = a x + b (v + d a / b)`. For a sampler with memory p a correction is p numbers per
element (see `Transition`). What is handed over at one step is used again at later ones, so the rest stays *pending*
and is applied at the next steps (`Corrector.take`). Every later sample is then the one of a run that had used the
interpolated outputs from the beginning.

All of this is linear in the outputs, so guidance that mixes branches linearly mixes their corrections, and a constant
factor or sign that a pipeline puts on the model's output cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .history import History, on_device
from .transition import Transition, advance

TRUST = 0.05
"""Without a prior, a correction of this root mean square, in units of the straight path, is halved."""

ADAPT = 0.5
"""Share of what the last full step says in how far the next forecasts leave the last output (`Corrector.observe`)."""

SURPRISE = 10.0
"""With a prior, a correction is halved where the innovation has so many times the mean square that was expected."""


class Draft(NamedTuple):
    """One forecast step: its position (its index), and the transition of the sampler there."""

    position: float
    transition: Transition


Interpolation = Callable[[Sequence[float], Sequence[float]], Sequence[Sequence[float]]]
"""From K steps with known outputs and n target steps to weights (n, K) that estimate the targets' outputs."""


def polynomial(nodes: Sequence[float], targets: Sequence[float]) -> Sequence[Sequence[float]]:
    """Return Lagrange's weights (n, K): those of the polynomial of degree K - 1 through all nodes.

    `F(t) = sum_k F_k prod_{m != k} (t - t_m) / (t_k - t_m)` with K different nodes `t_k`.
    """
    return [
        [math.prod((target - other) / (node - other) for other in nodes if other != node) for node in nodes]
        for target in targets
    ]


def quadrature(
    nodes: Sequence[float], drafts: Sequence[Draft], interpolation: Interpolation = polynomial
) -> tuple[tuple[float, ...], ...]:
    """Return the quadrature weights `omega` (p, K): how much the interpolated drafts change the p samples after them.

    Args:
        nodes: K different steps with known outputs, the newest first.
        drafts: the drafts since the last full step, in order, at least one.
        interpolation: how outputs between the nodes are estimated: by a polynomial or by a prior.
    """
    weights = np.array(interpolation(nodes, [d.position for d in drafts]), dtype=np.float64)
    omega = [np.zeros(len(nodes))] * len(drafts[0].transition.keep)
    for draft, share in zip(drafts, weights, strict=True):
        omega = advance(omega, draft.transition, share)
    return tuple(tuple(o.tolist()) for o in omega)


class Corrector:
    """The outputs of the last full steps of B rows, what their drafts have led to, and their pending corrections.

    A full step is computed at the sample that the drafts have led to, not at the corrected one. So its output, as it
    is kept for later forecasts, is changed by `jacobian * d`. On the straight path `y = x / n` of a flow the velocity
    hardly depends on small changes of the sample (measured, docs/LOG.md); for any other path the same assumption gives
    `jacobian = (A + B) / n` for an output `A noise + B x_0`, which is zero for a flow. With it the correction is that
    of the implicit method, `d = (sum_q omega_q V_q - drift) / (1 - omega_0 jacobian)`.

    Without a prior a correction may be wrong. Whether it is shows at the full step itself, by the innovation: the
    output less what would have been forecast for it. Where the forecast was hardly better than repeating the last
    output, outputs do not change in the way that the interpolation assumes, and whole corrections have cost up to 30 dB
    (docs/LOG.md). So each sample's correction of root mean square r is multiplied by

        1 / (1 + (|v - forecast| / |v - last|)^4)    and by    1 / (1 + (r / trust)^2),

    as a large estimate is mostly error of the estimate. Corrections by a prior are taken whole (`trust` infinite).

    Outputs come rows first, (n, ...). Everything is kept in fp32 and freed with the object.
    """

    def __init__(self, depth: int, rows: int, memory: int) -> None:
        """Keep the outputs of `depth` full steps for each of `rows` rows, for a sampler with memory p = `memory`;
        with 0 nothing is corrected and outputs are only kept."""
        self.memory = memory
        self.history = History(depth, rows, torch.float32)
        self.gain: Tensor | None = None  # (B,) by which forecasts leave the last output; None if nothing is corrected
        self.drafts: list[list[Draft]] = [[] for _ in range(rows)]  # since each row's last full step
        # p tensors (B, ...): how much those drafts have changed the samples from here on, and corrections of these
        # samples that are not applied yet.
        self._drift: list[Tensor] = []
        self._pending: list[Tensor] = []

    def forecast(self, rows: Sequence[int], weights: Sequence[Sequence[float]]) -> Tensor:
        """Return the forecasts (n, ...) from the kept outputs: the newest one, plus what the weighted sums differ from
        it times the gain of each row.

        Args:
            rows: n rows.
            weights: (n, K), newest full step first.
        """
        found = self._sum(rows, weights)
        if self.gain is None:
            return found
        gain = self._of([self.gain], rows)[0].view(-1, *[1] * (found.dim() - 1))
        return torch.lerp(self._sum(rows, [[1.0]] * len(rows)), found, gain)

    def _sum(self, rows: Sequence[int], weights: Sequence[Sequence[float]]) -> Tensor:
        return self.history.forecast(rows, weights)[0]

    def add_draft(self, rows: Sequence[int], output: Tensor, position: float, transition: Transition) -> None:
        """Record that `rows` used the forecast `output` (n, ...) at the step of index `position`."""
        self._put(self._drift, rows, advance(self._of(self._drift, rows), transition, output.float()))
        for row in rows:
            self.drafts[row].append(Draft(position, transition))

    def correction(
        self,
        rows: Sequence[int],
        output: Tensor,
        omega: Sequence[Sequence[Sequence[float]]],
        here: Transition,
        surprise: Tensor,
        expected: Sequence[float | None],
    ) -> tuple[list[Tensor], Tensor]:
        """Return the correction of rows that have drafted, now that `output` (n, ...) of a full step is known.

        Args:
            rows: n rows.
            output: as the model gave it.
            omega: the quadrature weights (p, K) of each row: of `output`, then of its kept outputs.
            here: the transition of the full step.
            surprise: (n,) what `observe` has returned.
            expected: (n,) mean square of the innovation that a prior expects, None for rows without a prior.

        Returns:
            The corrections of this sample and of the p - 1 after it, p tensors (n, ...) in fp32, and the estimated
            errors of the drafts (n,): root mean squares of the whole corrections, in units of the straight path.
        """
        known, moves, newest = output.float(), [], []
        for later, drift in enumerate(self._of(self._drift, rows)):
            newest.append(_column([o[later][0] for o in omega], output))
            older = self._sum(rows, [o[later][1:] for o in omega])
            moves.append((known * newest[-1]).add_(older).sub_(drift))
        # The output answers to the corrected sample, which changes the correction again: solved for, not iterated.
        answer = moves[0] * here.jacobian / (1 - newest[0] * here.jacobian)
        moves = [move + answer * new for move, new in zip(moves, newest, strict=True)]
        size = moves[0].flatten(1).square().mean(1).sqrt() / here.size
        trust = self.trust(size, surprise, expected).view(-1, *[1] * (output.dim() - 1))
        return [move * trust for move in moves], size

    def observe(
        self,
        rows: Sequence[int],
        output: Tensor,
        weights: Sequence[Sequence[float]],
        expected: Sequence[float | None],
        together: Sequence[Sequence[int]],
    ) -> Tensor:
        """Compare the output (n, ...) of a full step with its forecast: update the gain, and return the surprise.

        On the line from the last output to the forecast, the point nearest to the output says how far forecasts should
        go: where outputs turn, or answer to the errors of the drafts, forecasts that go all the way do harm. The gain
        of a row goes half the way to that.

        Args:
            rows: n rows.
            output: as the model gave it.
            weights: (n, K) those that would have forecast `output` from the kept outputs.
            expected: (n,) mean square of the innovation that a prior expects, None for rows without a prior.
            together: for each of the n rows, which of them belong to the same sample, so that they have one gain.

        Returns:
            The surprise (n,): the mean square of the innovation over the expected one; of rows without a prior over
            that of repeating the last output. About 1 if outputs change as the prior says, 0 if exactly forecast.
        """
        known, last = output.float(), self._sum(rows, [[1.0]] * len(rows))
        change, wanted = (self._sum(rows, weights) - last).flatten(1), (known - last).flatten(1)
        missed = (known - self.forecast(rows, weights)).flatten(1).square().mean(1)
        share = (change * wanted).sum(1) / change.square().sum(1).clamp(min=1e-30)
        share = share.nan_to_num(0.0).clamp(0, 1)[on_device(together, output.device)].amin(1)
        assert self.gain is not None  # a full step came before the drafts
        gains = [self.gain]
        self._put(gains, rows, [torch.lerp(self._of(gains, rows)[0], share, ADAPT)])
        self.gain = gains[0]
        moved = wanted.square().mean(1)
        if all(e is None for e in expected):
            return missed / moved.clamp(min=1e-30)
        prior = on_device([math.nan if e is None else e for e in expected], output.device, torch.float32)
        return missed / torch.where(prior.isnan(), moved, prior).clamp(min=1e-30)

    @staticmethod
    def trust(size: Tensor, surprise: Tensor, expected: Sequence[float | None]) -> Tensor:
        """Return by how much to shorten corrections, (n,) in [0, 1]: those that the innovation speaks against, and
        without a prior large ones."""
        limits = [[1.0, TRUST] if e is None else [SURPRISE, math.inf] for e in expected]
        limit = on_device(limits, size.device, torch.float32)
        return 1 / (1 + (surprise / limit[:, 0]).square()) / (1 + (size / limit[:, 1]).square())

    def add_pending(self, rows: Sequence[int], corrections: Sequence[Tensor]) -> None:
        """Note that the samples of `rows` are to be changed by `corrections`, p tensors (n, ...)."""
        if not self._pending:
            self._pending = [torch.zeros_like(drift) for drift in self._drift]
        index = on_device(list(rows), corrections[0].device)
        for pending, correction in zip(self._pending, corrections, strict=True):
            pending.index_add_(0, index, correction)

    def take(self, rows: Sequence[int], here: Transition) -> Tensor | None:
        """Return what to add (n, ...) to the outputs of this step so that the next samples are corrected.

        None if nothing is pending. A step whose output is inert cannot carry a correction; it stays pending.
        """
        if not self._pending:
            return None
        due = advance(self._of(self._pending, rows), here)
        taken = torch.zeros_like(due[0]) if here.inert else due[0] / here.effect[0]
        if len(due) == 1:  # without memory everything is applied at once
            self._pending = []
        else:
            left = [d - effect * taken for d, effect in zip(due, here.effect, strict=True)]
            self._put(self._pending, rows, left)
        return taken

    def add_full(self, rows: Sequence[int], output: Tensor, change: Tensor | None = None) -> None:
        """Keep `output` (n, ...) of a full step, plus `change`, as the newest of `rows`; their drafts begin anew."""
        self.history.push(rows, [output.float() if change is None else output.float() + change])
        if not self._drift:
            if self.memory:
                self.gain = torch.ones(len(self.drafts), device=output.device)
            shape = (len(self.drafts), *output.shape[1:])
            self._drift = [output.new_zeros(shape, dtype=torch.float32) for _ in range(self.memory)]
        else:
            nothing = output.new_zeros((len(rows), *output.shape[1:]), dtype=torch.float32)
            self._put(self._drift, rows, [nothing.clone() for _ in self._drift])
        for row in rows:
            self.drafts[row] = []

    def _of(self, whole: list[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """The parts (n, ...) of some rows."""
        if len(rows) == len(self.drafts):
            return whole
        index = on_device(list(rows), whole[0].device)
        return [tensor.index_select(0, index) for tensor in whole]

    def _put(self, whole: list[Tensor], rows: Sequence[int], parts: list[Tensor]) -> None:
        """Replace the parts (n, ...) of some rows."""
        if len(rows) == len(self.drafts):
            whole[:] = parts
            return
        index = on_device(list(rows), parts[0].device)
        for tensor, part in zip(whole, parts, strict=True):
            tensor.index_copy_(0, index, part)

    def bytes(self) -> int:
        """Return the bytes held, all rows together."""
        gain = [] if self.gain is None else [self.gain]
        sums = (t.numel() * t.element_size() for t in (*self._drift, *self._pending, *gain))
        return self.history.bytes() + sum(sums)


def _column(values: list[float], like: Tensor) -> Any:
    """The numbers (n,) of n rows, to be multiplied with `like` (n, ...): one number if all are equal."""
    if all(value == values[0] for value in values):
        return values[0]
    return on_device(values, like.device, torch.float32).view(-1, *[1] * (like.dim() - 1))
