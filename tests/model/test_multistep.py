"""Samplers that remember: what is found out about them, and that a debt to them is paid to the last step."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from speca.core.corrector import Corrector, Transition, advance, polynomial, quadrature
from speca.model import sampler
from speca.model.sampler import transitions

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
    found, reason = transitions(ready(case))
    assert not reason and {len(t.keep) for t in found} == {len(t.move) for t in found} == {SAMPLERS[case][2]}


@pytest.mark.parametrize("case", ["DPM-Solver++ 2M", "UniPC 2", "UniPC 3", "DEIS 3", "PNDM", "Heun"])
def test_what_it_remembers_of_a_run_is_no_part_of_it(case: str) -> None:
    scheduler, outputs = ready(case), [torch.randn(1, 4, 2, 2) for _ in range(STEPS)]
    sampler._known.clear()
    untouched, _ = transitions(scheduler)
    for count in (1, 3, 5):
        scheduler = ready(case)
        stepped(scheduler, outputs[:count], torch.randn(1, 4, 2, 2))
        assert transitions(scheduler)[0] is untouched, "it is taken for the one that was tried"
        sampler._known.clear()
        assert transitions(scheduler)[0] == untouched
        untouched = transitions(scheduler)[0]


@pytest.mark.parametrize(
    ("case", "made"),
    [
        ("DPM-Solver++ 2M", lambda p, q: (1, 0)), ("UniPC 3", lambda p, q: (1, 0)), ("PNDM", lambda p, q: (1, 0)),
        ("DPM-Solver++ 2M, flow", lambda p, q: (1, -1)), ("UniPC 2, flow", lambda p, q: (1, -1)),
    ],
)  # fmt: skip
def test_what_outputs_are_made_of_is_read_off(case: str, made: Any) -> None:
    """Noise predictions are noise; velocities of a flow are noise less data, and do not follow the sample."""
    for t in transitions(ready(case))[0]:
        assert t.made == pytest.approx(made(t.signal, t.size - t.signal), abs=1e-3)
        assert t.pull == pytest.approx(0 if t.still else sum(t.made) / t.size, abs=1e-3)


@CASES
def test_samples_are_those_of_what_drafts_are_taken_for(case: str) -> None:
    """Drafts that are far off, corrected by interpolation: from then on each sample, to the last, is the one of a run
    that had been given the interpolated outputs in the first place."""
    scheduler = ready(case)
    steps = [t._replace(pull=0.0) for t in transitions(scheduler)[0]]
    total, start = len(steps), torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = [start.roll(1, 3) * math.cos(3 * i / total) + start.roll(1, 2) * (i / total) ** 2 for i in range(total)]
    full = [0, 1, 2, 5, 6, 10, total - 3, total - 2, total - 1]
    corrector, anchors, taken_for = Corrector(2, 1, math.inf), list[int](), list[Tensor]()
    torch.manual_seed(3)
    x, large = start, 0.0
    for i, (t, step) in enumerate(zip(scheduler.timesteps, steps, strict=True)):
        if i in full:
            out = outputs[i].float()
            if corrector.drafts[0] and not step.still:
                nodes = [i, *anchors[:2]]
                moves, _ = corrector.move([0], out, [quadrature(nodes, corrector.drafts[0])], step)
                corrector.owe([0], moves)
                drafted = range(anchors[0] + 1, i)
                for j, share in zip(drafted, polynomial(nodes, drafted), strict=True):
                    taken_for[j] = sum((s * outputs[n] for s, n in zip(share, nodes, strict=True)), torch.zeros(()))
            corrector.anchor([0], out, torch.zeros_like(out))
            anchors = [i, *anchors]
        else:
            out = -2 * outputs[anchors[0]].float()
            corrector.draft([0], out, float(i), step)
        taken_for.append(out.double())
        paid = corrector.pay([0], step)
        large = large if paid is None else max(large, paid.abs().max().item())
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(out.double() + (0 if paid is None else paid), t, x, return_dict=False)[0]
        if i in full and not step.still:
            wanted = stepped(ready(case), taken_for, start)[i]
            assert (x - wanted).norm() < 1e-4 * wanted.norm(), f"step {i}"
    assert large > 0.05, "there was something to pay"


def payments(steps: tuple[Transition, ...], at: int) -> list[float]:
    """What is handed over, step by step, once the output of step `at` turns out to have been off by one."""
    change, paid = advance([0.0] * len(steps[0].keep), steps[at], 1.0), []
    for step in steps[at + 1 :]:
        if step.still:
            break
        paid.append(advance(change, step)[0] / step.move[0])
        change = advance(change, step, -paid[-1])
    return paid


@CASES
def test_payments_fade(case: str) -> None:
    """Were they to grow, a correction would end in outputs that no step can bear."""
    steps = transitions(ready(case, 50))[0]
    for at in range(1, len(steps) // 2):
        paid = [abs(p) for p in payments(steps, at)]
        assert sum(paid) < 4 and max(paid[8:], default=0) < 0.1, (at, paid)


def test_payments_of_the_two_step_solver_are_those_of_the_documentation() -> None:
    steps = transitions(ready("DPM-Solver++ 2M", 50))[0]
    assert payments(steps, 25)[:4] == pytest.approx([0.85, 0.25, 0.09, 0.03], abs=0.01)
