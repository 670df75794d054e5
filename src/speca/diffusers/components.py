"""Which components of a pipeline are denoising models, and which only prepare what they are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..denoiser.arguments import argument, time_name
from ..errors import UnsupportedModelError
from .companions import bare

NAMES = ("transformer", "unet")
"""Parts of the names of components that are denoising models in any case."""
OTHER_NAMES = ("prior", "decoder", "denoiser", "dit", "model")
"""Names of components that are denoising models if their forward takes a time."""


def denoisers_of(target: Any) -> list[nn.Module]:
    """Return the denoising models of a pipeline, or the model itself.

    Raises:
        UnsupportedModelError: there is none.
    """
    if isinstance(target, nn.Module):
        return [target]
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise UnsupportedModelError(
            f"expected a diffusers pipeline or a denoising model (a torch module), got {type(target).__name__}."
        )
    found = [model for name, model in components.items() if isinstance(model, nn.Module) and _denoises(name, model)]
    if not found:
        raise UnsupportedModelError(
            f"{type(target).__name__} has no denoising model: none of its components ({', '.join(components)}) is a "
            "transformer or a U-Net."
        )
    return found


def _denoises(name: str, model: nn.Module) -> bool:
    if any(part in name for part in NAMES):
        return True
    return name in OTHER_NAMES and time_name(inspect.signature(type(bare(model)).forward).parameters) is not None


def controlnets_of(target: Any) -> list[nn.Module]:
    """Return the ControlNets of a pipeline, which run before its denoising model at each step."""
    components = getattr(target, "components", None)
    if isinstance(target, nn.Module) or not isinstance(components, dict):
        return []
    return [m for name, m in components.items() if name.startswith("controlnet") and isinstance(m, nn.Module)]


def time_of_call(model: nn.Module) -> Callable[..., Any]:
    """Return a function from the arguments of a call of the model to the time among them."""
    signature = inspect.signature(type(model).forward)

    def time(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(model, *args, **kwargs).arguments
        return argument(bound, time_name(bound))

    return time
