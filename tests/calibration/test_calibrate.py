"""calibrate: what it promises about fresh samples, what it refuses, and the file that enable takes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import speca
import tiny
from speca.calibration import calibrate as calibrating
from speca.calibration.file import Trial
from speca.core.prior import Prior


def call(case: tiny.Case, count: int) -> dict[str, Any]:
    arguments = {**case.arguments, **case.conditions(list(range(2 * count))), "num_inference_steps": 16}
    return {name: value for name, value in arguments.items() if name != "output_type"}


def test_target_is_met_and_the_file_sets_the_tolerance(tmp_path: Path) -> None:
    case, said = tiny.flux(), []
    found = speca.calibrate(case.pipe, call(case, 10), target_psnr=30, samples=10, confidence=0.8, progress=said.append)
    passed = [t for t in found.trials if t.bound >= 30]
    assert found.tolerance == max(t.tolerance for t in passed)
    assert found.fresh_low <= found.fresh_met <= found.fresh_high
    assert found.steps == 16 and found.model == "FluxTransformer2DModel"
    assert said[0] == "full run on tuning seeds" and said[-1] == "fresh seeds"
    firsts = [words for words in said if "placement 1 of" in words]
    assert [int(words.split()[0]) for words in firsts] == [t.full_steps for t in found.trials]
    assert "30 dB or more" in str(found)
    file = tmp_path / "found.json"
    found.save(file)
    assert json.dumps(speca.Calibration.load(file).to_dict()) == json.dumps(found.to_dict())
    speca.enable(case.pipe, calibration=file)
    case([1])
    assert speca.report(case.pipe).config["tolerance"] == found.tolerance
    speca.enable(case.pipe, calibration=found, tolerance=0.5)
    case([1])
    assert speca.report(case.pipe).config["tolerance"] == 0.5


def test_of_several_placements_the_best_is_found_by_running_them(monkeypatch: pytest.MonkeyPatch) -> None:
    case, tried = tiny.flux(), []
    original = calibrating._Half.attempt

    def attempt(self: Any, tolerance: float, prior: Prior, speedup: float = 0.0) -> Trial:
        trial = original(self, tolerance, prior, speedup)
        tried.append((trial.full_steps, prior.placed[trial.full_steps], sum(self.values), prior))
        return trial

    monkeypatch.setattr(calibrating._Half, "attempt", attempt)
    found = speca.calibrate(
        case.pipe, call(case, 4), target_psnr=20, samples=4, confidence=0.8, speedups=(16 / 6, 2.8, 4.0)
    )
    *tuning, (fresh_count, fresh_steps, _, fresh_prior) = tried
    assert {5, 6, 4} <= {t.full_steps for t in found.trials}
    assert len({steps for count, steps, *_ in tuning if count == 5}) > 1, "there was something to choose from"
    for count in {t.full_steps for t in found.trials}:
        values = {steps: value for tried_count, steps, value, _ in tuning if tried_count == count}
        assert found.prior.placed[count] == max(values, key=lambda steps: values[steps])
    assert fresh_prior is found.prior and fresh_steps == found.prior.placed[fresh_count]
    with pytest.raises(speca.InputError, match="nothing to place"):
        speca.calibrate(case.pipe, call(case, 4), target_psnr=20, samples=4, confidence=0.8, speedups=(1.0,))


def test_a_calibration_of_something_else_is_refused(tmp_path: Path) -> None:
    prior = Prior((1.0, 0.5), np.eye(2))
    made = speca.Calibration("FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler", 50, prior, tolerance=0.01)
    with pytest.raises(speca.ConfigError, match="made for FluxTransformer2DModel"):
        speca.enable(tiny.dit().pipe, calibration=made)
    flux = tiny.flux().pipe
    flux.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    speca.disable(speca.enable(flux, calibration=made))  # another scheduler is no hindrance
    with pytest.raises(speca.ConfigError, match="no calibration"):
        speca.enable(flux, calibration=tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"format": 99}')
    with pytest.raises(speca.ConfigError, match="another version"):
        speca.Calibration.load(tmp_path / "other.json")
    (tmp_path / "torn.json").write_text("[1")
    with pytest.raises(speca.ConfigError, match="no calibration"):
        speca.Calibration.load(tmp_path / "torn.json")


def test_what_cannot_be_met_is_said() -> None:
    case = tiny.dit()
    with pytest.raises(speca.InputError, match="ask for less"):
        speca.calibrate(case.pipe, call(case, 4), target_psnr=400.0, samples=4, confidence=0.8)
    with pytest.raises(speca.InputError, match="at least 9 samples"):
        speca.calibrate(case.pipe, call(case, 4), target_psnr=20, samples=4)
    with pytest.raises(speca.InputError, match="confidence between 0 and 1"):
        speca.calibrate(case.pipe, call(case, 4), target_psnr=20, samples=4, confidence=1.0)
    config = case.pipe.scheduler.config
    case.pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, thresholding=True)
    with pytest.raises(speca.InputError, match=r"nothing to calibrate: .*DPMSolver"):
        speca.calibrate(case.pipe, call(case, 4), target_psnr=20.0, samples=4, confidence=0.8)


def test_search_finds_the_fewest_steps_by_bisection() -> None:
    def attempt(full: int) -> Trial:
        return Trial(full, 0.1 / full, 1.0, 0.0, 0.0, bound=50.0 if full >= 9 else 20.0)

    tried = [t.full_steps for t in calibrating._search(attempt, 4, 25, 35.0)]
    assert 9 in tried and 8 in tried and len(tried) <= 5
    assert [t.full_steps for t in calibrating._search(attempt, 4, 7, 35.0)][-1] == 7


def test_wilson_interval_is_the_textbooks() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20, 0 to 0.1611."""
    assert calibrating.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert calibrating.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_one_run_is_enough_to_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hands back what that run drew, tries budgets on it, and serves as any calibration."""
    case, calls = tiny.flux(), []
    original = type(case.pipe).__call__

    @functools.wraps(original)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(case.pipe), "__call__", counted)
    arguments = {**case.arguments, **case.conditions([0]), "num_inference_steps": 16}
    del arguments["output_type"]
    found = speca.calibrate(case.pipe, **arguments)
    assert len(calls) == 1 + 2 * 2, "one run in full, then two placements each of five and of four full steps"
    assert found.tuning_seeds[1] == 1 and found.fresh_seeds is None and found.branches == (1,)
    assert [t.full_steps for t in found.trials] == sorted({t.full_steps for t in found.trials}, reverse=True)
    assert found.output[0].size == (case.arguments["width"], case.arguments["height"]) and "drawn again" in str(found)
    found.save(tmp_path / "one.json")
    again = speca.Calibration.load(tmp_path / "one.json")
    assert again.to_dict() == found.to_dict() and again.output is None
    speca.enable(case.pipe, speedup=3, calibration=again)
    case([1], steps=16)
    report = speca.report(case.pipe)
    assert report.samples[0].full == 5 and not report.notes
    assert frozenset(i for i, d in enumerate(report.samples[0].decisions) if d == "F") == set(found.prior.placed[5])


def test_arguments_without_a_prompt_are_filled_up_and_others_are_left_alone() -> None:
    case = tiny.dit()
    found = speca.calibrate(case.pipe, num_inference_steps=16, speedups=(4,))
    assert found.steps == 16 and len(found.output) == 1
    with pytest.raises(speca.InputError, match="draws the noise of its samples itself"):
        speca.calibrate(case.pipe, class_labels=[1], generator=torch.Generator())
    pipe = diffusers.DDIMPipeline(
        tiny.randomised(diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8),
            norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )),
        diffusers.DDIMScheduler(clip_sample=False),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    assert speca.calibrate(pipe, num_inference_steps=16, speedups=(4,)).steps == 16, "it takes no condition"
