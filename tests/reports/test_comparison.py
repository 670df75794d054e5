"""Quality figures on known values, and the paired comparison on a tiny pipeline."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import speca
import tiny
from speca import InputError, SpecaError
from speca.diffusers.accelerator import ATTRIBUTE
from speca.reports import comparison, measure, pictures

CALL: dict[str, Any] = {"class_labels": [1, 2, 3], "num_inference_steps": 12}
SEEDS = [7, 8, 9]
LOOSE = speca.SpecaConfig(tolerance=1e9, max_draft=3)
CHECKED = speca.VerifiedConfig(threshold=1e9, threshold_decay=1.0, max_draft=3)
BOTH = pytest.mark.parametrize("config", [LOOSE, CHECKED], ids=["planned", "verified"])


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.dit().pipe


@pytest.fixture(scope="module")
def compared(pipe: Any) -> comparison.Comparison:
    return comparison.compare(pipe, CALL, SEEDS, LOOSE, repeats=2, batch=2)


# -- PSNR ---------------------------------------------------------------------------------------------
def test_psnr_of_known_differences() -> None:
    image = torch.full((3, 4, 4, 1), 0.5)
    other = image + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    values = comparison.psnr(other, image)
    assert values.shape == (3,)
    assert values[:2].tolist() == pytest.approx([20, 40], abs=1e-4)
    assert math.isinf(values[2])


def test_psnr_of_unrelated_images_is_low() -> None:
    """The mean square of the difference of two independent uniform values is 1/6."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1, 200, 200, 1, generator=generator)
    assert comparison.psnr(a, b).item() == pytest.approx(10 * math.log10(6), abs=0.1)
    assert comparison.psnr(torch.zeros(1, 8, 8), torch.ones(1, 8, 8)).item() == pytest.approx(0, abs=1e-9)


def test_psnr_counts_the_sign_of_no_difference() -> None:
    """As uint8, 10 - 20 is 246; as floats both directions are the same."""
    dark, light = torch.full((1, 8, 8), 10 / 255), torch.full((1, 8, 8), 20 / 255)
    assert comparison.psnr(dark, light).item() == comparison.psnr(light, dark).item() == pytest.approx(28.13, abs=0.01)


def test_psnr_refuses_integers_and_unequal_shapes() -> None:
    levels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    with pytest.raises(InputError, match="divide uint8 by 255"):
        comparison.psnr(levels, levels)
    with pytest.raises(InputError, match="equal shapes"):
        comparison.psnr(torch.zeros(1, 8, 8), torch.zeros(2, 8, 8))


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([3.0], 0.05, 3.0),
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.5),
        ([1.0, 2.0, 3.0], 1.0, 3.0),
        ([30.0, math.inf], 0.5, 30.0),
        ([math.inf, math.inf], 0.5, math.inf),
    ],
)
def test_quantile(values: list[float], q: float, expected: float) -> None:
    assert comparison.quantile(values, q) == expected


def test_quantile_is_numpys() -> None:
    values = np.random.default_rng(0).normal(size=37)
    for q in (0.05, 0.5, 0.83):
        assert comparison.quantile(values.tolist(), q) == pytest.approx(float(np.quantile(values, q)))


# -- running ------------------------------------------------------------------------------------------
def test_split_shares_what_is_not_per_sample() -> None:
    call = {"prompt": ["a", "b", "c"], "timesteps": [3, 2, 1], "guidance_scale": 2.0, "size": [8, 8]}
    first, second = measure.split(call, [5, 6, 7], 2)
    assert first == ({**call, "prompt": ["a", "b"]}, [5, 6])
    assert second == ({**call, "prompt": ["c"]}, [7])
    (_, _), (call, _) = measure.split({"prompt_embeds": torch.arange(3)}, [5, 6, 7], 2)
    assert call["prompt_embeds"].tolist() == [2]


@pytest.mark.parametrize(("seeds", "batch"), [([], 4), ([1], 0)])
def test_split_refuses_nothing(seeds: list[int], batch: int) -> None:
    with pytest.raises(InputError, match="nothing to make"):
        measure.split({}, seeds, batch)


@BOTH
def test_batches_do_not_change_samples(pipe: Any, config: speca.SpecaConfig | speca.VerifiedConfig) -> None:
    whole = measure.generate(pipe, CALL, SEEDS, config)
    parts = measure.generate(pipe, CALL, SEEDS, config, batch=2)
    assert whole.report is not None
    assert parts.report is not None
    torch.testing.assert_close(whole.images, parts.images, atol=1e-5, rtol=0)
    assert [s.index for s in parts.report.samples] == [0, 1, 2]
    assert [s.decisions for s in parts.report.samples] == [s.decisions for s in whole.report.samples]
    assert any(s.accepted for s in parts.report.samples)
    assert parts.report.evaluations_full == whole.report.evaluations_full == 12 * 2 * len(SEEDS)
    assert (parts.report.flops_full is None) == (config is LOOSE), "only counted where drafts are checked"
    assert parts.report.flops_full == pytest.approx(whole.report.flops_full)


