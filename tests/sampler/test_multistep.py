"""Samplers that remember outputs: what is found of them, and that corrections reach them to the last step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import tiny
from speca.config import SpecaConfig
from speca.core.correction import polynomial
from speca.core.transition import Transition, advance
from speca.denoiser import player
from speca.denoiser.run import Run
from speca.sampler import scheduler as module
from speca.sampler.response import Response
from speca.sampler.scheduler import scheduler_response

STEPS = 16
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
SAMPLERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "DDIM": ("DDIMScheduler", dict(clip_sample=False), 1),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}, 2),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", dict(solver_order=3), 3),
    "DPM-Solver++ 2M, flow": ("DPMSolverMultistepScheduler", FLOW, 2),
    "DPM-Solver++ 2M, Karras": ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True), 2),
    "DPM-Solver++ 2M, SDE": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++"), 2),
    "UniPC 2": ("UniPCMultistepScheduler", {}, 3),
    "UniPC 3": ("UniPCMultistepScheduler", dict(solver_order=3), 4),
    "UniPC 2, flow": ("UniPCMultistepScheduler", FLOW, 3),
    "DEIS 3": ("DEISMultistepScheduler", dict(solver_order=3), 3),
    "PNDM": ("PNDMScheduler", dict(skip_prk_steps=True), 4),
    "SA-Solver": ("SASolverScheduler", {}, 3),
    "DPM-Solver 2S": ("DPMSolverSinglestepScheduler", {}, 2),
    "Heun": ("HeunDiscreteScheduler", {}, 2),
    "Heun, flow": ("FlowMatchHeunDiscreteScheduler", {}, 2),
}
CASES = pytest.mark.parametrize("case", list(SAMPLERS))


def ready(case: str, steps: int = STEPS) -> Any:
    name, config, _ = SAMPLERS[case]
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def stepped(scheduler: Any, outputs: list[Tensor], x: Tensor) -> list[Tensor]:
    """The samples of a run of `scheduler` that is given these outputs, with the noise of one seed."""
    torch.manual_seed(3)
    samples = []
    for t, out in zip(scheduler.timesteps, outputs, strict=False):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(out, t, x, return_dict=False)[0]
        samples.append(x)
    return samples


@CASES
def test_how_much_it_remembers_is_found(case: str) -> None:
    found = scheduler_response(ready(case))
    memories = {len(t.keep) for t in found.transitions}
    assert not found.reason and memories == {len(t.effect) for t in found.transitions} == {SAMPLERS[case][2]}


@pytest.mark.parametrize("case", ["DPM-Solver++ 2M", "UniPC 2", "UniPC 3", "DEIS 3", "PNDM", "Heun"])
def test_what_it_remembers_of_a_run_is_no_part_of_it(case: str) -> None:
    scheduler, outputs = ready(case), [torch.randn(1, 4, 2, 2) for _ in range(STEPS)]
    module._found.cache_clear()
    untouched = scheduler_response(scheduler)
    for count in (1, 3, 5):
        scheduler = ready(case)
        stepped(scheduler, outputs[:count], torch.randn(1, 4, 2, 2))
        assert scheduler_response(scheduler) is untouched, "it is taken for the one that was tried"
        module._found.cache_clear()
        assert scheduler_response(scheduler) == untouched
        untouched = scheduler_response(scheduler)


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("DPM-Solver++ 2M", lambda p, q: (1, 0)), ("UniPC 3", lambda p, q: (1, 0)), ("PNDM", lambda p, q: (1, 0)),
        ("DPM-Solver++ 2M, flow", lambda p, q: (1, -1)), ("UniPC 2, flow", lambda p, q: (1, -1)),
    ],
)  # fmt: skip
def test_what_outputs_are_made_of_is_read_off(case: str, parts: Any) -> None:
    """Noise predictions are noise; velocities of a flow are noise less data, and do not follow the sample."""
    for t in scheduler_response(ready(case)).transitions:
        assert t.parts == pytest.approx(parts(t.signal, t.size - t.signal), abs=1e-3)
        assert t.jacobian == pytest.approx(0 if t.inert else sum(t.parts) / t.size, abs=1e-3)


def far_off(nodes: Sequence[float], targets: Sequence[float]) -> list[list[float]]:
    """Forecast weights in the place of `extrapolation`: minus twice the output of the last full step."""
    return [[-2.0, *(0.0 for _ in nodes[1:])] for _ in targets]


@pytest.mark.parametrize("forecast", [player.extrapolation, far_off], ids=["lines", "far off"])
@CASES
def test_samples_are_those_of_the_interpolated_outputs(
    case: str, forecast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts of a whole run, corrected by interpolation: from then on each sample, to the last, is the one of a run
    that had been given the interpolated outputs in the first place."""
    tiny.take_corrections_whole(monkeypatch)
    monkeypatch.setattr(player, "extrapolation", forecast)
    scheduler = ready(case)
    steps = [t._replace(jacobian=0.0) for t in scheduler_response(scheduler).transitions]
    total, start = len(steps), torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = [start.roll(1, 3) * math.cos(3 * i / total) + start.roll(1, 2) * (i / total) ** 2 for i in range(total)]
    full = (0, 1, 2, 5, 6, 10, total - 3, total - 2, total - 1)
    run = Run(SpecaConfig(schedule=full, tolerance=0.0, prior="none"), Response(tuple(steps)), total)
    branch, taken_for = run.branch("call", 1), list[Tensor]()
    torch.manual_seed(3)
    x, largest = start, 0.0
    for i, (t, step) in enumerate(zip(scheduler.timesteps, steps, strict=True)):
        before = [int(a) for a in branch.records[0].anchors]
        out = run.play(player.Call(branch, i, lambda rows, i=i: outputs[i].float())).double()
        if i in full:
            used = outputs[i]
            if before and before[0] < i - 1 and not step.inert:
                nodes, drafted = [i, *before], range(before[0] + 1, i)
                for j, share in zip(drafted, polynomial(nodes, drafted), strict=True):
                    taken_for[j] = sum((s * outputs[n] for s, n in zip(share, nodes, strict=True)), torch.zeros(()))
        else:
            used = sum((w * outputs[n] for w, n in zip(forecast(before, [i])[0], before, strict=True)), torch.zeros(()))
        taken_for.append(used)
        largest = max(largest, (out - used).abs().max().item())  # what was handed over to correct earlier steps
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(out, t, x, return_dict=False)[0]
        if i in full and not step.inert:
            wanted = stepped(ready(case), taken_for, start)[i]
            assert (x - wanted).norm() < 1e-4 * wanted.norm(), f"step {i}"
    assert branch.records[0].decisions == ["F" if i in full else "A" for i in range(total)]
    assert run.costs.evaluations == len(full) and run.costs.evaluations_full == total
    assert largest > (0.05 if forecast is far_off else 1e-3), "there was something to correct"


def taken(steps: tuple[Transition, ...], at: int) -> list[float]:
    """What is handed over, step by step, once the output of step `at` turns out to have been off by one."""
    change, found = advance([0.0] * len(steps[0].keep), steps[at], 1.0), []
    for step in steps[at + 1 :]:
        if step.inert:
            break
        found.append(advance(change, step)[0] / step.effect[0])
        change = advance(change, step, -found[-1])
    return found


@CASES
def test_pending_corrections_fade(case: str) -> None:
    """Were they to grow, a correction would end in outputs that no step can bear."""
    steps = scheduler_response(ready(case, 50)).transitions
    for at in range(1, len(steps) // 2):
        sizes = [abs(t) for t in taken(steps, at)]
        assert sum(sizes) < 4 and max(sizes[8:], default=0) < 0.1, (at, sizes)


def test_pending_corrections_of_the_two_step_solver_are_those_of_the_documentation() -> None:
    steps = scheduler_response(ready("DPM-Solver++ 2M", 50)).transitions
    assert taken(steps, 25)[:4] == pytest.approx([0.85, 0.25, 0.09, 0.03], abs=0.01)
