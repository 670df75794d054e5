"""The corrector: a full step tells what the drafts before it should have been, and the sample is moved accordingly.

A linear sampler sums what it is given: the sample at step i holds the model's output of step j with a weight `W_ij`.
Drafts used a forecast `v_j`, extrapolated from anchors before them. Once step i is computed in full, the polynomial
through its output and those anchors *interpolates* the drafts, one degree higher than they were forecast with. With
Lagrange's polynomials `l_q`, the outputs `V_q` of the full steps and j over the drafts since the last one, it is worth

    d = sum_j W_ij (sum_q l_q(t_j) V_q - v_j) = sum_q omega_q V_q - drift

to the sample at step i. The model is not evaluated for it: so work predictor-corrector methods (Adams-Moulton; for
diffusion samplers UniPC, arXiv:2302.04867).

The move is handed over in the output, so no pipeline has to change. A one-step sampler `x' = a_i x + b_i v` (flow
Euler, DDIM, DDPM but for its noise) has `a_i (x + d) + b_i v = a_i x + b_i (v + d a_i / b_i)`. A multistep sampler
(DPM-Solver++, UniPC, DEIS) mixes in what it was given at p - 1 steps before. There a move is p numbers: what it is
worth to `x_i` and, left alone, to the p - 1 samples after it, which fixes all later ones. What is handed over at one
step is remembered, so part of it has to be taken back at the next one, and so on, less each time: a debt that is paid
at every step (`Corrector.pay`). So each sample is what it would be, had the drafts been what they are now taken to
have been.

All is linear in the outputs, so guidance that mixes branches linearly mixes their moves, and a constant factor or sign
that a pipeline puts on the model's output cancels. The size of `d` is Milne's estimate of the error that drafts made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .forecast import newton
from .history import History, table

Value = TypeVar("Value", float, np.ndarray[Any, np.dtype[np.float64]], Tensor)

STILL = 1e-6
"""An output that is worth less than this to the next sample, per unit, does not move it."""

TRUST = 0.05
"""A correction as large as this, per element and in units of the straight path, is taken by half."""


class Transition(NamedTuple):
    """One step of a linear sampler that remembers the outputs of p - 1 steps before it; p = 1 for one that does not.

    What an output is off by changes samples after it. Of such a change the p numbers that it is worth to this step's
    sample and to the p - 1 samples after it say all; `advance` takes them one step further.

    Attributes:
        keep: (p,) the sample after those p, as a sum of them. `x' = keep * x + move * out` for p = 1.
        move: (p,) what one unit of this step's output is worth to the p samples after it.
        pull: how much the output changes with the sample, `d out = pull * dx`, see `Corrector`.
        size: `n = p + q` of the path `x = p x_0 + q noise` at this step; the straight path is `x / n`.
        signal: `p` of it.
        made: `(A, B)` of what an output is made of, `A noise + B x_0`.
        noisy: whether the sampler adds noise on its way.
    """

    keep: tuple[float, ...]
    move: tuple[float, ...]
    pull: float = 0.0
    size: float = 1.0
    signal: float = 1.0
    made: tuple[float, float] = (0.0, 0.0)
    noisy: bool = False

    @property
    def still(self) -> bool:
        """Whether the output hardly moves the next sample, as at the last step of some schedules."""
        return abs(self.move[0]) < STILL


def advance(change: Sequence[Value], step: Transition, out: Any = 0.0) -> list[Value]:
    """The change of the p samples from the next step on, given that of those from this `step` on, and of its output.

    Values are numbers, arrays or tensors of one shape.
    """
    last = step.keep[0] * change[0]
    for keep, later in zip(step.keep[1:], change[1:], strict=True):
        last = last + keep * later
    return [c + m * out for c, m in zip([*change[1:], last], step.move, strict=True)]


class Draft(NamedTuple):
    """One drafted step: where it stands, on the axis that anchors are spaced by, and what the sampler did at it."""

    position: float
    transition: Transition


Rule = Callable[[Sequence[float], Sequence[float]], Sequence[Sequence[float]]]
"""From K nodes and n targets to the weights (n, K) that estimate outputs at the targets from those at the nodes."""


def polynomial(nodes: Sequence[float], targets: Sequence[float]) -> Sequence[Sequence[float]]:
    """Lagrange's weights: those of the polynomial through all nodes."""
    grid = torch.tensor([list(nodes)] * len(targets), dtype=torch.float64)
    count = torch.full((len(targets),), len(nodes))
    shares: list[list[float]] = newton(grid, count, torch.tensor(targets, dtype=torch.float64), len(nodes) - 1).tolist()
    return shares


