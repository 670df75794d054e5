"""The dry run of sampler functions: what it finds, what it refuses, and that it touches nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sampler.kdiffusion import MEMORY, NOISY, SAMPLERS, sampling
from speca.sampler.function import function_response

STEPS = 20
KARRAS = sampling.get_sigmas_karras(STEPS, 0.03, 14.6)
FLOW = torch.linspace(1, 0, STEPS + 1)


@pytest.mark.parametrize("sigmas", [KARRAS, FLOW], ids=["karras", "flow"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_each_sampler_of_k_diffusion_does(name: str, sigmas: Tensor) -> None:
    found = function_response(SAMPLERS[name], sigmas)
    if not MEMORY[name]:
        assert found.transitions == () and "depend on values" in found.reason
        return
    assert found.reason == "" and len(found.transitions) == len(found.times) == len(found.noise)
    assert {len(t.keep) for t in found.transitions} == {MEMORY[name]}
    assert {t.noisy for t in found.transitions} == {name in NOISY}
    assert found.times[0] == pytest.approx(float(sigmas[0])) and found.noise[0] == max(found.noise)


def test_the_response_predicts_a_run() -> None:
    """The transitions applied to outputs give the samples that the function computes with them."""
    from speca.core.transition import advance

    for name in ("euler", "heun", "dpmpp_2m", "lms"):
        found = function_response(SAMPLERS[name], KARRAS)
        generator = torch.Generator().manual_seed(0)
        outputs = torch.randn((len(found.times), 3, 1), generator=generator, dtype=torch.float64)
        given = iter(outputs)
        seen: list[Tensor] = []

        def denoise(x: Tensor, sigma: Tensor, given: Any = given, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x - sigma.view(-1, 1) * next(given)

        x = torch.zeros((3, 1), dtype=torch.float64)
        end = SAMPLERS[name](denoise, x, KARRAS.double(), disable=True)
        change = [torch.zeros_like(x)] * len(found.transitions[0].keep)
        for step, output in zip(found.transitions, outputs, strict=True):
            change = advance(change, step, output)
        assert torch.allclose(change[0], end, rtol=1e-6, atol=1e-8), name


def test_random_generators_are_left_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    for name in ("euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde"):
        function_response(SAMPLERS[name], KARRAS)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_noise_is_what_is_added_not_what_is_asked_for() -> None:
    """`res_multistep` of ComfyUI asks its noise sampler even where it adds none."""

    def asks(model: Any, x: Tensor, sigmas: Tensor, noise_sampler: Any = None, eta: float = 0.0) -> Tensor:
        for now, following in itertools.pairwise(sigmas):
            d = (x - model(x, now * x.new_ones(len(x)))) / now
            x = x + d * (following - now) + eta * noise_sampler(now, following)
        return x

    assert not function_response(asks, KARRAS).transitions[0].noisy
    assert function_response(asks, KARRAS, options={"eta": 1.0}).transitions[0].noisy


def test_what_is_not_linear_says_why() -> None:
    def clips(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        for now, following in itertools.pairwise(sigmas):
            denoised = model(x, now * x.new_ones(len(x))).clamp(-1, 1)
            x = denoised + (x - denoised) * following / now
        return x

    assert "clips is not linear" in function_response(clips, KARRAS).reason

    def fails(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        raise ValueError("it wants something else")

    assert "cannot be run on its own (ValueError: it wants something else)" in function_response(fails, KARRAS).reason

    def second_output(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return model(x, sigmas[0], model_options={"sampler_post_cfg_function": [lambda args: args["denoised"]]})

    assert "second output" in function_response(second_output, KARRAS).reason


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "heun3"])
@pytest.mark.parametrize("rising", [False, True])
def test_solvers_of_torchdiffeq_are_sampler_functions(method: str, rising: bool) -> None:
    from torchdiffeq import odeint

    def solve(denoise: Any, x: Tensor, times: Tensor) -> Tensor:
        made: Tensor = odeint(lambda t, y: denoise(y, t), x, times, method=method)
        return made[-1]

    times = torch.linspace(0, 1, 11) if rising else torch.linspace(1, 0, 11)
    found = function_response(solve, times, "velocity")
    calls = {"euler": 1, "midpoint": 2, "rk4": 4, "heun3": 3}[method]
    assert len(found.transitions) == 10 * calls
    # The velocity of x = t noise + (1 - t) x_0 is noise - x_0; with rising times it is the other way round.
    assert found.transitions[4].parts == pytest.approx((-1.0, 1.0) if rising else (1.0, -1.0), abs=1e-4)


def test_an_adaptive_solver_is_refused() -> None:
    from torchdiffeq import odeint

    def solve(denoise: Any, x: Tensor, times: Tensor) -> Tensor:
        made: Tensor = odeint(lambda t, y: denoise(y, t), x, times, method="dopri5")
        return made[-1]

    found = function_response(solve, torch.linspace(1, 0, 11), "velocity")
    assert not found.transitions and "depend on values" in found.reason
