"""Forecasters: functions from anchor positions and a target position to weights.

A forecast is one weighted sum of the kept features, `F(target) = sum_k w[:, k] * F_k`, whatever the method.
All forecasters share one signature, shapes (B rows, K anchors, newest first):

    positions (B, K) float64, count (B,) int64 usable anchors, target (B,) float64, order  ->  weights (B, K) float64

Anchors at or beyond `count[b]` are ignored; a row with fewer than `order + 1` anchors is forecast at the order it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError, nearest

Forecaster = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def reuse(positions: Tensor, count: Tensor, target: Tensor, order: int) -> Tensor:
    """Repeat the newest anchor (order 0): `F(t) = F_0`. The choice of FORA, arXiv:2407.01425."""
    weights = torch.zeros_like(positions)
    weights[:, 0] = 1
    return weights


def taylor(positions: Tensor, count: Tensor, target: Tensor, order: int) -> Tensor:
    """The paper's draft model (TaylorSeer, arXiv:2503.06923): a Taylor sum over backward finite differences.

    `F(t_0 + s) = sum_i D^i F_0 * s^i / i!` with `D^{i+1} F_j = (D^i F_j - D^i F_{j+1}) / (t_j - t_{j+1})`. Each
    difference is divided by the newest gap only, as published; so it is exact on lines, whereas from order 2 on
    even anchors a gap h away from the last one keep the error `h * s / 2 * F''`. Use `newton` to be free of it.
    """
    table = _differences(positions, count, order, divided=False)
    s = target - positions[:, 0]
    return sum((table[i] * (s**i / math.factorial(i)).unsqueeze(1) for i in range(1, len(table))), start=table[0])


def newton(positions: Tensor, count: Tensor, target: Tensor, order: int) -> Tensor:
    """Newton's interpolation polynomial through the anchors, exact on polynomials of degree `order` on any grid.

    `F(t) = sum_i F[t_0..t_i] * prod_{m<i} (t - t_m)` with divided differences
    `F[t_j..t_{j+i+1}] = (F[t_j..t_{j+i}] - F[t_{j+1}..t_{j+i+1}]) / (t_j - t_{j+i+1})`.
    """
    table = _differences(positions, count, order, divided=True)
    weights, product = table[0], torch.ones_like(target)
    for i in range(1, len(table)):
        product = product * (target - positions[:, i - 1])
        weights = weights + table[i] * product.unsqueeze(1)
    return weights


HERMITE_SCALE = 0.5
"""HiCache's contraction factor sigma in (0, 1)."""


def hermite(positions: Tensor, count: Tensor, target: Tensor, order: int) -> Tensor:
    """HiCache (arXiv:2508.16984): the Taylor sum with dual-scaled Hermite polynomials in place of powers.

    `F(t_0 + s) = F_0 + sum_{i>=1} D^i F_0 / i! * He_i(s)`, `He_i(s) = sigma^i H_i(sigma s)`, H_i the physicists'
    polynomials (`H_0 = 1, H_1 = 2x, H_{n+1} = 2x H_n - 2n H_{n-1}`). A contraction, hence not exact on polynomials.
    """
    table = _differences(positions, count, order, divided=False)
    x = HERMITE_SCALE * (target - positions[:, 0])
    weights, before, now = table[0], torch.ones_like(x), 2 * x
    for i in range(1, len(table)):
        weights = weights + table[i] * (HERMITE_SCALE**i / math.factorial(i) * now).unsqueeze(1)
        before, now = now, 2 * x * now - 2 * i * before
    return weights


def _differences(positions: Tensor, count: Tensor, order: int, *, divided: bool) -> list[Tensor]:
    """Weights (B, K) of the 0th, 1st, ... difference at the newest anchor; zero where a row lacks anchors."""
    rows, kept = positions.shape
    level = list(torch.eye(kept, dtype=positions.dtype).expand(rows, kept, kept).unbind(1))
    table = [level[0]]
    for i in range(min(order, kept - 1)):
        gap = [positions[:, j] - positions[:, j + i + 1 if divided else j + 1] for j in range(len(level) - 1)]
        level = [(level[j] - level[j + 1]) / gap[j].unsqueeze(1) for j in range(len(level) - 1)]
        table.append(torch.where((count > i + 1).unsqueeze(1), level[0], 0.0))
    return table


FORECASTERS: dict[str, Forecaster] = {"taylor": taylor, "newton": newton, "hermite": hermite, "reuse": reuse}


def forecaster(name: str) -> Forecaster:
    """The forecaster called `name`.

    Raises:
        ConfigError: no such forecaster; the nearest valid name is given.
    """
    if name not in FORECASTERS:
        raise ConfigError(f"unknown forecaster {name!r}; {nearest(name, FORECASTERS)}")
    return FORECASTERS[name]