def quadrature(
    nodes: Sequence[float], drafts: Sequence[Draft], rule: Rule = polynomial
) -> tuple[tuple[float, ...], ...]:
    """The weights `omega` (p, K) of the outputs at `nodes` in what drafts are worth to the p samples after the last.

    Args:
        nodes: positions of K full steps, the newest first; all different.
        drafts: the n drafts, in order, one at least.
        rule: how outputs between the nodes are estimated: by a polynomial, or by a prior.
    """
    shares = np.array(rule(nodes, [d.position for d in drafts]), dtype=np.float64)
    omega = [np.zeros(len(nodes))] * len(drafts[0].transition.keep)
    for draft, share in zip(drafts, shares, strict=True):
        omega = advance(omega, draft.transition, share)
    return tuple(tuple(o.tolist()) for o in omega)


class Corrector:
    """What rows have drafted since their last full step, and the outputs of their last full steps.

    A full step is computed where the drafts have led to, not where the sample is moved to, so its output as an anchor
    is off by about `pull * d`. On the straight path `y = x / n` of a flow the velocity hardly depends on small changes
    of the sample (measured, docs/LOG.md); any other path has it so with `pull = (A + B) / n` of an output made of
    `A noise + B x_0`, zero for a flow; `(n'/n - a) / b` of a one-step sampler.
    With it the move is that of the implicit corrector, `d = (sum_q omega_q V_q - drift) / (1 - omega_0 pull)`, and
    anchors are taken to where they belong; drafts, whose features are what they were, get the difference added.

    How far to go is a matter of trust: a large estimate is mostly of its own error. A move of root mean square r, in
    units of the straight path, is shortened by `1 / (1 + (r / trust)^2)`; a prior's estimates are trusted.

    Outputs come rows first, `(n, ...)`. Sums are kept in fp32, buffers are freed with the object.
    """

    def __init__(self, depth: int, rows: int, trust: float | None = None, memory: int | None = None) -> None:
        """Keep the outputs of `depth` full steps of each of `rows` rows; with an infinite `trust` moves are whole.

        `memory` is the p of the sampler, so that what drafts are worth has its place, and its bytes, from the start.
        """
        self.trust, self.memory = TRUST if trust is None else trust, memory
        self.history = History(depth, rows)  # streams: outputs where the sample was moved to, and how much they changed
        self.drafts: list[list[Draft]] = [[] for _ in range(rows)]  # since each row's last full step
        self._drift: Tensor | None = None  # (p, B, ...) what those drafts are worth to the samples from here on
        self._owed: Tensor | None = None  # (p, B, ...) what samples from here on lack of what they are taken to be

    def draft(self, rows: Sequence[int], out: Tensor, position: float, transition: Transition) -> None:
        """Rows took the draft `out` (n, ...) of the step at `position`."""
        if self._drift is None:
            self._drift = self._nothing(len(transition.keep), out)
        index = table(list(rows), out.device)
        drift = advance(list(self._drift.index_select(1, index)), transition, out.float())
        self._drift.index_copy_(1, index, torch.stack(drift))
        for row in rows:
            self.drafts[row].append(Draft(position, transition))

    def pulled(self, rows: Sequence[int], weights: Tensor) -> Tensor:
        """What a forecast with `weights` (n, K) lacks, as its anchors were computed where the sample no longer is."""
        return self.history.forecast(rows, weights)[1]

    def move(
        self, rows: Sequence[int], out: Tensor, omega: Sequence[Sequence[Sequence[float]]], here: Transition
    ) -> tuple[list[Tensor], Tensor]:
        """How far rows that have drafted are to be moved, now that `out` (n, ...) of a full step is known.

        Args:
            omega: the weights (p, K) of each row, see `quadrature`: that of `out`, then those of its kept outputs.
            here: the transition of the full step.

        Returns:
            The moves of the sample here and of the p - 1 samples after it, p times (n, ...) in fp32, and the estimated
            errors (n,): root mean squares of the full moves here, in units of the straight path.
        """
        assert self._drift is not None
        index = table(list(rows), out.device)
        width = 1 + self.history.depth
        weights = torch.tensor([[[*o, *[0.0] * (width - len(o))] for o in row] for row in omega], dtype=torch.float64)
        newest = table(weights[:, :, 0], out.device, torch.float32).view(*weights.shape[:2], *[1] * (out.dim() - 1))
        told, moves = out.float(), []
        for later, drift in enumerate(self._drift.index_select(1, index)):
            older = self.history.forecast(rows, weights[:, later, 1:])[0]
            moves.append((told * newest[:, later]).add_(older).sub_(drift))
        answer = moves[0] * here.pull / (1 - newest[:, 0] * here.pull)  # of the output, once the sample is moved
        moves = [move + answer * new for move, new in zip(moves, newest.unbind(1), strict=True)]
        size = moves[0].flatten(1).square().mean(1).sqrt() / here.size
        trust = (1 / (1 + (size / self.trust).square())).view(newest[:, 0].shape)
        return [move * trust for move in moves], size

    def owe(self, rows: Sequence[int], moves: Sequence[Tensor]) -> None:
        """Note that samples of `rows` are to be moved, p times (n, ...)."""
        index = table(list(rows), moves[0].device)
        if self._owed is None:
            assert self._drift is not None
            self._owed = torch.zeros_like(self._drift)
        self._owed.index_add_(1, index, torch.stack(list(moves)))

    def pay(self, rows: Sequence[int], here: Transition) -> Tensor | None:
        """What to hand over (n, ...) besides the outputs of this step, so that the next sample is what it should be.

        None where nothing is owed. A step that is `still` cannot pay.
        """
        if self._owed is None:
            return None
        index = table(list(rows), self._owed.device)
        due = advance(list(self._owed.index_select(1, index)), here)
        paid = torch.zeros_like(due[0]) if here.still else due[0] / here.move[0]
        if len(due) == 1:  # without memory all is paid at once
            self._owed = None
        else:
            left = [d - m * paid for d, m in zip(due, here.move, strict=True)]
            self._owed.index_copy_(1, index, torch.stack(left))
        return paid

    def anchor(self, rows: Sequence[int], out: Tensor, change: Tensor) -> None:
        """Rows were computed in full: keep `out` (n, ...), changed by `change`, and begin a new draft."""
        self.history.push(rows, [out.float() + change, change])
        if self._drift is None and self.memory is not None:
            self._drift = self._nothing(self.memory, out)
        elif self._drift is not None:
            self._drift.index_fill_(1, table(list(rows), out.device), 0.0)
        for row in rows:
            self.drafts[row] = []

    def _nothing(self, memory: int, out: Tensor) -> Tensor:
        return out.new_zeros((memory, len(self.drafts), *out.shape[1:]), dtype=torch.float32)

    def bytes(self) -> int:
        """Bytes held, all rows together."""
        sums = [t.numel() * t.element_size() for t in (self._drift, self._owed) if t is not None]
        return self.history.bytes() + sum(sums)
