"""The corrector: a full step tells what the drafts before it should have been, and the sample is moved accordingly.

A one-step linear sampler maps the sample `x` and the model's output `v` of step j to `x' = a_j x + b_j v` (flow Euler,
DDIM, DDPM but for its noise). Drafts used a forecast `v_j`, extrapolated from anchors before them. Once step i is
computed in full, the polynomial through its output and those anchors *interpolates* the drafts, one degree higher than
they were forecast with. With `A_j = a_{j+1} ... a_{i-1}`, what the difference is worth to `x_i` is

    d = sum_j A_j b_j (sum_q l_q(t_j) V_q - v_j) = sum_q omega_q V_q - drift

where `V_q` are the outputs of the full steps, `l_q` Lagrange's polynomials and j runs over the drafts since the last
full step. The model is not evaluated for it: so work predictor-corrector methods (Adams-Moulton; for diffusion
samplers UniPC, arXiv:2302.04867). As the sampler is linear, the move can be handed over in the output:
`a_i (x + d) + b_i v = a_i x + b_i (v + d a_i / b_i)`, so no pipeline has to change. It is linear in the outputs too,
so guidance that mixes branches linearly mixes their moves, and a constant factor or sign that a pipeline puts on the
model's output cancels. The size of `d` is Milne's estimate of the error that the drafts had made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .forecast import newton
from .history import History

TRUST = 0.05
"""A correction as large as this, per element and in units of the straight path, is taken by half."""


class Transition(NamedTuple):
    """One step of a linear sampler.

    Attributes:
        keep, move: `x' = keep * x + move * out`.
        pull: how much the output changes with the sample, `d out = pull * dx`, see `Corrector`.
        size: `n = p + q` of the path `x = p x_0 + q noise` at this step; the straight path is `x / n`.
        signal: `p` of it.
    """

    keep: float
    move: float
    pull: float = 0.0
    size: float = 1.0
    signal: float = 1.0


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


def quadrature(nodes: Sequence[float], drafts: Sequence[Draft], rule: Rule = polynomial) -> tuple[float, ...]:
    """The weights `omega` (K,) of the outputs at `nodes` in what the drafts are worth to the sample after the last one.

    Args:
        nodes: positions of K full steps, the newest first; all different.
        drafts: the n drafts, in order.
        rule: how outputs between the nodes are estimated: by a polynomial, or by a prior.
    """
    omega = [0.0] * len(nodes)
    for draft, share in zip(drafts, rule(nodes, [d.position for d in drafts]), strict=True):
        keep, move = draft.transition[:2]
        omega = [keep * o + move * s for o, s in zip(omega, share, strict=True)]
    return tuple(omega)


class Corrector:
    """What rows have drafted since their last full step, and the outputs of their last full steps.

    A full step is computed where the drafts have led to, not where the sample is moved to, so its output as an anchor
    is off by about `pull * d`. On the straight path `y = x / n` of a flow the velocity hardly depends on small changes
    of the sample (measured, docs/LOG.md); any other path has it so with `pull = (n'/n - a) / b`, zero for a flow.
    With it the move is that of the implicit corrector, `d = (sum_q omega_q V_q - drift) / (1 - omega_0 pull)`, and
    anchors are taken to where they belong; drafts, whose features are what they were, get the difference added.

    How far to go is a matter of trust: a large estimate is mostly of its own error. A move of root mean square r, in
    units of the straight path, is shortened by `1 / (1 + (r / trust)^2)`; a prior's estimates are trusted.

    Outputs come rows first, `(n, ...)`. Sums are kept in fp32, buffers are freed with the object.
    """

    def __init__(self, depth: int, rows: int, trust: float | None = None) -> None:
        """Keep the outputs of `depth` full steps of each of `rows` rows; with an infinite `trust` moves are whole."""
        self.trust = TRUST if trust is None else trust
        self.history = History(depth, rows)  # streams: outputs where the sample was moved to, and how much they changed
        self.drafts: list[list[Draft]] = [[] for _ in range(rows)]  # since each row's last full step
        self._drift: Tensor | None = None  # (B, ...) what those drafts have added to the sample

    def draft(self, rows: Sequence[int], out: Tensor, position: float, transition: Transition) -> None:
        """Rows took the draft `out` (n, ...) of the step at `position`."""
        if self._drift is None:
            self._drift = out.new_zeros((len(self.drafts), *out.shape[1:]), dtype=torch.float32)
        index = torch.tensor(list(rows), device=out.device)
        drift = self._drift.index_select(0, index).mul_(transition.keep).add_(out.float(), alpha=transition.move)
        self._drift.index_copy_(0, index, drift)
        for row in rows:
            self.drafts[row].append(Draft(position, transition))

    def pulled(self, rows: Sequence[int], weights: Tensor) -> Tensor:
        """What a forecast with `weights` (n, K) lacks, as its anchors were computed where the sample no longer is."""
        return self.history.forecast(rows, weights)[1]

    def move(
        self, rows: Sequence[int], out: Tensor, omega: Sequence[Sequence[float]], here: Transition
    ) -> tuple[Tensor, Tensor]:
        """How far rows that have drafted are to be moved, now that `out` (n, ...) of a full step is known.

        Args:
            omega: the weights of each row, see `quadrature`: first that of `out`, then those of its kept outputs.
            here: the transition of the full step.

        Returns:
            The moves (n, ...) in fp32, and the estimated errors (n,): root mean squares of the full moves in units of
            the straight path.
        """
        assert self._drift is not None
        index = torch.tensor(list(rows), device=out.device)
        weights = torch.tensor([[*o, *[0.0] * (1 + self.history.depth - len(o))] for o in omega], dtype=torch.float64)
        newest = weights[:, 0].to(out.device, torch.float32).view(-1, *[1] * (out.dim() - 1))
        older = self.history.forecast(rows, weights[:, 1:])[0]
        gap = (out.float() * newest).add_(older).sub_(self._drift.index_select(0, index)).div_(1 - newest * here.pull)
        size = gap.flatten(1).square().mean(1).sqrt() / here.size
        trust = 1 / (1 + (size / self.trust).square())
        return gap * trust.view(newest.shape), size

    def anchor(self, rows: Sequence[int], out: Tensor, change: Tensor) -> None:
        """Rows were computed in full: keep `out` (n, ...), changed by `change`, and begin a new draft."""
        self.history.push(rows, [out.float() + change, change])
        if self._drift is not None:
            self._drift.index_fill_(0, torch.tensor(list(rows), device=out.device), 0.0)
        for row in rows:
            self.drafts[row] = []

    def bytes(self) -> int:
        """Bytes held, all rows together."""
        drift = 0 if self._drift is None else self._drift.numel() * self._drift.element_size()
        return self.history.bytes() + drift
