"""Errors of a forecast feature against the computed one, one number per row, accumulated in fp32.

All share one signature: `forecast (B, ...), real (B, ...) -> (B,)`, zero for a perfect forecast. They are ratios
of norms; the mean of element-wise ratios that the authors' code uses diverges where an element is near zero and
is kept only to reproduce it.

If a feature is sharded over several devices, a ratio of a shard is not the ratio of the feature. Each error therefore
computes sums or maxima of its shard, combines them over the devices with `total`, and divides last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, nearest

Total = Callable[[Tensor, Literal["sum", "max"]], Tensor]
TINY = 1e-10


class ErrorFunction(Protocol):
    """Return one number per row. `total` combines the parts (P, B) of this device's shard with those of the others."""

    def __call__(self, forecast: Tensor, real: Tensor, total: Total = ..., /) -> Tensor: ...


def whole(parts: Tensor, how: Literal["sum", "max"]) -> Tensor:
    """Return the parts unchanged, for features on one device."""
    return parts


def relative_l2(forecast: Tensor, real: Tensor, total: Total = whole) -> Tensor:
    """`||F_pred - F||_2 / ||F||_2` (SpeCa, arXiv:2509.11628, verification error)."""
    forecast, real = _flat(forecast), _flat(real)
    norms = torch.stack([(forecast - real).norm(dim=1), real.norm(dim=1)])
    gap, size = total(norms.square(), "sum").sqrt().unbind()  # on one device this is the norm itself
    return gap / size.clamp_min(TINY)


def relative_l1(forecast: Tensor, real: Tensor, total: Total = whole) -> Tensor:
    """`||F_pred - F||_1 / ||F||_1`."""
    forecast, real = _flat(forecast), _flat(real)
    gap, size = total(torch.stack([(forecast - real).abs().sum(1), real.abs().sum(1)]), "sum").unbind()
    return gap / size.clamp_min(TINY)


def linf(forecast: Tensor, real: Tensor, total: Total = whole) -> Tensor:
    """`||F_pred - F||_inf / ||F||_inf`."""
    forecast, real = _flat(forecast), _flat(real)
    gap, size = total(torch.stack([(forecast - real).abs().amax(1), real.abs().amax(1)]), "max").unbind()
    return gap / size.clamp_min(TINY)


def cosine(forecast: Tensor, real: Tensor, total: Total = whole) -> Tensor:
    """`1 - cos(F_pred, F)`, in [0, 2]; blind to a wrong length."""
    forecast, real = _flat(forecast), _flat(real)
    products = [(forecast * real).sum(1), forecast.norm(dim=1).square(), real.norm(dim=1).square()]
    dot, one, other = total(torch.stack(products), "sum").unbind()
    return 1 - dot / (one.sqrt() * other.sqrt()).clamp_min(TINY)


def elementwise_l1(forecast: Tensor, real: Tensor, total: Total = whole) -> Tensor:
    """`mean(|F_pred - F| / (|F| + eps))`: the default of the authors' released code, for comparison only."""
    forecast, real = _flat(forecast), _flat(real)
    ratios = ((forecast - real).abs() / (real.abs() + TINY)).sum(1)
    added, count = total(torch.stack([ratios, torch.full_like(ratios, forecast.shape[1])]), "sum").unbind()
    return added / count


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1).float()


ERRORS: dict[str, ErrorFunction] = {
    "relative_l2": relative_l2,
    "relative_l1": relative_l1,
    "linf": linf,
    "cosine": cosine,
    "elementwise_l1": elementwise_l1,
}


def error_function(name: str) -> ErrorFunction:
    """Return the error called `name`.

    Raises:
        ConfigError: no such error; the nearest valid name is given.
    """
    if name not in ERRORS:
        raise ConfigError(f"unknown error {name!r}; {nearest(name, ERRORS)}")
    return ERRORS[name]
