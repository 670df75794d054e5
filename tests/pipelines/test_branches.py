"""Branches, interruptions and few steps: guidance that comes and goes, a third branch, callbacks that intervene."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15TransformerBlock

import speca
import tiny
from pipelines.cases import RECIPES
from speca.diffusers.accelerator import ATTRIBUTE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
SEEDS = [3, 8]
LOOSE = dict(preset=tiny.VERIFYING, threshold=1e9, min_draft=0, max_draft=3)
ALL = list(range(tiny.STEPS))


def guided(guider: Callable[[], Any]) -> tiny.Case:
    recipe = RECIPES["hunyuan-video-1.5"]
    return dataclasses.replace(recipe, parts={**recipe.parts, "guider": guider}).build()


def branches(case: tiny.Case) -> dict[str, tuple[list[int], str]]:
    """Of each branch: the steps it took part in, and the decisions of the first sample."""
    run = case.transformer.__dict__[ATTRIBUTE]
    return {n: (b.records[0].steps, "".join(b.records[0].decisions)) for n, b in run.branches.items()}


def held(case: tiny.Case) -> int:
    run = case.transformer.__dict__[ATTRIBUTE]
    return sum(b.bytes() for b in run.branches.values())


def check(case: tiny.Case, **call: Any) -> dict[str, tuple[list[int], str]]:
    """Exact at threshold 0, and at a loose one the same twice, one letter a step; returns the branches."""
    plain = case(SEEDS, **call)
    speca.enable(case.pipe, tiny.VERIFYING, threshold=0.0, min_draft=0)
    assert torch.equal(case(SEEDS, **call), plain)
    speca.enable(case.pipe, **LOOSE)
    first = case(SEEDS, **call)
    assert not torch.equal(first, plain)
    assert torch.isfinite(first).all()
    assert torch.equal(case(SEEDS, **call), first)
    found = branches(case)
    taken = sorted({step for steps, _ in found.values() for step in steps})
    report = speca.report(case.pipe)
    assert [len(s.decisions) for s in report.samples] == [len(taken)] * len(SEEDS)
    for steps, decided in found.values():
        assert decided.startswith("FFF"), "a branch begins with a warm-up of its own"
        assert len(decided) == len(steps)
    assert held(case) == 0
    return found


# -- guidance that comes and goes ---------------------------------------------------------------------
def test_guidance_that_stops_leaves_the_other_branch_alone() -> None:
    found = check(RECIPES["lumina2"].build(), cfg_trunc_ratio=0.5)
    assert found == {"call": (ALL, "FFFAAAFAAAFAAF"), "call#2": (ALL[:7], "FFFAAAF")}


def test_guidance_that_stops_shrinks_the_batch() -> None:
    found = check(RECIPES["z-image"].build(), cfg_truncation=0.5)
    assert [steps for steps, _ in found.values()] == [ALL[:7], ALL[7:]]


def test_guidance_between_two_points() -> None:
    found = check(guided(lambda: diffusers.ClassifierFreeGuidance(start=0.2, stop=0.7)))
    assert found["pred_cond"] == (ALL, "FFFAAAFAAAFAAF")
    assert found["pred_uncond"] == (ALL[2:9], "FFFAAAF")


def test_a_branch_that_left_out_steps_keeps_nothing_and_begins_anew() -> None:
    case = RECIPES["flux-cfg"].build()
    speca.enable(case.pipe, **LOOSE)
    run = case.transformer.__dict__[ATTRIBUTE]
    kept: list[bool] = []

    def gap(pipe: Any, i: int, t: Any, kwargs: Any) -> dict[str, Any]:
        kept.append("uncond" in run.branches and run.branches["uncond"].kept is not None)
        return {}

    original, step = case.transformer.forward, [0]

    def forward(*args: Any, **kwargs: Any) -> Any:  # the pipeline calls cond and uncond; uncond is left out for a while
        step[0] += 1
        if step[0] % 2 == 0 and 5 <= step[0] // 2 - 1 < 8:
            return (kwargs["hidden_states"],)
        return original(*args, **kwargs)

    case.transformer.forward = forward
    case(SEEDS, callback_on_step_end=gap)
    del case.transformer.forward
    case.transformer.forward = original
    assert branches(case)["uncond"] == (ALL[:5] + ALL[8:], "FFFAA" + "FFFAAF")
    assert kept[5] and not any(kept[6:8]) and kept[8]


def test_skip_layer_guidance_of_sd3_is_a_branch() -> None:
    found = check(RECIPES["sd3"].build(), skip_guidance_layers=[1], skip_layer_guidance_stop=0.6)
    assert found == {"call": (ALL, "FFFAAAFAAAFAAF"), "call#2": (ALL[1:9], "FFFAAAFA")}


def test_skipping_the_verify_block_itself() -> None:
    found = check(RECIPES["sd3"].build(), skip_guidance_layers=[3], skip_layer_guidance_stop=0.6)
    assert found["call#2"] == (ALL[1:9], "FFFAAAFA")


@pytest.mark.parametrize("layer", [1, 3])
def test_three_branches_one_of_which_skips_a_block(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers skips blocks by hooks, for which this class of blocks is not registered
    TransformerBlockRegistry._register()
    monkeypatch.setattr(TransformerBlockRegistry, "_registry", dict(TransformerBlockRegistry._registry))
    metadata = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
    TransformerBlockRegistry.register(HunyuanVideo15TransformerBlock, metadata)
    config = diffusers.LayerSkipConfig(indices=[layer], fqn="transformer_blocks")
    settings = dict(skip_layer_config=config, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    found = check(guided(lambda: diffusers.SkipLayerGuidance(**settings)))
    assert {n: decided for n, (_, decided) in found.items()} == {
        "pred_cond": "FFFAAAFAAAFAAF", "pred_uncond": "FFFAAAFAAAFAAF", "pred_cond_skip": "FFFAAAFAAAFAF"
    }  # fmt: skip


def test_a_callback_that_switches_guidance_off() -> None:
    case = RECIPES["sd3"].build()
    names = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    cutoff = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=6)
    found = check(case, callback_on_step_end=cutoff, callback_on_step_end_tensor_inputs=names)
    assert [steps for steps, _ in found.values()] == [ALL[:7], ALL[7:]]
    assert len(speca.report(case.pipe).samples) == len(SEEDS)


def test_a_callback_that_changes_the_prompt_begins_a_branch() -> None:
    def swap(pipe: Any, i: int, t: Any, kwargs: Any) -> dict[str, Any]:
        return {"prompt_embeds": -kwargs["prompt_embeds"]} if i == 6 else {}

    names = ["latents", "prompt_embeds"]
    found = check(RECIPES["flux"].build(), callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names)
    assert [steps for steps, _ in found.values()] == [ALL[:7], ALL[7:]]


# -- callbacks, interruptions, several images ---------------------------------------------------------
@pytest.mark.parametrize("name", ["flux", "flux-cfg", "sd3", "wan-2.1"])
def test_a_callback_that_changes_latents(name: str) -> None:
    def damp(pipe: Any, i: int, t: Any, kwargs: Any) -> dict[str, Any]:
        return {"latents": kwargs["latents"] * 0.7} if i == 6 else {}

    check(RECIPES[name].build(), callback_on_step_end=damp)


@pytest.mark.parametrize("name", ["flux", "sd3", "hunyuan-video-cfg", "wan-2.1"])
def test_an_interrupted_run_is_reported_and_forgotten(name: str) -> None:
    def stop(pipe: Any, i: int, t: Any, kwargs: Any) -> dict[str, Any]:
        pipe._interrupt = i >= 5
        return {}

    case = RECIPES[name].build()
    assert {str(steps) for steps, _ in check(case, callback_on_step_end=stop).values()} == {str(ALL[:6])}
    speca.enable(case.pipe, **LOOSE)
    expected = case(SEEDS)
    case(SEEDS, callback_on_step_end=stop)
    assert speca.report(case.pipe).steps == 6
    assert held(case) == 0
    assert torch.equal(case(SEEDS), expected)


@pytest.mark.parametrize("name", ["flux-cfg", "sd3", "wan-2.2", "z-image"])
@pytest.mark.parametrize("at", [0, 4, 12])
def test_a_run_after_an_exception_is_like_any_other(name: str, at: int) -> None:
    case = RECIPES[name].build()
    speca.enable(case.pipe, **LOOSE)
    expected = case(SEEDS)

    def fail(pipe: Any, i: int, t: Any, kwargs: Any) -> dict[str, Any]:
        if i == at:
            raise RuntimeError("enough")
        return {}

    with pytest.raises(RuntimeError, match="enough"):
        case(SEEDS, callback_on_step_end=fail)
    assert torch.equal(case(SEEDS), expected)
    assert speca.report(case.pipe).steps == tiny.STEPS


@pytest.mark.parametrize("name", ["pixart-sigma", "sana", "qwen-image"])
def test_several_images_of_one_prompt(name: str) -> None:
    case = RECIPES[name].build()
    generators = [torch.Generator().manual_seed(s) for s in (1, 2, 3, 4)]

    def draw() -> torch.Tensor:
        for g, s in zip(generators, (1, 2, 3, 4), strict=True):
            g.manual_seed(s)
        call = {**case.arguments, **case.conditions(SEEDS), "num_images_per_prompt": 2}
        images: torch.Tensor = case.pipe(generator=generators, num_inference_steps=10, return_dict=False, **call)[0]
        return images

    plain = draw()
    speca.enable(case.pipe, tiny.VERIFYING, threshold=0.0, min_draft=0)
    assert torch.equal(draw(), plain)
    assert len(speca.report(case.pipe).samples) == 4


def test_a_run_that_starts_from_an_image_counts_the_steps_it_takes() -> None:
    case = RECIPES["flux-img2img"].build()
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS)
    assert branches(case) == {"call": (ALL[:10], "FFFAAAFAAF")}


# -- few steps ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["dit", "flux", "flux-img2img", "hunyuan-video-cfg", "sana"])
def test_few_steps_are_exact_and_say_why_nothing_is_saved(name: str) -> None:
    case = RECIPES[name].build()
    whole = dict(strength=1.0) if name == "flux-img2img" else {}
    for steps in range(1, 9):
        plain = case(SEEDS, steps=steps, **whole)
        speca.enable(case.pipe, **LOOSE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = [case(SEEDS, steps=steps, **whole) for _ in range(2)]
        said = [str(w.message) for w in caught if "nothing to forecast" in str(w.message)]
        report = speca.report(case.pipe)
        if steps <= 4:
            assert torch.equal(ours[0], plain) and torch.equal(ours[1], plain)
            assert len(report.notes) == 1
            assert f"{steps} steps leave nothing to forecast" in report.notes[0]
            assert len(said) == (steps < 4), "a warning, once"
            assert report.flops == report.flops_full
        else:
            assert not said
            assert {s.accepted for s in report.samples} == {steps - 4 - (steps == 8)}
        speca.disable(case.pipe)


def test_an_image_changed_little_leaves_nothing_to_forecast() -> None:
    case = RECIPES["flux-img2img"].build()
    plain = case(SEEDS, strength=0.285)
    speca.enable(case.pipe, **LOOSE)
    assert torch.equal(case(SEEDS, strength=0.285), plain)
    assert speca.report(case.pipe).notes == ("4 steps leave nothing to forecast with warmup=3, final=1.",)
    assert [s.decisions for s in speca.report(case.pipe).samples] == ["FFFF"] * 2


def test_a_run_with_nothing_to_draft_is_not_probed() -> None:
    case = RECIPES["flux"].build()
    calls: list[int] = []
    handle = case.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS, steps=4)
    handle.remove()
    assert len(calls) == 4
