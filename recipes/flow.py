"""What the text-conditioned recipes share: the flow objective and the distillation of guidance.

Rectified flow (Liu et al. arXiv:2209.03003) with logit-normal times (Esser et al. arXiv:2403.03206); guidance moves
into the guidance input (Meng et al. arXiv:2210.03142). Shapes: latents (B, ...), sigma and guidance (B,), ids (B, L).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import fit

Batch = tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]
"""Noisy latents, sigma, token ids of the captions, and the velocity to learn."""
Batches = Callable[[torch.Generator, float], Batch]
"""Draws a batch in which the given share of the captions is empty."""

UNCONDITIONAL = 0.1  # share of empty captions


def noised(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`x` on its straight way to noise: `(1 - sigma) x + sigma noise`, sigma, and the velocity `noise - x`."""
    noise = torch.randn(x.shape, generator=g)
    sigma = torch.sigmoid(torch.randn(len(x), generator=g))
    s = sigma.view(-1, *[1] * (x.dim() - 1))
    return (1 - s) * x + s * noise, sigma, noise - x


def begin_as_identity(transformer: nn.Module) -> None:
    """adaLN-zero of DiT: every block begins as the identity, the model with output zero."""
    for module in transformer.modules():
        if "AdaLayerNorm" in type(module).__name__:
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


def train_flow(name: str, model: nn.Module, batches: Batches, forward: Callable[..., Tensor], **how: Any) -> None:
    """Mean squared error of the velocity; guidance input 1. `forward` is `model`, or `model` compiled."""

    def loss_of(g: torch.Generator) -> Tensor:
        x, sigma, ids, velocity = batches(g, UNCONDITIONAL)
        return F.mse_loss(forward(x, sigma, torch.ones_like(sigma), *ids).float(), velocity)

    fit(name, model, loss_of, lr=1e-3, **how)


def distil(
    name: str,
    model: Any,
    batches: Batches,
    forward: Callable[..., Tensor],
    scales: tuple[float, float],
    **how: Any,
) -> None:
    """Guidance of a scale drawn from `scales`: v(w) = v_empty + w (v_caption - v_empty), Meng et al., eq. 3 there."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False).to(how["device"])
    empty = [v.to(how["device"]) for v in model.tokens([""])]

    def loss_of(g: torch.Generator) -> Tensor:
        x, sigma, ids, _ = batches(g, 0.0)
        w = torch.empty(len(x)).uniform_(*scales, generator=g).to(x.device)
        with torch.no_grad():
            both = [torch.cat([given, none.expand_as(given)]) for given, none in zip(ids, empty, strict=True)]
            twice = x.repeat(2, *[1] * (x.dim() - 1))
            given, free = teacher(twice, sigma.repeat(2), torch.ones_like(w).repeat(2), *both).float().chunk(2)
            target = free + w.view(-1, *[1] * (x.dim() - 1)) * (given - free)
        return F.mse_loss(forward(x, sigma, w, *ids).float(), target)

    fit(name, model, loss_of, lr=5e-4, **how)
