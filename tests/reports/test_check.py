"""check: what it finds is what a run does."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest

import speca
import tiny
from speca.diffusers.accelerator import ATTRIBUTE

FOUND = {
    "dit": ("transformer_blocks x 4", "transformer_blocks.3", {"hidden_states"}),
    "flux": (
        "transformer_blocks x 2, single_transformer_blocks x 3",
        "single_transformer_blocks.2",
        {"hidden_states", "encoder_hidden_states"},
    ),
    "hunyuan-video": (
        "transformer_blocks x 2, single_transformer_blocks x 3",
        "single_transformer_blocks.2",
        {"hidden_states", "encoder_hidden_states"},
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_check_tells_what_was_discovered(name: str) -> None:
    case = tiny.PIPELINES[name]()
    found = speca.check(case.pipe, lambda: case([1], steps=8))
    assert found.supported and found.self_test.startswith("passed")
    assert (found.blocks, found.verify_block, set(found.state)) == FOUND[name]
    assert found.flops_full is not None and found.flops_draft is not None
    assert 0 < found.flops_draft < found.flops_full
    assert ATTRIBUTE not in case.transformer.__dict__
    json.dumps(found.to_dict())
    assert found.verify_block in str(found)


@pytest.mark.parametrize("preset", ["fast", tiny.VERIFYING], ids=["forecast", "verified"])
def test_memory_per_sample_is_that_of_a_run(case: tiny.Case, preset: Any) -> None:
    found = speca.check(case.pipe, lambda: case([1], steps=8), preset, order=2)
    assert found.supported
    assert found.sampler == ("linear, memory 1" if preset == "fast" else "not asked for by preset 'paper'")
    speca.enable(case.pipe, preset, order=2)
    case([3, 4, 5])
    assert found.bytes_per_sample == speca.report(case.pipe).bytes_per_sample
    assert f"{found.bytes_per_sample / 2**20:.3f} MiB per sample" in str(found)


def test_a_run_too_short_to_forecast_anything_still_tells_of_the_model() -> None:
    case = tiny.dit()
    with pytest.warns(UserWarning, match="3 steps leave nothing to forecast"):
        found = speca.check(case.pipe, lambda: case([1], steps=3))
    assert found.supported and found.verify_block == FOUND["dit"][1]
    assert found.bytes_per_sample is None and "nothing is held" in str(found)
    assert ATTRIBUTE not in case.transformer.__dict__


def test_an_unsupported_model_says_why() -> None:
    case = tiny.dit()
    case.transformer.train()
    with pytest.warns(UserWarning, match="training mode"):
        found = speca.check(case.pipe, lambda: case([1], steps=8))
    assert not found.supported and "training mode" in found.reason
    assert "not possible" in str(found) and found.reason in str(found)


def test_a_model_without_blocks_is_forecast_but_cannot_be_verified() -> None:
    unet = tiny.randomised(
        diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8),
            norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )
    )  # fmt: skip
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="do not depend on the blocks before it"):
        found = speca.check(pipe, lambda: pipe(num_inference_steps=8))
    assert not found.supported and "block" in found.reason
    assert found.sampler == "linear, memory 1" and found.bytes_per_sample == 3 * (4 * 3 * 8 * 8) + 4
    assert "not possible" in str(found) and found.self_test == "not run"
    json.dumps(found.to_dict())


def test_a_sampler_that_is_not_linear_says_why() -> None:
    case = tiny.dit()
    case.pipe.scheduler = diffusers.DDIMScheduler(clip_sample=True)
    found = speca.check(case.pipe, lambda: case([1], steps=8))
    assert found.supported and "DDIMScheduler" in found.sampler and "linear" in found.sampler
    assert not found.sampler.startswith("linear") and found.sampler in str(found)