def test_every_step_is_reported_and_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    seen: list[tuple[int, int]] = []
    measure.generate(pipe, CALL, SEEDS, LOOSE, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k + 1, 24) for k in range(24)]
    assert_untouched(pipe)


def test_a_failing_call_leaves_the_pipeline_as_it_was(pipe: Any) -> None:
    with pytest.raises(TypeError):
        measure.generate(pipe, {**CALL, "no_such_argument": 1}, SEEDS, LOOSE)
    assert_untouched(pipe)


def test_pixels_that_are_no_numbers_are_refused() -> None:
    broken = tiny.dit().pipe
    broken.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(SpecaError, match="no numbers; use a wider dtype"):
        measure.generate(broken, CALL, SEEDS, LOOSE)


def test_a_report_that_does_not_fit_the_samples_is_refused(pipe: Any, compared: comparison.Comparison) -> None:
    class Plain:
        def report(self) -> speca.Report:
            return dataclasses.replace(compared.report, samples=(), notes=("its step is unknown.",))

    with pytest.raises(SpecaError, match="not accelerated sample by sample: its step is unknown; run it without"):
        measure.run_once(pipe, CALL, SEEDS, Plain())


def assert_untouched(pipe: Any) -> None:
    assert "progress_bar" not in vars(pipe)
    assert ATTRIBUTE not in vars(pipe.transformer)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks


