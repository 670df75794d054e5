"""A prior through whole pipelines: full steps where it places them, drafts that cost nothing, and when it stays out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import speca
import tiny
from pipelines.cases import RECIPES
from speca.calibration.file import BESIDE
from speca.calibration.recording import record
from speca.core.prior import Prior
from speca.reports.comparison import psnr
from speca.zoo import load

STEPS = 16


def recorded(case: tiny.Case, count: int = 6) -> Any:
    arguments = {**case.arguments, **case.conditions(list(range(count))), "num_inference_steps": STEPS}
    return record(
        case.pipe, {n: v for n, v in arguments.items() if n != "output_type"}, list(range(100, 100 + count)), 4
    )


@pytest.fixture(scope="module", params=list(tiny.PIPELINES))
def prepared(request: pytest.FixtureRequest) -> tuple[tiny.Case, Any]:
    case = tiny.PIPELINES[request.param]()
    return case, recorded(case)


def decisions(case: tiny.Case) -> list[str]:
    return [s.decisions for s in speca.report(case.pipe).samples]


def test_a_budget_is_spent_where_the_prior_says_and_drafts_run_nothing(prepared: tuple[tiny.Case, Any]) -> None:
    case, recording = prepared
    speca.enable(case.pipe, speedup=4, calibration=recording.prior)
    case([3, 8], steps=STEPS)  # the self-test runs once
    ran = []
    handle = next(m for m in case.transformer.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(
        lambda *_: ran.append(1)
    )
    image = case([3, 8], steps=STEPS)
    handle.remove()
    assert len(set(decisions(case))) == 1 and decisions(case)[0].count("F") == STEPS // 4
    speca.disable(case.pipe)
    every = []
    handle = next(m for m in case.transformer.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(
        lambda *_: every.append(1)
    )
    plain = case([3, 8], steps=STEPS)
    handle.remove()
    assert len(ran) * 4 == len(every), "a draft called the model"
    assert image.isfinite().all() and not torch.equal(image, plain)


def test_the_second_step_is_full_only_where_it_was_placed(prepared: tuple[tiny.Case, Any]) -> None:
    case, recording = prepared
    for steps in ((0, 3, 7, 12, 15, STEPS - 2), (0, 1, 4, 8, 13, STEPS - 1)):
        speca.enable(case.pipe, speedup=STEPS / 6, calibration=replace(recording.prior, placed={6: steps}))
        image = case([3, 8], steps=STEPS)
        assert {s.decisions for s in speca.report(case.pipe).samples} == {
            "".join("F" if step in steps else "A" for step in range(STEPS))
        }
        assert image.isfinite().all()


def test_a_row_does_not_depend_on_its_batch_mates(prepared: tuple[tiny.Case, Any]) -> None:
    case, recording = prepared
    speca.enable(case.pipe, tolerance=0.05, calibration=recording.prior)
    together = case([3, 8, 5], steps=STEPS)
    for i, seed in enumerate([3, 8, 5]):
        torch.testing.assert_close(case([seed], steps=STEPS)[0], together[i], rtol=1e-3, atol=1e-3)
    speca.disable(case.pipe)


def test_threshold_zero_is_exact_with_a_prior(prepared: tuple[tiny.Case, Any]) -> None:
    case, recording = prepared
    plain = case([3, 8], steps=STEPS)
    for exact in (dict(threshold=0.0), dict(tolerance=0.0)):
        speca.enable(case.pipe, calibration=recording.prior, **exact)
        assert torch.equal(case([3, 8], steps=STEPS), plain)
    speca.disable(case.pipe)


def test_a_tighter_tolerance_takes_more_steps_and_comes_nearer(prepared: tuple[tiny.Case, Any]) -> None:
    case, recording = prepared
    plain, spent, gaps = case([3, 8, 5], steps=STEPS), [], []
    for tolerance in (1.0, 0.03, 1e-4):
        speca.enable(case.pipe, tolerance=tolerance, calibration=recording.prior)
        gaps.append(float((case([3, 8, 5], steps=STEPS) - plain).norm()))
        spent.append(decisions(case)[0].count("F"))
    speca.disable(case.pipe)
    assert spent == sorted(spent) and spent[0] < spent[-1]
    assert gaps[-1] < gaps[0]


def test_other_steps_are_placed_by_the_same_prior() -> None:
    case = tiny.flux()
    prior = recorded(case).prior
    speca.enable(case.pipe, speedup=5, calibration=prior)
    case([3], steps=40)
    assert decisions(case)[0].count("F") == 8


def test_the_prior_stays_out_where_it_does_not_hold() -> None:
    case = tiny.flux()
    prior = recorded(case).prior
    speca.enable(case.pipe, "paper", calibration=prior)
    by_rule = case([3], steps=STEPS)
    speca.enable(case.pipe, "paper")
    assert torch.equal(case([3], steps=STEPS), by_rule), "the paper's preset heeded a prior"
    speca.enable(case.pipe, speedup=4, calibration=prior, corrector=False)
    case([3], steps=STEPS)
    assert any("prior is not used" in note for note in speca.report(case.pipe).notes)
    case = tiny.dit()
    prior = recorded(case).prior
    config = case.pipe.scheduler.config
    for scheduler, why in (
        (diffusers.DPMSolverMultistepScheduler.from_config(config, thresholding=True), "nothing is corrected"),
        (diffusers.DDPMScheduler.from_config(config, clip_sample=False), "is not used: it was measured with a"),
    ):
        case.pipe.scheduler = scheduler
        speca.enable(case.pipe, calibration=prior)
        case([3], steps=STEPS)
        assert any(why in note for note in speca.report(case.pipe).notes)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_prior_serves_other_samplers(name: str) -> None:
    """What was measured with DDIM places the full steps of a sampler that remembers, and is worth it there."""
    pipe, decibels = load("fashion-dit"), {}
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)

    def images() -> torch.Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in range(8)]
        made = pipe([1, 3, 7, 9, 0, 2, 4, 6], num_inference_steps=20, generator=generator, output_type="np").images
        return torch.as_tensor(made)

    wanted = images()
    for calibration in (None, False):
        speca.enable(pipe, speedup=3, calibration=calibration, prior="measured")
        decibels[calibration] = psnr(images(), wanted).mean().item()
        report = speca.report(pipe)
        assert {s.decisions.count("F") for s in report.samples} == {6} and not report.notes[1:]
    assert decibels[None] > decibels[False] + 1.25  # whose full steps are evenly apart


def test_what_was_measured_with_noise_is_kept_apart() -> None:
    case = tiny.dit()
    case.pipe.scheduler = diffusers.DDPMScheduler.from_config(case.pipe.scheduler.config, clip_sample=False)
    prior = recorded(case).prior
    assert prior.noisy and Prior.from_dict(prior.to_dict()).noisy and prior.at(prior.noise[::2]).noisy
    speca.enable(case.pipe, speedup=4, calibration=prior)
    case([3], steps=STEPS)
    assert not any("prior" in note for note in speca.report(case.pipe).notes)
    old = {name: value for name, value in prior.to_dict().items() if name != "noisy"}
    assert not Prior.from_dict(old).noisy, "files of before tell of none"


def test_an_accelerated_pipeline_is_recorded_in_full() -> None:
    case = tiny.flux()
    plain = recorded(case).prior.moments
    speca.enable(case.pipe, speedup=4)
    assert (recorded(case).prior.moments == plain).all()


def test_the_old_way_to_ask_for_outputs_is_refused_with_the_new_one() -> None:
    for preset in ("paper", "balanced"):
        with pytest.raises(speca.ConfigError, match="SpecaConfig forecasts outputs"):
            speca.enable(tiny.flux().pipe, preset, drafts="output")


def test_a_model_brings_its_calibration(tmp_path: Path) -> None:
    case = tiny.dit()
    arguments = {"class_labels": list(range(10)) * 2, "num_inference_steps": STEPS}
    found = speca.calibrate(case.pipe, arguments, target_psnr=15, samples=10, confidence=0.8)
    case.pipe.save_pretrained(tmp_path)
    found.save(tmp_path / BESIDE)
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)

    def tolerance(**how: Any) -> float:
        speca.enable(pipe, **how)
        pipe(class_labels=[1], num_inference_steps=STEPS)
        return float(speca.report(pipe).config["tolerance"])

    assert tolerance() == found.tolerance
    assert tolerance(preset="fast") == pytest.approx(2 * found.tolerance)
    assert tolerance(tolerance=0.3) == 0.3
    assert tolerance(calibration=False) == speca.PRESETS["balanced"].tolerance
    assert tolerance(speedup=4) == 0.0
    assert "placement" not in speca.report(pipe).config
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    assert tolerance() == speca.PRESETS["balanced"].tolerance
    assert any(
        "is not used: it was measured" in note for note in speca.report(pipe).notes
    )  # of a sampler without noise


def test_a_budget_of_an_unmeasured_model_can_be_placed_by_the_generic_prior() -> None:
    case, found = tiny.flux(), {}
    for prior in ("generic", "measured", "none"):
        speca.enable(case.pipe, speedup=4, prior=prior)
        image = case([3, 8], steps=STEPS)
        found[prior] = image, decisions(case), speca.report(case.pipe).bytes_per_sample
        assert decisions(case)[0].count("F") == STEPS // 4
    assert found["generic"][1][0] == found["generic"][1][1] != found["none"][1][0]
    assert found["generic"][2] > found["none"][2], "a prior keeps three outputs, polynomials two"
    assert torch.equal(found["measured"][0], found["none"][0]), "nothing was measured"
    speca.enable(case.pipe, tolerance=0.02, prior="generic")
    case([3, 8], steps=STEPS)
    assert 2 < decisions(case)[0].count("F") < STEPS, "a tolerance is kept by the corrections of each sample"


def test_a_budget_of_an_unmeasured_model_is_spent_evenly() -> None:
    """Of a flow up to its last step; fewer than five full steps are those of the sampler with so many steps."""
    case = tiny.flux()
    for count, wanted in ((5, {0, 5, 10, 17, 23}), (4, {0, 6, 12, 18})):
        speca.enable(case.pipe, speedup=24 / count)
        case([3, 8], steps=24)
        assert {frozenset(i for i, d in enumerate(found) if d == "F") for found in decisions(case)} == {
            frozenset(wanted)
        }


def test_four_full_steps_are_the_sampler_with_four_steps() -> None:
    case = tiny.flux()
    case.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()  # evenly spaced: no shift of its times
    coarse = case([3, 8], steps=4)
    speca.enable(case.pipe, speedup=6)
    made = case([3, 8], steps=24)
    assert (made - coarse).abs().max() < 0.05 * (made - made.mean()).abs().max()


def test_a_run_from_an_image_spends_its_budget_on_the_steps_it_takes() -> None:
    case = RECIPES["flux-img2img"].build()
    for prior in ("measured", "generic", "none"):
        speca.enable(case.pipe, speedup=3, prior=prior)
        case([3, 8], steps=STEPS)
        report = speca.report(case.pipe)
        taken = {(len(s.decisions), s.full) for s in report.samples}
        assert len(taken) == 1 and all(full == steps // 3 for steps, full in taken)
        assert all("too small to forecast from" in note for note in report.notes), "four of twelve steps"


def test_a_budget_of_one_full_step_is_kept() -> None:
    case = tiny.flux()
    for prior in ("generic", "none"):
        speca.enable(case.pipe, speedup=STEPS, prior=prior)
        assert case([3], steps=STEPS).isfinite().all()
        assert decisions(case) == ["F" + "A" * (STEPS - 1)]
