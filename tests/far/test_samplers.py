"""What a scheduler does is found whichever device it was set up for."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from far import device
from sampler.test_multistep import SAMPLERS
from speca.sampler import scheduler as module
from speca.sampler.scheduler import scheduler_response

ALL: dict[str, tuple[str, dict[str, Any]]] = {
    **{case: (name, config) for case, (name, config, _) in SAMPLERS.items()},
    "Euler, flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "Euler, shifted flow": ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0)),
    "Euler": ("EulerDiscreteScheduler", {}),
    "DDPM": ("DDPMScheduler", dict(clip_sample=False)),
    "LCM, flow": ("FlowMatchLCMScheduler", {}),
    "CogVideoX": ("CogVideoXDDIMScheduler", {}),
}


@pytest.mark.parametrize("case", ALL)
def test_it_is_found_as_on_the_cpu(case: str) -> None:
    name, config = ALL[case]
    found = []
    for place in ("cpu", "far"):
        module._found.cache_clear()
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(12, device=torch.device(place))
        found.append(scheduler_response(scheduler))
    assert isinstance(scheduler.timesteps, device.Far)
    assert found[0] == found[1]