# -- comparing ----------------------------------------------------------------------------------------
def test_runs_are_interleaved(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    run_once = comparison.run_once

    def spy(pipe: Any, call: Any, seeds: list[int], session: Any) -> measure.Run:
        order.append((call["num_inference_steps"], len(seeds), session is not None))
        return run_once(pipe, call, seeds, session)

    monkeypatch.setattr(comparison, "run_once", spy)
    comparison.compare(pipe, CALL, SEEDS, LOOSE, repeats=2, batch=2)
    off, on = False, True
    assert order[:2] == [(4, 2, off), (4, 2, on)]
    assert order[2:6] == [(12, 2, off), (12, 2, on), (12, 1, on), (12, 1, off)]
    assert order[6:] == [(12, 2, on), (12, 2, off), (12, 1, off), (12, 1, on)]


def test_comparison_against_the_pipeline_itself(pipe: Any, compared: comparison.Comparison) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipe.set_progress_bar_config(disable=True)
    plain = torch.from_numpy(pipe(**CALL, generator=generators, output_type="np").images)
    torch.testing.assert_close(compared.full.images, plain, atol=1e-5, rtol=0)
    assert compared.psnr == tuple(comparison.psnr(compared.speca.images, compared.full.images).tolist())
    assert 0 < compared.full.seconds < compared.full.seconds_total
    assert 0 < compared.speca.seconds < compared.speca.seconds_total


def test_comparison_as_json(compared: comparison.Comparison) -> None:
    figures = json.loads(compared.to_json())
    for name in ("flops_speedup", "wall_speedup", "wall_speedup_total", "psnr_median", "psnr_p5", "saved_wall_share"):
        assert isinstance(figures[name], float), name
    assert figures["model"] == "DiTTransformer2DModel"
    assert (figures["preset"], figures["steps"], figures["seeds"]) == ("custom", 12, SEEDS)
    assert figures["config"]["max_draft"] == 3
    assert {"name", "threads", "torch", "diffusers"} <= set(figures["hardware"])
    for sample, seed in zip(figures["samples"], SEEDS, strict=True):
        assert set(sample) == {"seed", "full", "accepted", "rejected", "psnr", "decisions"}
        assert sample["seed"] == seed
        assert len(sample["decisions"]) == sample["full"] + sample["accepted"] + sample["rejected"] == 12


@BOTH
def test_identical_samples_are_null_in_json_and_said_so(
    pipe: Any, config: speca.SpecaConfig | speca.VerifiedConfig, tmp_path: Path
) -> None:
    same = comparison.compare(pipe, CALL, SEEDS, dataclasses.replace(config, threshold=0.0))
    figures = json.loads(same.to_json())
    assert figures["psnr_median"] is figures["psnr_p5"] is figures["samples"][0]["psnr"] is None
    assert figures["identical"] == len(SEEDS)
    assert figures["saved_wall_share"] is None
    assert comparison.decibels(math.inf) == comparison.decibels(None) == "identical"
    same.grid(tmp_path / "grid.png")


def test_a_preset_keeps_its_name(pipe: Any) -> None:
    assert comparison.compare(pipe, CALL, SEEDS, "fast").preset == "fast"


def test_share_of_saved_flops_that_is_saved_in_time(compared: comparison.Comparison) -> None:
    known = dataclasses.replace(
        compared,
        full=dataclasses.replace(compared.full, seconds=10.0, seconds_total=12.0),
        speca=dataclasses.replace(compared.speca, seconds=4.0, seconds_total=6.0),
        report=dataclasses.replace(compared.report, flops=25.0, flops_full=100.0),
    )
    assert (known.wall_speedup, known.wall_speedup_total) == (2.5, 2.0)
    assert known.saved_wall_share == pytest.approx(0.6 / 0.75)


@BOTH
@pytest.mark.parametrize("name", ["flux", "hunyuan-video-cfg"])
def test_pipelines_with_embeddings_and_videos_are_compared_too(
    name: str, config: speca.SpecaConfig | speca.VerifiedConfig, tmp_path: Path
) -> None:
    case = tiny.PIPELINES[name]()
    call = {**case.arguments, **case.conditions(SEEDS), "num_inference_steps": 8}
    del call["output_type"]
    result = comparison.compare(case.pipe, call, SEEDS, config, batch=2)
    assert [len(sample.decisions) for sample in result.report.samples] == [8] * len(SEEDS)
    assert all(0 < value < math.inf for value in result.psnr)
    result.grid(tmp_path / "grid.png")


# -- pictures -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("count", "columns", "bands"), [(1, 1, 1), (8, 8, 1), (9, 5, 2), (16, 8, 2), (64, 11, 6)])
def test_grid_has_room_for_every_sample(count: int, columns: int, bands: int) -> None:
    full = torch.rand(count, 28, 28, 1)
    picture = pictures.draw_grid(full, full, ["boot\n30 dB"] * count, "t", "s")
    cell = 112 + pictures.GAP
    assert columns * cell < picture.width < (columns + 2) * cell
    assert bands * 3 * cell < picture.height < (bands + 1) * 4 * cell


def test_grid_draws_at_most_64_samples() -> None:
    full = torch.rand(70, 8, 8, 3)
    picture = pictures.draw_grid(full, full, ["x"] * 70, "t", "s")
    assert picture.size == pictures.draw_grid(full[:64], full[:64], ["x"] * 64, "t", "s").size


def test_grid_shows_full_above_speca_above_the_difference() -> None:
    full, other = torch.full((1, 28, 28, 1), 0.8), torch.full((1, 28, 28, 1), 0.6)
    picture = pictures.draw_grid(full, other, ["x"], "title", "subtitle")
    column = picture.convert("L").crop((116, 82, 228, 82 + 3 * 118))
    levels = [column.getpixel((56, 56 + 118 * row)) for row in range(3)]
    assert levels == [204, 153, 255]  # 0.2 five times amplified is 1


def test_grid_of_a_comparison(compared: comparison.Comparison, tmp_path: Path) -> None:
    named = dataclasses.replace(compared, model="tiny", captions=("a very long prompt about nothing", "b", "c"))
    named.grid(tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width > 3 * 112


@pytest.mark.parametrize(("peak", "factor"), [(0.0, 1), (0.9, 1), (0.3, 2), (0.01, 100), (0.04, 20)])
def test_amplification_is_round_and_does_not_clip(peak: float, factor: int) -> None:
    assert pictures.amplification(torch.full((1, 8, 8, 1), peak)) == factor


def test_a_video_is_an_animation_and_a_row_of_the_contact_sheet(tmp_path: Path) -> None:
    video = torch.rand(5, 16, 16, 3)
    pictures.save_webp(video, tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as animation:
        assert animation.n_frames == 5
        for k, frame in enumerate(video):
            animation.seek(k)
            seen = torch.from_numpy(np.array(animation.convert("RGB")).copy()).float() / 255
            assert (seen - frame).abs().max() < 0.01, "the animation is lossless and in order"
    sheet = pictures.contact_sheet(torch.stack([video, 1 - video, video]), ["a", "b", "c"])
    assert sheet.width == 5 * (112 + pictures.GAP) - pictures.GAP
    assert sheet.height == 3 * (112 + 22)
    assert sheet.getpixel((3, 3)) == tuple((video[0, 0, 0] * 255).round().int().tolist())
    assert sheet.getpixel((112 + pictures.GAP // 2, 3)) == pictures.LINE, "white frames are set apart"
    assert pictures.draw_grid(video[None], video[None], ["x"], "t", "s").width > 112


def test_a_comparison_that_learns_does_so_before_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECA_CACHE", str(tmp_path))
    case = tiny.dit()
    call = {"class_labels": [1, 2], "num_inference_steps": 20}
    config = speca.SpecaConfig.build(speedup=4)
    assert {s.full for s in comparison.compare(case.pipe, call, [3, 4], config, calibration="auto").report.samples} == {
        5
    }
    assert list(tmp_path.glob("*/*.json")), "a sample of another seed was learnt from"
