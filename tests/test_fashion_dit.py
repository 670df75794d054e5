"""The invariants and the default preset on the bundled, trained model."""

from __future__ import annotations

import pytest
import torch

import speca
import tiny
from speca.config import PRESETS
from speca.reports.comparison import psnr, quantile

SEEDS = [11, 12, 13, 14]


@pytest.fixture(scope="module")
def garments() -> tiny.Case:
    pipe = speca.zoo.load("fashion-dit")
    pipe.set_progress_bar_config(disable=True)
    return tiny.Case(pipe, dict(output_type="np"), lambda seeds: dict(class_labels=[s % 10 for s in seeds]))


@pytest.fixture(autouse=True)
def _disabled(garments: tiny.Case):  # type: ignore[no-untyped-def]
    yield
    speca.disable(garments.pipe)


def test_threshold_zero_and_disable_are_bit_identical(garments: tiny.Case) -> None:
    plain = garments(SEEDS)
    speca.enable(garments.pipe, tiny.VERIFYING, threshold=0.0, min_draft=0)
    assert torch.equal(garments(SEEDS), plain)
    speca.disable(garments.pipe)
    assert torch.equal(garments(SEEDS), plain)


def test_batch_mates_do_not_matter(garments: tiny.Case) -> None:
    speca.enable(garments.pipe, tiny.VERIFYING, threshold=0.02, threshold_decay=1.0, max_draft=6)
    together = garments(SEEDS, steps=24)
    decisions = [s.decisions for s in speca.report(garments.pipe).samples]
    assert len(set(decisions)) > 1, "the samples must differ for this test to say anything"
    for i, seed in enumerate(SEEDS):
        alone = garments([seed], steps=24)
        assert speca.report(garments.pipe).samples[0].decisions == decisions[i]
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=2e-3)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_runs_and_saves(garments: tiny.Case, preset: str) -> None:
    speca.enable(garments.pipe, preset)
    images = garments(SEEDS, steps=30)
    report = speca.report(garments.pipe)
    assert report.flops_speedup > 1.3 and images.isfinite().all()
    assert all(len(s.decisions) == 30 for s in report.samples)


def test_balanced_saves_two_thirds_at_35_db(garments: tiny.Case) -> None:
    """Ten samples on seeds that tuned nothing; the published figure uses 64."""
    seeds = list(range(900, 910))
    plain = garments(seeds, steps=50)
    speca.enable(garments.pipe)
    values = psnr(garments(seeds, steps=50), plain).tolist()
    assert speca.report(garments.pipe).flops_speedup >= 3
    assert quantile(values, 0.5) >= 35
