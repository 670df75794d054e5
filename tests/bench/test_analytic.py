"""Denoisers in closed form: exact by Tweedie's formula, and what a budget gives on models that nobody tuned on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import speca
from speca.bench.analytic import PATHS, AnalyticModel, analytic, draw

STEPS, FULL = 50, 10
SEEDS = list(range(16))


def log_density(model: AnalyticModel, x: Tensor, p: Tensor, q: Tensor, label: int) -> Tensor:
    """Of `x` (n, D) under the mixtures, noised; without guidance."""
    parts = x.view(len(x), model.means.shape[0], 1, model.means.shape[2])
    spread = (p**2).view(-1, 1, 1) * model.variances + (q**2).view(-1, 1, 1)
    apart = (parts - p.view(-1, 1, 1, 1) * model.means).square().sum(-1)
    each = -apart / (2 * spread) - 0.5 * model.means.shape[2] * spread.log() + model.logits[label]
    return each.logsumexp(-1).sum(-1)


@pytest.mark.parametrize("seed", [1, 3, 5, 17])
def test_the_guess_of_the_data_is_the_mean_of_the_posterior(seed: int) -> None:
    """`E[x_0 | x] = (x + q^2 grad log density) / p`, Tweedie's formula."""
    model = analytic(seed)
    unguided = AnalyticModel(model.name, model.path, model.means, model.variances, model.logits, 1.0)
    p, q = torch.tensor([0.9, 0.5, 0.1]).double(), torch.tensor([0.3, 0.5, 0.95]).double()
    x = unguided.noise([0, 1, 2]).double().requires_grad_()
    (score,) = torch.autograd.grad(log_density(unguided, x, p, q, 2).sum(), x)
    wanted = (x + q.square().view(-1, 1) * score) / p.view(-1, 1)
    torch.testing.assert_close(unguided.denoised(x, p, q, torch.full((3,), 2)), wanted.detach(), rtol=1e-6, atol=1e-6)


def test_models_are_drawn_from_their_seeds() -> None:
    models = [analytic(seed) for seed in range(24)]
    assert {m.path for m in models[::2]} == {m.path for m in models[1::2]} == set(PATHS)
    assert len({m.name for m in models}) == 24 and torch.equal(analytic(7).means, models[7].means)
    assert max(m.size for m in models) >= 100 * min(m.size for m in models)


def test_a_budget_of_a_model_that_nobody_measured_is_no_worse_than_as_many_steps() -> None:
    """On eleven reporting models, flows and EDM, of which the placement and the corrections were told nothing."""
    gains = []
    for model in (analytic(seed) for seed in range(1, 33, 2)):
        if model.path != "vp":
            full = draw(model, SEEDS, STEPS)
            ours, fewer = (
                (found - full).square().mean(1).log10().median()
                for found in (draw(model, SEEDS, STEPS, speedup=STEPS / FULL), draw(model, SEEDS, FULL))
            )
            gains.append(10 * float(fewer - ours))
    assert len(gains) == 11
    assert min(gains) > -0.5, "in dB at the median of the samples"
    assert sum(gains) / len(gains) > 6


def euler(denoise: Any, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    for here, there in pairwise(times):
        x = x + (there - here) * denoise(x, here, labels=labels)
    return x


@pytest.mark.parametrize(("steps", "full"), [(50, 16), (50, 10), (50, 7), (28, 9)])
@pytest.mark.parametrize(("calibration", "worth"), [("auto", 12), ("online", 9)])
def test_what_one_run_shows_is_worth_many_decibels_and_costs_none(
    calibration: Any, worth: float, steps: int, full: int
) -> None:
    """On eight reporting flows of 64 elements or more, learnt from a run of another seed."""
    labels, times, gains = torch.tensor(SEEDS) % 4, torch.linspace(1, 0, steps + 1), []
    flows = [model for seed in range(1, 100, 2) if (model := analytic(seed)).path == "flow"]
    for model in [model for model in flows if model.size >= 64][:8]:

        def velocity(x: Tensor, time: Tensor, labels: Tensor, model: AnalyticModel = model) -> Tensor:
            return model(x, time.reshape(-1).expand(len(x)), labels.expand(len(x)))

        denoise = speca.Denoiser(
            velocity, sampler=euler, sigmas=times, prediction="velocity", options={"labels": labels[:1]},
            speedup=steps / full, calibration=calibration,
        )  # fmt: skip
        euler(denoise, model.noise([700_123]), times, labels[:1])
        x = model.noise(SEEDS)
        whole = euler(velocity, x, times, labels)
        few = euler(velocity, x, torch.linspace(1, 0, full + 1), labels)
        error, plain = ((y - whole).square().mean(1).median() for y in (euler(denoise, x, times, labels), few))
        assert denoise.report().samples[0].full == full
        gains.append(10 * float((plain / error).log10()))
    assert min(gains) > -0.5
    assert sum(gains) / len(gains) > worth
