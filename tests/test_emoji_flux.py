"""The invariants and the presets on the bundled text-to-image model."""

from __future__ import annotations

import pytest
import torch

import speca
import tiny
from speca import zoo
from speca.compare import psnr
from speca.config import PRESETS

SEEDS = [11, 12, 13]
STEPS = 16
PROMPTS = ("a red apple", "grinning face", "blue heart", "bicycle")


@pytest.fixture(scope="module")
def emoji() -> tiny.Case:
    pipe = zoo.load("emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    call = {**zoo.call_arguments("emoji-flux"), "output_type": "np"}
    return tiny.Case(pipe, call, lambda seeds: dict(prompt=[PROMPTS[s % len(PROMPTS)] for s in seeds]))


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
    emoji(SEEDS, steps=6)  # the self-test is paid here
    images = emoji(SEEDS, steps=30)
    assert speca.report(emoji.pipe).flops_speedup > (1.2 if preset == "faithful" else 1.8)
    if preset != "paper":
        assert psnr(images, plain).min() > 25


def test_pictures_are_of_what_was_asked(emoji: tiny.Case) -> None:
    """An apple is red and a heart blue: the mean colour of what is not background."""
    apple, face, heart, _ = emoji([0, 1, 2, 3], steps=STEPS)
    ink = [(x[x.min(dim=-1).values < 0.8]).mean(0).tolist() for x in (apple, face, heart)]
    assert ink[0][0] > 1.3 * max(ink[0][1:]), "red"
    assert min(ink[1][:2]) > 1.3 * ink[1][2], "yellow"
    assert ink[2][2] > 1.3 * ink[2][0], "blue"
