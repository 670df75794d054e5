"""Errors: how far a forecast feature is from the real one, one number per row, accumulated in fp32.

All share one signature: `forecast (B, ...), real (B, ...) -> (B,)`, zero for a perfect forecast. They are ratios
of norms; the mean of element-wise ratios that the authors' code uses diverges where an element is near zero and
is kept only to reproduce it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError, nearest

ErrorFunction = Callable[[Tensor, Tensor], Tensor]
TINY = 1e-10


def relative_l2(forecast: Tensor, real: Tensor) -> Tensor:
    """`||F_pred - F||_2 / ||F||_2` (SpeCa, arXiv:2509.11628, verification error)."""
    forecast, real = _flat(forecast), _flat(real)
    ratio: Tensor = (forecast - real).norm(dim=1) / real.norm(dim=1).clamp_min(TINY)
    return ratio


def relative_l1(forecast: Tensor, real: Tensor) -> Tensor:
    """`||F_pred - F||_1 / ||F||_1`."""
    forecast, real = _flat(forecast), _flat(real)
    return (forecast - real).abs().sum(1) / real.abs().sum(1).clamp_min(TINY)


def linf(forecast: Tensor, real: Tensor) -> Tensor:
    """`||F_pred - F||_inf / ||F||_inf`."""
    forecast, real = _flat(forecast), _flat(real)
    return (forecast - real).abs().amax(1) / real.abs().amax(1).clamp_min(TINY)


def cosine(forecast: Tensor, real: Tensor) -> Tensor:
    """`1 - cos(F_pred, F)`, in [0, 2]; blind to a wrong length."""
    forecast, real = _flat(forecast), _flat(real)
    return 1 - torch.nn.functional.cosine_similarity(forecast, real, dim=1, eps=TINY)


def elementwise_l1(forecast: Tensor, real: Tensor) -> Tensor:
    """`mean(|F_pred - F| / (|F| + eps))`: the default of the authors' released code, for comparison only."""
    forecast, real = _flat(forecast), _flat(real)
    return ((forecast - real).abs() / (real.abs() + TINY)).mean(1)


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
    """The error called `name`.

    Raises:
        ConfigError: no such error; the nearest valid name is given.
    """
    if name not in ERRORS:
        raise ConfigError(f"unknown error {name!r}; {nearest(name, ERRORS)}")
    return ERRORS[name]
