"""Planned drafts and the corrector through whole pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import speca
import tiny
from pipelines.cases import RECIPES
from speca import zoo
from speca.calibration.recording import record
from speca.core.controller import Planner, Record
from speca.diffusers.accelerator import ATTRIBUTE
from speca.sampler import scheduler as sampler

SEEDS = [3, 8, 5]


def decisions(case: tiny.Case) -> list[str]:
    return [s.decisions for s in speca.report(case.pipe).samples]


def telling(case: tiny.Case, seeds: list[int]) -> float:
    """A tolerance that ends the drafts of different samples at different steps."""
    for tolerance in (10 ** (k / 4) for k in range(2, -13, -1)):
        speca.enable(case.pipe, tolerance=tolerance)
        case(seeds, steps=20)
        if len(set(decisions(case))) > 1:
            return tolerance
    raise AssertionError("no tolerance tells these samples apart, so the test would say nothing")


def test_the_corrector_leaves_the_full_run_alone(case: tiny.Case) -> None:
    plain = case(SEEDS)
    for exact in (dict(threshold=0.0), dict(tolerance=0.0)):
        speca.enable(case.pipe, **exact)
        assert torch.equal(case(SEEDS), plain)
        assert all(set(d) == {"F"} for d in decisions(case))


def test_a_planned_row_does_not_depend_on_its_batch_mates(case: tiny.Case) -> None:
    speca.enable(case.pipe, tolerance=telling(case, list(range(6))))
    alone = {}
    for seed in range(6):
        image = case([seed], steps=20)
        alone[seed] = (decisions(case)[0], image[0])
    for seeds in ([0, 1, 2, 3, 4, 5], [5, 3, 1]):
        together = case(seeds, steps=20)
        assert decisions(case) == [alone[s][0] for s in seeds]
        for i, seed in enumerate(seeds):
            torch.testing.assert_close(together[i], alone[seed][1], rtol=1e-3, atol=1e-3)


def test_budget_holds_for_every_sample(case: tiny.Case) -> None:
    for speedup in (2, 3.5, 5):
        speca.enable(case.pipe, speedup=speedup)
        case(SEEDS, steps=20)
        assert all(d.count("F") == 20 // speedup and set(d) == {"F", "A"} for d in decisions(case))


def test_a_correction_is_what_changes_the_picture(case: tiny.Case) -> None:
    """With the same steps in full, the corrector alone makes the difference; it needs no memory of its own."""
    fixed = dict(schedule=(0, 1, 4, 8), prior="none")
    speca.enable(case.pipe, **fixed, corrector=False)
    without = case(SEEDS)
    held = speca.report(case.pipe).bytes_per_sample
    speca.enable(case.pipe, **fixed, corrector=True)
    corrected = case(SEEDS)
    assert decisions(case) == ["FFAAFAAAFAAAAA"] * len(SEEDS)
    assert not torch.equal(corrected, without) and corrected.isfinite().all()
    assert speca.report(case.pipe).bytes_per_sample == held


def test_a_velocity_that_is_quadratic_in_time_is_integrated_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of order 1 are wrong on it, and each full step corrects what the drafts before it did."""
    tiny.take_corrections_whole(monkeypatch)
    steps = 12
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)

    class Block(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return hidden_states * 0 + (1 + time - 2 * time**2)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block() for _ in range(3)])

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            h, time = hidden_states, (timestep / 1000).view(-1, 1, 1)
            for block in self.blocks:
                h = block(h, time)
            return h * 1.0

    def loop(model: torch.nn.Module) -> torch.Tensor:
        x = torch.linspace(-1, 1, 24).view(2, 3, 4)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(2)), t, x, return_dict=False)[0]
        return x

    model = Model().eval()
    plain = loop(model)
    settings = dict(scheduler=scheduler, schedule=(0, 1, 4, 8, 11), prior="none")
    gaps = []
    for corrector in (False, True):
        speca.enable(model, **settings, corrector=corrector)
        gaps.append((loop(model) - plain).abs().max().item())
    assert gaps[0] > 1e-2
    assert gaps[1] < 1e-5


def test_samplers_that_are_not_linear_are_verified_instead_and_the_report_says_so() -> None:
    case = tiny.dit()
    case.pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        case.pipe.scheduler.config, thresholding=True
    )
    speca.enable(case.pipe)
    case(SEEDS)
    report = speca.report(case.pipe)
    assert any("not linear" in note and "DPMSolverMultistepScheduler" in note for note in report.notes)
    assert any(e is not None for s in report.samples for e in s.errors), "drafts must have been verified"


