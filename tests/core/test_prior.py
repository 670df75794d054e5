"""The prior: its weights are the best linear ones, on processes whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from speca import ConfigError
from speca.core.prior import Prior
from speca.verified.forecasters import newton

STEPS = 20
AXIS = tuple(1 - i / STEPS for i in range(STEPS))


def process(*functions: np.ndarray) -> np.ndarray:
    """Moments of `v(t) = sum_k z_k f_k(t)`, z independent and of unit variance."""
    return sum((np.outer(f, f) for f in functions), start=1e-9 * np.eye(STEPS))


T = np.arange(STEPS, dtype=float)
STRAIGHT = Prior(AXIS, process(np.ones(STEPS), T / STEPS))
WAVE = Prior(AXIS, process(np.cos(T / 3), np.sin(T / 3)))


def test_straight_lines_give_the_weights_of_a_line() -> None:
    ours = STRAIGHT.weights([6, 2], [8, 11])
    grid = torch.tensor([[6.0, 2.0]] * 2, dtype=torch.float64)
    line = newton(grid, torch.tensor([2, 2]), torch.tensor([8.0, 11.0], dtype=torch.float64), 1)
    np.testing.assert_allclose(ours, line.numpy(), atol=0.02)


def test_a_wave_is_forecast_where_a_line_is_far_off() -> None:
    seen, target = [6, 2], 11
    z = np.random.default_rng(0).normal(size=(2, 500))
    v = np.stack([np.cos(T / 3), np.sin(T / 3)]).T @ z
    ours = WAVE.weights(seen, [target])[0] @ v[seen]
    assert np.abs(ours - v[target]).max() < 0.01
    line = v[6] + (v[6] - v[2]) / 4 * 5
    assert np.abs(line - v[target]).mean() > 0.5


def test_no_other_weights_do_better_on_the_process() -> None:
    rng = np.random.default_rng(1)
    walk = np.cumsum(np.eye(STEPS), axis=0)  # a random walk: the last value seen is all there is to know
    prior = Prior(AXIS, walk @ walk.T)
    best = prior.weights([9, 5], [12])[0]
    np.testing.assert_allclose(best, [1.0, 0.0], atol=1e-3)

    def missed(w: np.ndarray) -> float:
        c = np.zeros(STEPS)
        c[[9, 5]], c[12] = w, -1
        return float(c @ prior.moments @ c)

    assert all(missed(best) <= missed(best + 0.1 * rng.normal(size=2)) for _ in range(50))


def test_other_numbers_of_steps_lie_between() -> None:
    assert STRAIGHT.at(AXIS) is STRAIGHT
    fine = STRAIGHT.at(np.linspace(AXIS[0], AXIS[-1], 39))
    np.testing.assert_allclose(fine.moments[::2, ::2], STRAIGHT.moments, atol=1e-6)
    assert np.linalg.eigvalsh(fine.moments).min() > -1e-9
    coarse = STRAIGHT.at(AXIS[::4])
    np.testing.assert_allclose(coarse.moments, STRAIGHT.moments[::4, ::4], atol=1e-9)
    assert STRAIGHT.at(AXIS[::4]) is coarse


def test_plain_values_and_back() -> None:
    wave = Prior(AXIS, WAVE.moments, {3: (0, 1, 9)})
    again = Prior.from_dict(json.loads(json.dumps(wave.to_dict())))
    assert again.placed == {3: (0, 1, 9)}
    np.testing.assert_allclose(again.moments, WAVE.moments, rtol=1e-8)
    assert again.noise == WAVE.noise


@pytest.mark.parametrize(
    "moments",
    [np.ones((3, 3)), -np.eye(STEPS), np.full((STEPS, STEPS), np.nan), np.triu(np.ones((STEPS, STEPS)))],
    ids=["shape", "negative", "no numbers", "lopsided"],
)
def test_what_is_no_prior_is_refused(moments: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="no prior of 20 steps"):
        Prior(AXIS, moments)


def test_a_prior_covers_runs_whose_steps_lie_between_its_own() -> None:
    prior = Prior(tuple(np.linspace(1.0, 0.02, 50)), np.eye(50) + 1.0)
    assert (
        prior.covers(prior.noise) and prior.covers(prior.noise[::2]) and prior.covers(tuple(np.linspace(1, 0.02, 300)))
    )
    assert not prior.covers(tuple(np.linspace(1, 0.02, 1500))), "some 30 steps between two that were measured"
    assert not prior.at(prior.noise[25:]).covers(prior.noise), "the first half was not measured"
    assert prior.at(prior.noise[::10]).covers(prior.noise)


def test_the_innovation_that_is_expected_is_that_of_outputs_with_these_moments() -> None:
    generator = np.random.default_rng(0)
    outputs = generator.normal(size=(20_000, 5)) @ generator.normal(size=(5, 5))
    prior = Prior((1.0, 0.8, 0.6, 0.4, 0.2), outputs.T @ outputs / len(outputs))
    nodes, target = [2, 1, 0], 4
    missed = outputs[:, target] - outputs[:, nodes] @ prior.weights(nodes, [target])[0]
    assert prior.innovation(nodes, target) == pytest.approx(float((missed**2).mean()), rel=1e-6)
