"""Whole pipelines of diffusers, unmodified: exact at threshold 0, really drafting at a loose one, rows on their own."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import FluxAutoBlocks

import speca
import tiny
from pipelines.cases import FLUX_TEXT, RECIPES
from speca.diffusers.components import denoisers_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
SEEDS = [3, 8]
LOOSE = dict(preset=tiny.VERIFYING, threshold=1e9, min_draft=0, max_draft=3)
BEGINS_LATER = {"flux-img2img": 10, "flux-inpaint": 13, "sd3-img2img": 12, "wan-v2v": 11}
"""Steps taken by the pipelines that start from an image."""


@functools.lru_cache(maxsize=1)
def prepared(name: str) -> tuple[tiny.Case, torch.Tensor]:
    """A pipeline, and what it gives without acceleration."""
    case = RECIPES[name].build()
    return case, case(SEEDS)


@pytest.fixture(params=RECIPES)
def named(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def decisions(case: tiny.Case) -> list[str]:
    return [s.decisions for s in speca.report(case.pipe).samples]


def expected(steps: int) -> str:
    """Decisions of an endlessly loose threshold, over the steps of one transformer."""
    return ("FFF" + "AAAF" * steps)[: steps - 1] + "F"


def test_exact_at_threshold_zero_and_restored(named: str) -> None:
    case, plain = prepared(named)
    assert torch.isfinite(plain).all()
    speca.enable(case.pipe, tiny.VERIFYING, threshold=0.0, min_draft=0)
    assert torch.equal(case(SEEDS), plain)
    assert {"R"} < set("".join(decisions(case))) <= {"F", "R"}
    assert not [n for n in speca.report(case.pipe).notes if "plainly" in n]
    speca.disable(case.pipe)
    assert torch.equal(case(SEEDS), plain)


def test_drafts_at_a_loose_threshold_and_repeats(named: str) -> None:
    case, plain = prepared(named)
    speca.enable(case.pipe, **LOOSE)
    first = case(SEEDS)
    assert not torch.equal(first, plain) and torch.isfinite(first).all()
    assert torch.equal(case(SEEDS), first), "something was left behind by the first run"
    report = speca.report(case.pipe)
    steps = BEGINS_LATER.get(named, tiny.STEPS)
    if len(denoisers_of(case.pipe)) == 1:
        assert decisions(case) == [expected(steps)] * len(SEEDS)
    assert report.steps == steps and report.notes == ()
    assert report.flops_speedup > 1
    assert report.bytes_per_sample > 0


def test_two_at_once_are_each_alone(named: str) -> None:
    case, _ = prepared(named)
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS)
    speca.enable(
        case.pipe,
        tiny.VERIFYING,
        threshold=tiny.threshold_in_a_gap(case),
        threshold_decay=1.0,
        min_draft=0,
        max_draft=4,
    )
    together, decided = case(SEEDS), decisions(case)
    assert {"A", "R"} <= set("".join(decided))
    for row, seed in enumerate(SEEDS):
        alone = case([seed])
        assert decisions(case) == [decided[row]]
        torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


@pytest.mark.parametrize("name", ["flux", "hunyuan-video", "wan-2.1", "sd3", "chroma"])
def test_half_precision_rounds_timesteps_but_moves_no_step(name: str) -> None:
    case, steps = RECIPES[name].build(), 40
    for part in (case.pipe.transformer, getattr(case.pipe, "vae", None)):
        if part is not None:
            part.to(torch.bfloat16)
    draw = case.conditions
    case.conditions = lambda seeds: {
        n: v.bfloat16() if torch.is_floating_point(v) else v for n, v in draw(seeds).items()
    }
    plain = case(SEEDS, steps=steps)
    speca.enable(case.pipe, tiny.VERIFYING, threshold=0.0, min_draft=0)
    assert torch.equal(case(SEEDS, steps=steps), plain)
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS, steps=steps)
    assert decisions(case) == [expected(steps)] * len(SEEDS)


def test_a_modular_pipeline() -> None:
    blocks = FluxAutoBlocks()
    for name in ("text_encoder", "vae_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe.update_components(transformer=tiny.flux_transformer(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        made = {name: draw(SEEDS) for name, draw in FLUX_TEXT.items()}
        generators = [torch.Generator().manual_seed(s) for s in SEEDS]
        size = dict(height=64, width=64, num_inference_steps=tiny.STEPS)
        with torch.no_grad():
            return torch.as_tensor(pipe(**made, **size, generator=generators, output="latents"))

    plain = draw()
    speca.enable(pipe, tiny.VERIFYING, threshold=0.0, min_draft=0)
    assert torch.equal(draw(), plain)
    speca.enable(pipe, **LOOSE)
    first = draw()
    assert torch.equal(draw(), first)
    assert [s.decisions for s in speca.report(pipe).samples] == [expected(tiny.STEPS)] * len(SEEDS)


def test_both_denoisers_of_wan_are_in_one_report() -> None:
    case = RECIPES["wan-2.2"].build()
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS)
    case(SEEDS)
    high, low = (speca.report(m) for m in (case.pipe.transformer, case.pipe.transformer_2))
    report = speca.report(case.pipe)
    assert report == high == low, "one run, one report"
    first = report.samples[0].decisions
    at = first.index("AFFFA") + 1  # the second transformer begins with a warm-up of its own
    assert len(first) == tiny.STEPS and first == expected(at)[:-1] + first[at - 1] + expected(tiny.STEPS - at)
    assert report.model == "WanTransformer3DModel"
    assert 1.2 < report.flops_speedup