def test_a_bare_model_without_scheduler_is_verified_instead() -> None:
    case = tiny.dit()
    model = case.transformer
    speca.enable(model, num_inference_steps=10)
    for t in reversed(range(10)):
        model(torch.ones(1, 4, 4, 4), timestep=torch.tensor([t * 100]), class_labels=torch.tensor([1]))
    report = speca.report(model)
    assert any("the scheduler is not known" in note for note in report.notes)
    assert any(e is not None for s in report.samples for e in s.errors)


def test_the_sampler_is_tried_once_a_run(case: tiny.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    original = sampler.scheduler_response
    monkeypatch.setattr(
        "speca.diffusers.caller.scheduler_response", lambda s, begin: (tried.append(s), original(s, begin))[1]
    )
    speca.enable(case.pipe, tolerance=1.0)
    case(SEEDS)
    case(SEEDS, steps=10)
    assert len(tried) == 2


def test_settings_that_do_not_fit_are_refused() -> None:
    pipe = tiny.dit().pipe
    with pytest.raises(speca.ConfigError, match="speedup is a setting of SpecaConfig"):
        speca.enable(pipe, "paper", speedup=4)
    with pytest.raises(speca.ConfigError, match="tolerance is a setting of SpecaConfig"):
        speca.enable(pipe, "paper", tolerance=0.1)
    with pytest.raises(speca.ConfigError, match="slow-down"):
        speca.enable(pipe, speedup=0.5)
    with pytest.raises(speca.ConfigError, match="whole numbers"):
        speca.enable(pipe, schedule=(0, -1))


def test_the_noise_that_a_pipeline_tells_its_sampler_to_add_is_heeded() -> None:
    case = RECIPES["pixart-sigma"].build()
    case.pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    speca.enable(case.pipe, tolerance=0.05)
    found = {}
    for eta in (0.0, 0.7):
        case([3], steps=12, eta=eta)
        found[eta] = case.transformer.__dict__[ATTRIBUTE].last.run.response.transitions
        assert found[eta] == sampler.scheduler_response(case.pipe.scheduler, eta=eta).transitions
    assert found[0.0] != found[0.7]
    speca.disable(case.pipe)
    call = {**case.arguments, **case.conditions([1, 2]), "num_inference_steps": 12, "eta": 0.7}
    del call["output_type"]
    assert record(case.pipe, call, [1, 2], 2).transitions == found[0.7]


def observed(case: tiny.Case, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[tuple[int, int, float]]:
    """What the planner observes of the one sample: step, drafts, error."""
    told: list[tuple[int, int, float]] = []
    plain = Planner.observe

    def observe(self: Planner, trajectory: Record, estimate: float, drafts: int) -> None:
        told.append((trajectory.step, drafts, estimate))
        plain(self, trajectory, estimate, drafts)

    monkeypatch.setattr(Planner, "observe", observe)
    speca.enable(case.pipe, **settings)
    case([3], steps=20)
    return told


def test_a_full_step_tells_what_a_draft_there_would_have_been_wrong_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a flow of even steps that is `|V_2 - (2 V_1 - V_0)| / steps`, root mean square; and with none before it."""
    case, outputs = tiny.flux(), []
    speca.enable(case.pipe, tolerance=1e-9)
    keep = case.transformer.register_forward_hook(lambda *given: outputs.append(given[2][0].clone()))
    (step, drafts, estimate), *later = observed(case, monkeypatch, tolerance=1e-9)
    keep.remove()
    assert (step, drafts) == (2, 1) and [s for s, _, _ in later] == list(range(3, 20))
    missed = (outputs[2] - (2 * outputs[1] - outputs[0])) / 20
    assert estimate == pytest.approx(missed.square().mean().sqrt().item(), rel=1e-4)
    assert decisions(case) == ["F" * 20]


def test_a_flow_waits_with_its_first_draft_until_its_error_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, path = tiny.flux(), tiny.dit()
    for case, begins in ((flow, "FFFA"), (path, "FFA")):
        observed(case, monkeypatch, tolerance=1e3)
        assert decisions(case)[0].startswith(begins)


def test_a_sample_that_could_not_draft_at_first_drafts_later() -> None:
    """Full steps go on telling whether drafts would do. A blind first draft failed, and none came after it."""
    pipe = zoo.load("emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    speca.enable(pipe, "faithful", calibration=False)
    call = {**zoo.call_arguments("emoji-flux"), "prompt": "a red apple", "output_type": "latent"}
    pipe(**call, num_inference_steps=20, generator=torch.Generator().manual_seed(0))
    (sample,) = speca.report(pipe).samples
    assert sample.decisions.startswith("FFFF") and sample.decisions.count("A") >= 5


def test_a_budget_alone_reads_nothing() -> None:
    for case in (tiny.flux(), tiny.dit()):
        speca.enable(case.pipe, speedup=2.5, prior="none")
        case(SEEDS, steps=20)
        assert speca.report(case.pipe).host_reads == 0 and {d.count("F") for d in decisions(case)} == {8}
