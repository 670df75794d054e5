"""Every scheduler of diffusers that a transformer can be stepped with: each step placed rightly, exact, finite."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

import speca
import tiny
from speca.diffusers.accelerator import ATTRIBUTE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, inside the schedulers
STEPS = 12
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
KARRAS = dict(use_karras_sigmas=True)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in (
        "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMParallelScheduler", "DDIMScheduler",
        "DDIMInverseScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler", "FlowMapEulerDiscreteScheduler",
        "MiniMaxH3Scheduler",
        "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeunDiscreteScheduler", "IPNDMScheduler",
        "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
        "LTXEulerAncestralRFScheduler", "PNDMScheduler", "SASolverScheduler", "SCMScheduler", "TCDScheduler",
        "UniPCMultistepScheduler",
    )
}  # fmt: skip
SCHEDULERS |= {
    "DDIM, v": ("DDIMScheduler", dict(prediction_type="v_prediction", timestep_spacing="trailing")),
    "DEIS, flow": ("DEISMultistepScheduler", FLOW),
    "DPMSolver, flow": ("DPMSolverMultistepScheduler", FLOW),
    "DPMSolver, Karras": ("DPMSolverMultistepScheduler", KARRAS),
    "DPMSolver, SDE": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
    "Euler, Karras": ("EulerDiscreteScheduler", KARRAS),
    "Euler, linspace": ("EulerDiscreteScheduler", dict(timestep_spacing="linspace")),
    "flow Euler, shift": ("FlowMatchEulerDiscreteScheduler", dict(shift=7.0)),
    "flow Euler, stochastic": ("FlowMatchEulerDiscreteScheduler", dict(stochastic_sampling=True)),
    "Heun, Karras": ("HeunDiscreteScheduler", KARRAS),
    "PNDM, no Runge-Kutta": ("PNDMScheduler", dict(skip_prk_steps=True)),
    "UniPC, flow": ("UniPCMultistepScheduler", FLOW),
}
SECOND_ORDER = {"Heun", "KDPM2"}
ELSEWHERE = {
    # need scipy or torchsde
    "LMSDiscreteScheduler", "CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    # of token models, UNets and proteins
    "AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler",
    "VQDiffusionScheduler", "CMStochasticIterativeScheduler", "DDPMWuerstchenScheduler", "KarrasVeScheduler",
    "RePaintScheduler", "ScoreSdeVeScheduler", "UnCLIPScheduler", "RFD4ProteinaScheduler",
    # of pipelines that denoise in chunks or with a head of their own
    "HeliosDMDScheduler", "HeliosScheduler", "PiflowScheduler",
}  # fmt: skip


def make(name: str) -> Any:
    cls, settings = SCHEDULERS[name]
    return getattr(diffusers, cls)(**settings)


def sample(model: Any, scheduler: Any, scale: float, steps: int = STEPS) -> tuple[torch.Tensor, list[float]]:
    """Two samples of the tiny DiT under `scheduler`, and the times the model was given, times `scale`."""
    several = dict(intermediate_timesteps=None) if isinstance(scheduler, diffusers.SCMScheduler) else {}
    scheduler.set_timesteps(num_inference_steps=steps, **several)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 4, 4, generator=generator)
    times: list[float] = []
    old = None
    called = scheduler.timesteps[:-1] if isinstance(scheduler, diffusers.SCMScheduler) else scheduler.timesteps
    for i, t in enumerate(called):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        times.append(float(t))
        given = (t * scale if scale != 1 else t).expand(2)
        out = model(scaled, timestep=given, class_labels=torch.tensor([1, 7])).sample.chunk(2, dim=1)[0]
        takes = inspect.signature(scheduler.step).parameters
        extra = dict(generator=generator) if "generator" in takes else {}
        if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
            before = called[i - 1] if i else None
            x, old = scheduler.step(0.1 * out, old, t, before, x, return_dict=False, **extra)
        else:
            x = scheduler.step(0.1 * out, t, x, return_dict=False, **extra)[0]
    return x, times


@pytest.mark.parametrize("scale", [1.0, 0.001], ids=["t", "t over T"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_is_placed(name: str, scale: float) -> None:
    model, scheduler = tiny.dit_transformer(), make(name)
    plain, times = sample(model, scheduler, scale)
    assert torch.isfinite(plain).all()
    speca.enable(model, tiny.VERIFYING, scheduler=scheduler, threshold=0.0, min_draft=0)
    seen: list[tuple[int, int]] = []
    drafts = model.__dict__[ATTRIBUTE].drafts
    play = drafts.play
    drafts.play = lambda run, config, branch, step, *rest, **more: (
        seen.append((step, run.total)) or play(run, config, branch, step, *rest, **more)
    )
    exact, _ = sample(model, scheduler, scale)
    assert torch.equal(exact, plain)
    assert seen == [(i, len(times)) for i in range(len(times))]
    branches = model.__dict__[ATTRIBUTE].branches
    assert list(branches) == ["call"], "one call a step is one branch"
    if any(kind in name for kind in SECOND_ORDER):
        assert len(times) == 2 * STEPS - 1 and len(set(times)) > STEPS - 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_drafts_stay_finite(name: str) -> None:
    model, scheduler = tiny.dit_transformer(), make(name)
    speca.enable(model, tiny.VERIFYING, scheduler=scheduler, threshold=1e9, min_draft=0, max_draft=2)
    first, times = sample(model, scheduler, 1.0)
    assert torch.isfinite(first).all()
    report = speca.report(model)
    assert [s.decisions for s in report.samples] == [("FFF" + "AAF" * len(times))[: len(times) - 1] + "F"] * 2
    assert torch.equal(sample(model, scheduler, 1.0)[0], first)


def test_no_scheduler_is_forgotten() -> None:
    known = {cls for cls, _ in SCHEDULERS.values()} | ELSEWHERE
    every = {n for n in dir(diffusers) if n.endswith("Scheduler") and "Flax" not in n}
    assert every - known == set()
