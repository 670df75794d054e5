"""The samplers of k-diffusion (MIT), as functions to be tried. Its package imports much more than they need, so the one
file is loaded alone, with a stand-in for its utilities."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def _load() -> ModuleType:
    found = importlib.util.find_spec("k_diffusion")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion", allow_module_level=True)
    file = Path(next(iter(found.submodule_search_locations))) / "sampling.py"
    package, utils = ModuleType("k_diffusion_alone"), ModuleType("k_diffusion_alone.utils")
    package.__path__ = []  # type: ignore[attr-defined]
    utils.append_dims = lambda x, dims: x[(..., *[None] * (dims - x.ndim))]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules |= {package.__name__: package, utils.__name__: utils}
    spec = importlib.util.spec_from_file_location("k_diffusion_alone.sampling", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sampling = _load()


def _between(name: str, *more: Any) -> Callable[..., torch.Tensor]:
    """A sampler that is told the ends of its schedule and makes the rest itself."""

    def sample(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> torch.Tensor:
        ends = float(sigmas[-2]), float(sigmas[0])
        made: torch.Tensor = getattr(sampling, name)(model, x, *ends, *more, **options)
        return made

    sample.__name__ = name
    return sample


NAMES = (
    "euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral", "dpmpp_sde",
    "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde",
)  # fmt: skip
SAMPLERS: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(sampling, f"sample_{name}") for name in NAMES},
    "dpm_fast": _between("sample_dpm_fast", 20),
    "dpm_adaptive": _between("sample_dpm_adaptive"),
}
MEMORY = {
    "euler": 1, "euler_ancestral": 1, "heun": 2, "dpm_2": 2, "dpm_2_ancestral": 2, "dpm_fast": 2, "dpmpp_2m": 2,
    "dpmpp_2s_ancestral": 2, "dpmpp_sde": 2, "dpmpp_2m_sde": 2, "dpmpp_3m_sde": 3, "lms": 4, "dpm_adaptive": 0,
}  # fmt: skip
"""Outputs that each one uses at a time, 0 for one that is not linear."""
NOISY = {name for name in MEMORY if "ancestral" in name or "sde" in name}
