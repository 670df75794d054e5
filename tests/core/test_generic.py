"""The generic prior against what is known exactly: data that really are Gaussian, on the paths of real samplers."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from speca.core.correction import polynomial
from speca.core.generic import blended, filled, generic
from speca.core.placement import place
from speca.core.prior import Prior
from speca.core.transition import Transition
from speca.sampler.scheduler import scheduler_response

STEPS = 40
SAMPLERS: dict[str, Any] = {
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddim of velocities": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "ddim of data": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm-solver": diffusers.DPMSolverMultistepScheduler,
    "unipc": lambda: diffusers.UniPCMultistepScheduler(solver_order=3),
}


@pytest.fixture(params=list(SAMPLERS))
def run(request: pytest.FixtureRequest) -> tuple[str, tuple[float, ...], tuple[Transition, ...]]:
    scheduler = SAMPLERS[request.param]()
    scheduler.set_timesteps(STEPS)
    found = scheduler_response(scheduler)
    assert found.transitions, found.reason
    return request.param, found.noise, found.transitions


def outputs(kind: str, steps: tuple[Transition, ...], variance: float) -> np.ndarray:
    """What a perfect model of Gaussian data returns along a trajectory, per unit of its start."""
    p = np.array([t.signal for t in steps])
    q = np.array([t.size for t in steps]) - p
    s = np.sqrt(p**2 * variance + q**2)
    data, noise = p * variance / s, q / s
    returned = {"flow": noise - data, "ddim of velocities": p * noise - q * data, "ddim of data": data}
    return returned.get(kind, noise)


def test_it_forecasts_gaussian_data_better_than_polynomials(
    run: tuple[str, tuple[float, ...], tuple[Transition, ...]],
) -> None:
    kind, noise, steps = run
    if kind == "ddim of data":
        pytest.skip("guesses of Gaussian data begin at nothing; those of guided models do not, and count more")
    prior = generic(noise, steps)
    assert prior is not None
    ours, lines = 0.0, 0.0
    for variance in (0.02, 0.05, 0.2, 0.5, 1.5):
        values = outputs(kind, steps, variance)
        for newest in range(6, STEPS - 5):
            nodes, target = [newest, newest - 3, newest - 6], newest + 4
            line = np.array(polynomial([float(n) for n in nodes[:2]], [float(target)])[0])
            ours += float(prior.weights(nodes, [target])[0] @ values[nodes] - values[target]) ** 2
            lines += float(line @ values[nodes[:2]] - values[target]) ** 2
    assert ours < 0.7 * lines, (ours, lines)


def test_it_is_a_prior_of_every_step(run: tuple[str, tuple[float, ...], tuple[Transition, ...]]) -> None:
    _, noise, steps = run
    prior = generic(noise, steps)
    assert isinstance(prior, Prior) and prior.noise == noise
    assert np.linalg.eigvalsh(prior.moments).min() > -1e-9 * np.trace(prior.moments)
    errors = [place(prior, steps, count).error for count in (5, 8, 13, 20)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 4
    assert generic(noise, steps) is prior, "found once for a sampler and its steps"


def test_a_step_that_keeps_the_sample_does_not_spoil_it() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(STEPS)
    found = scheduler_response(scheduler)
    assert found.transitions[-1].inert, "the last step of this schedule leads nowhere"
    prior = generic(found.noise, found.transitions)
    assert prior is not None
    scale = np.diag(prior.moments)
    assert scale.max() < 3 * scale.min()


def test_an_unknown_path_has_none() -> None:
    assert generic((1.0, 0.5), (Transition((1.0,), (-0.5,)),) * 2) is None


def test_rows_of_a_run_agree_with_torch(run: tuple[str, tuple[float, ...], tuple[Transition, ...]]) -> None:
    """The path that is read off a scheduler is the one its own mixing of data and noise takes."""
    kind, _, steps = run
    scheduler = SAMPLERS[kind]()
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(1, 4, 2, 2, generator=generator) for _ in range(2))
    mix = getattr(scheduler, "scale_noise", None)
    for index in (3, STEPS // 2, STEPS - 1):
        t, step = scheduler.timesteps[index][None], steps[index]
        told = mix(data, t, noise) if mix else scheduler.add_noise(data, noise, t)
        torch.testing.assert_close(step.signal * data + (step.size - step.signal) * noise, told, rtol=1e-3, atol=1e-3)


def test_a_prior_of_some_steps_is_filled_where_the_sampler_puts_the_others() -> None:
    """Exact at what was measured; and where outputs are as the generic prior says, so they are between."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(20)
    response = scheduler_response(scheduler)
    truth = generic(response.noise, response.transitions)
    assert truth is not None
    some = [0, 3, 7, 12, 16, 19]
    measured = Prior(tuple(truth.noise[s] for s in some), 1.7 * truth.moments[np.ix_(some, some)])
    found = filled(measured, response.noise, response.transitions)
    assert found.noise == response.noise
    np.testing.assert_allclose(found.moments[np.ix_(some, some)], measured.moments, rtol=1e-3)
    np.testing.assert_allclose(found.moments, 1.7 * truth.moments, rtol=2e-2)


def test_a_blended_prior_keeps_mean_squares_and_is_less_sure_of_the_rest() -> None:
    """Outputs that one run shows to be exactly equal are not taken to be so."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(20)
    response = scheduler_response(scheduler)
    equal = Prior(response.noise, np.ones((20, 20)) + 1e-9 * np.eye(20))
    found = blended(equal, response.transitions)
    np.testing.assert_allclose(np.diag(found.moments), 1.0)
    other = generic(response.noise, response.transitions)
    assert other is not None
    scale = 1 / np.sqrt(np.diag(other.moments))
    np.testing.assert_allclose(found.moments, 0.99 * equal.moments + 0.01 * scale[:, None] * other.moments * scale)
    assert found.innovation([0], 19) > 100 * equal.innovation([0], 19)
