"""The invariants and the presets on the bundled models that are asked in words."""

from __future__ import annotations

import pytest
import torch

import speca
import tiny
from speca import zoo
from speca.config import PRESETS
from speca.reports.comparison import psnr
from speca.reports.measure import example_call

SEEDS = [11, 12, 13]
STEPS = 16
PROMPTS = {
    "emoji-flux": ("a red apple", "grinning face", "blue heart", "bicycle"),
    "emoji-unet": ("a red apple", "grinning face", "blue heart", "water wave"),
    "emoji-video": ("a red apple moving left", "a banana moving up", "a penguin moving right", "a bus moving down"),
}


def case(model: str) -> tiny.Case:
    pipe = zoo.load(model)
    pipe.set_progress_bar_config(disable=True)
    call, prompts = {**zoo.call_arguments(model), "output_type": "np"}, PROMPTS[model]
    return tiny.Case(pipe, call, lambda seeds: dict(prompt=[prompts[s % len(prompts)] for s in seeds]))


@pytest.fixture(scope="module", params=list(PROMPTS))
def emoji(request: pytest.FixtureRequest) -> tiny.Case:
    return case(request.param)


@pytest.fixture(autouse=True)
def _disabled(emoji: tiny.Case):  # type: ignore[no-untyped-def]
    yield
    speca.disable(emoji.pipe)


def test_threshold_zero_and_disable_are_bit_identical(emoji: tiny.Case) -> None:
    plain = emoji(SEEDS, steps=STEPS)
    speca.enable(emoji.pipe, threshold=0.0)
    assert torch.equal(emoji(SEEDS, steps=STEPS), plain)
    speca.disable(emoji.pipe)
    assert torch.equal(emoji(SEEDS, steps=STEPS), plain)


def test_batch_mates_do_not_matter(emoji: tiny.Case) -> None:
    speca.enable(emoji.pipe, tolerance=0.02)
    together = emoji(SEEDS, steps=STEPS)
    decisions = [s.decisions for s in speca.report(emoji.pipe).samples]
    for i, seed in enumerate(SEEDS):
        alone = emoji([seed], steps=STEPS)
        assert speca.report(emoji.pipe).samples[0].decisions == decisions[i]
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_saves_and_stays_close(emoji: tiny.Case, preset: str) -> None:
    plain = emoji(SEEDS, steps=30)
    speca.enable(emoji.pipe, preset)
    emoji(SEEDS, steps=6)  # the self-test, where drafts are verified, is part of this run
    images = emoji(SEEDS, steps=30)
    if preset == "paper" and hasattr(emoji.pipe, "unet"):  # no list of blocks that a draft could verify with
        assert torch.equal(images, plain)
        return
    assert speca.report(emoji.pipe).flops_speedup > (1.2 if preset == "faithful" else 1.8)
    if preset != "paper":
        assert psnr(images, plain).min() > 25


def test_models_are_tried_with_prompts_of_their_kind() -> None:
    asked = {model: example_call(zoo.load(model), [0, 1])["prompt"] for model in PROMPTS}
    assert asked["emoji-video"] == ["a red apple moving left", "a sailboat moving right"]
    assert not any("moving" in prompt for model in ("emoji-flux", "emoji-unet") for prompt in asked[model])


@pytest.mark.parametrize("model", ["emoji-flux", "emoji-unet"])
def test_pictures_are_of_what_was_asked(model: str) -> None:
    """An apple is red and a heart blue: the mean colour of what is not background."""
    apple, face, heart, _ = case(model)([0, 1, 2, 3], steps=STEPS)
    ink = [(x[x.min(dim=-1).values < 0.8]).mean(0).tolist() for x in (apple, face, heart)]
    assert ink[0][0] > 1.3 * max(ink[0][1:]), "red"
    assert min(ink[1][:2]) > 1.3 * ink[1][2], "yellow"
    assert ink[2][2] > 1.3 * ink[2][0], "blue"


def test_clips_move_as_asked_and_show_what_was_asked() -> None:
    """An apple is red, a banana yellow; ink goes left, up, right and down."""
    clips = case("emoji-video")([0, 1, 2, 3], steps=STEPS)  # (N, frames, H, W, C)
    ink = (1 - clips).mean(-1).clamp_min(0.1) - 0.1
    grid = torch.arange(64.0)
    across, down = (((ink.sum(axis) * grid).sum(-1) / ink.sum((2, 3))) for axis in (2, 3))
    moved = torch.stack([across[:, -1] - across[:, 0], down[:, -1] - down[:, 0]], 1)
    assert moved.abs().argmax(1).tolist() == [0, 1, 0, 1]
    assert torch.sign(moved[range(4), [0, 1, 0, 1]]).tolist() == [-1, -1, 1, 1]
    apple, banana = [x[x.min(dim=-1).values < 0.6].mean(0).tolist() for x in clips[:2]]
    assert apple[0] > 1.5 * max(apple[1:]), "red"
    assert min(banana[:2]) > 1.3 * banana[2], "yellow"
