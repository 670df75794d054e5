"""Denoiser: one's own loops and sampler functions, with k-diffusion's samplers and solvers of torchdiffeq."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import speca
import tiny
from sampler.kdiffusion import MEMORY, NOISY, SAMPLERS, sampling
from speca.core.correction import polynomial

STEPS = 20
KARRAS = sampling.get_sigmas_karras(STEPS, 0.03, 14.6)
LINEAR = [name for name in SAMPLERS if MEMORY[name]]


class Toy(torch.nn.Module):
    """A denoiser with EDM's preconditioning around a small random network; counts the rows that it computes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = torch.nn.Parameter(torch.randn((8, 8), generator=generator) / 3)
        self.rows = 0

    def forward(self, x: Tensor, sigma: Any, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
        self.rows += len(x)
        s = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1)
        raw = torch.tanh(x / (s**2 + 1).sqrt() @ self.mix + 0.1 * s.log()) * scale
        raw = raw if shift is None else raw + shift
        return x / (s**2 + 1) + raw * s / (s**2 + 1).sqrt()


def noise(rows: int = 3) -> Tensor:
    return torch.randn((rows, 8), generator=torch.Generator().manual_seed(1)) * KARRAS[0]


def run(sampler: Callable[..., Tensor], model: Any, x: Tensor, sigmas: Tensor = KARRAS, **more: Any) -> Tensor:
    torch.manual_seed(5)
    options = dict(disable=True) if sampler in SAMPLERS.values() else {}
    with torch.no_grad():
        return sampler(model, x, sigmas, **options, **more)


@pytest.mark.parametrize("name", LINEAR)
def test_every_step_in_full_hands_back_the_models_own_tensors(name: str) -> None:
    model, given = Toy(), []
    plain = run(SAMPLERS[name], model, noise())
    denoise = speca.Denoiser(model, sampler=SAMPLERS[name], sigmas=KARRAS, tolerance=0.0)

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        given.append(denoise(x, sigma))
        return given[-1]

    assert torch.equal(run(SAMPLERS[name], watched, noise()), plain)
    assert denoise.report().flops_speedup == 1.0
    kept: list[Tensor] = []

    def keeping(x: Tensor, sigma: Tensor) -> Tensor:
        kept.append(model(x, sigma))
        return kept[-1]

    exact = speca.Denoiser(keeping, sampler=SAMPLERS[name], sigmas=KARRAS, tolerance=0.0)
    run(SAMPLERS[name], lambda x, sigma: given.append(exact(x, sigma)) or given[-1], noise())
    assert given[-1] is kept[-1], "the model's own tensor, not a copy"


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("speedup", [2, 4])
def test_a_budget_is_kept_and_runs_repeat(name: str, speedup: int) -> None:
    model = Toy()
    denoise = speca.Denoiser(model, sampler=SAMPLERS[name], sigmas=KARRAS, speedup=speedup)
    first = run(SAMPLERS[name], denoise, noise())
    calls = len(denoise.response.times)
    report = denoise.report()
    assert {(len(s.decisions), s.full) for s in report.samples} == {(calls, calls // speedup)}
    assert model.rows == report.evaluations == 3 * (calls // speedup) and report.evaluations_full == 3 * calls
    assert torch.equal(run(SAMPLERS[name], denoise, noise()), first), "another run begins when one has ended"
    assert torch.allclose(run(SAMPLERS[name], denoise, noise()[1:2]), first[1:2], atol=1e-4) or name in NOISY


@pytest.mark.parametrize("name", LINEAR)
def test_the_final_sample_is_that_of_the_interpolated_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as running the sampler on outputs whose drafts are interpolated between the full steps around them."""
    tiny.take_corrections_whole(monkeypatch)
    sampler, x = SAMPLERS[name], noise(2)
    times = speca.Denoiser(Toy(), sampler=sampler, sigmas=KARRAS).response.times
    total = len(times)
    outputs = [(x / 20).roll(1, 1) * math.cos(3 * i / total) + (x / 20).roll(2, 1) * i / total for i in range(total)]
    calls = iter(range(10**6))

    def of(outputs: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        places = iter(outputs)
        return lambda x, sigma: x - sigma.view(-1, 1) * next(places)

    full = (0, 1, 2, 5, 6, 10, total - 3, total - 2, total - 1)
    at = {"call": 0}

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma.view(-1, 1) * outputs[at["call"]]

    denoise = speca.Denoiser(model, sampler=sampler, sigmas=KARRAS, schedule=full, prior="none")
    response = denoise.response
    flat = tuple(t._replace(jacobian=0.0) for t in response.transitions)  # these outputs do not follow the sample
    monkeypatch.setattr(speca.Denoiser, "response", dataclasses.replace(response, transitions=flat))

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        at["call"] = next(calls)
        return denoise(x, sigma)

    made = run(sampler, counted, x)
    wanted = list(outputs)
    for last, following in itertools.pairwise(full):
        before = [n for n in full if n < last][-1:]
        nodes, drafted = [following, last, *before], list(range(last + 1, following))
        for j, shares in zip(drafted, polynomial(nodes, drafted), strict=True) if drafted else ():
            wanted[j] = sum((s * outputs[n] for s, n in zip(shares, nodes, strict=True)), torch.zeros(()))
    expected = run(sampler, of(wanted), x)
    assert (made - expected).norm() < 1e-4 * expected.norm()
    assert (run(sampler, of(outputs), x) - expected).norm() > 1e-4 * expected.norm(), "interpolation leaves an error"


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "lms"])
def test_it_is_nearer_to_the_full_run_than_fewer_steps(name: str) -> None:
    model, sampler = Toy(), SAMPLERS[name]
    full = run(sampler, model, noise(16))
    denoise = speca.Denoiser(model, sampler=sampler, sigmas=KARRAS, speedup=2.5)
    ours = (run(sampler, denoise, noise(16)) - full).norm()
    fewer = (run(sampler, model, noise(16), sampling.get_sigmas_karras(8, 0.03, 14.6)) - full).norm()
    assert ours < 0.5 * fewer


def test_each_sample_adapts_on_its_own_and_arguments_follow_their_rows() -> None:
    model, sampler = Toy(), SAMPLERS["euler"]
    x, shift = noise(3), torch.tensor([0.0, 0.5, 3.0]).view(3, 1).expand(3, 8).contiguous()
    denoise = speca.Denoiser(model, sampler=sampler, sigmas=KARRAS, tolerance=0.002)
    whole = run(sampler, denoise, x, extra_args={"shift": shift, "scale": 1.5})
    decisions = [s.decisions for s in denoise.report().samples]
    assert len(set(decisions)) > 1, "samples have plans of their own"
    for k in range(3):
        alone = run(sampler, denoise, x[k : k + 1], extra_args={"shift": shift[k : k + 1], "scale": 1.5})
        assert [s.decisions for s in denoise.report().samples] == decisions[k : k + 1]
        assert torch.allclose(alone[0], whole[k], atol=1e-4)


def test_a_model_whose_rows_depend_on_each_other_is_run_whole() -> None:
    model, sampler = Toy(), SAMPLERS["euler"]

    def joint(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        return model(x, sigma, shift) + 0.01 * x.mean()

    shift = torch.tensor([0.0, 0.5, 3.0]).view(3, 1).expand(3, 8).contiguous()
    denoise = speca.Denoiser(joint, sampler=sampler, sigmas=KARRAS, tolerance=0.002)
    run(sampler, denoise, noise(3), extra_args={"shift": shift})
    assert len({s.decisions for s in denoise.report().samples}) == 1


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_fixed_step_solvers_of_odes(method: str, rising: bool) -> None:
    from torchdiffeq import odeint

    mix = torch.randn((8, 8), generator=torch.Generator().manual_seed(0)) / 4

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ mix + t) * (1 if rising else -1)

    def solve(denoise: Any, x: Tensor, times: Tensor) -> Tensor:
        made: Tensor = odeint(lambda t, y: denoise(y, t), x, times, method=method)
        return made[-1]

    times = torch.linspace(0, 1, 21) if rising else torch.linspace(1, 0, 21)
    x = noise() / KARRAS[0]
    full = solve(velocity, x, times)
    denoise = speca.Denoiser(velocity, sampler=solve, sigmas=times, prediction="velocity", speedup=4)
    made = solve(denoise, x, times)
    assert denoise.report().flops_speedup == pytest.approx(4, rel=0.05)
    assert (made - full).norm() < 0.01 * full.norm()


def test_a_loop_with_a_scheduler() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(24)
    mix = torch.randn((4, 4), generator=torch.Generator().manual_seed(0)) / 4

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x.movedim(1, -1) @ mix + t / 1000).movedim(-1, 1)

    def loop(denoise: Any) -> Tensor:
        x = torch.randn((2, 4, 3, 3), generator=torch.Generator().manual_seed(3))
        scheduler.set_timesteps(24)
        for t in scheduler.timesteps:
            x = scheduler.step(denoise(x, t), t, x).prev_sample
        return x

    full = loop(model)
    denoise = speca.Denoiser(model, scheduler=scheduler, speedup=3)
    assert (loop(denoise) - full).norm() < 0.02 * full.norm()
    assert [s.full for s in denoise.report().samples] == [8, 8]


def test_a_loop_that_is_broken_off_and_one_that_goes_elsewhere() -> None:
    model, sampler = Toy(), SAMPLERS["euler"]
    denoise = speca.Denoiser(model, sampler=sampler, sigmas=KARRAS, speedup=4)
    whole = run(sampler, denoise, noise())
    x = noise()
    for sigma in KARRAS[:7]:
        denoise(x, sigma.expand(3))
    assert torch.equal(run(sampler, denoise, noise()), whole), "a new run begins where the schedule begins"
    other = sampling.get_sigmas_karras(STEPS, 0.03, 9.0)
    other[0] = KARRAS[0]
    plain = run(sampler, model, noise(), other)
    denoise.reset()
    made = run(sampler, denoise, noise(), other)
    assert any("came at" in note and "as expected" in note for note in denoise.report().notes)
    assert torch.allclose(made, plain, rtol=1e-4)


def test_what_cannot_be_planned_runs_plainly_and_says_so() -> None:
    model, name = Toy(), "dpm_adaptive"
    denoise = speca.Denoiser(model, sampler=SAMPLERS[name], sigmas=KARRAS)
    assert torch.equal(run(SAMPLERS[name], denoise, noise()), run(SAMPLERS[name], model, noise()))
    assert any("depend on values" in note for note in denoise.report().notes)


def test_wrong_input_is_one_clear_sentence() -> None:
    with pytest.raises(speca.InputError, match="pass sampler= and sigmas=, or scheduler="):
        speca.Denoiser(Toy())
    with pytest.raises(speca.ConfigError, match="did you mean 'velocity'"):
        speca.Denoiser(Toy(), sampler=SAMPLERS["euler"], sigmas=KARRAS, prediction="velocty")  # type: ignore[arg-type]
    with pytest.raises(speca.ConfigError, match=r"speca\.enable\(module"):
        speca.Denoiser(Toy(), "paper", sampler=SAMPLERS["euler"], sigmas=KARRAS)
    with pytest.raises(speca.NotEnabledError, match="nothing has run yet"):
        speca.Denoiser(Toy(), sampler=SAMPLERS["euler"], sigmas=KARRAS).report()


def test_a_prior_and_its_file(tmp_path: Any) -> None:
    """A calibration of a pipeline serves a loop: `emoji-flux` as a velocity in k-diffusion's Euler."""
    from speca import zoo

    pipe = zoo.load("emoji-flux")
    known = speca.calibration.Calibration.beside(pipe)
    assert known is not None
    known.save(tmp_path / "prior.json")
    denoise = speca.Denoiser(
        Toy(),
        sampler=SAMPLERS["euler"],
        sigmas=torch.linspace(1, 0, 29),
        speedup=4,
        calibration=tmp_path / "prior.json",
    )
    run(SAMPLERS["euler"], denoise, noise() / KARRAS[0], torch.linspace(1, 0, 29))
    assert {s.full for s in denoise.report().samples} == {7} and not denoise.report().notes


def test_a_sampler_that_adds_noise_says_that_a_tolerance_forecasts_little() -> None:
    for name, settings, said in (
        ("euler_ancestral", {}, 1), ("euler_ancestral", dict(speedup=4), 0), ("euler", {}, 0),
    ):  # fmt: skip
        denoise = speca.Denoiser(Toy(), sampler=SAMPLERS[name], sigmas=KARRAS, **settings)  # type: ignore[arg-type]
        run(SAMPLERS[name], denoise, noise())
        assert sum("adds noise at each step" in note for note in denoise.report().notes) == said


@pytest.mark.parametrize("how", ["another tensor", "written to", "told", "equal values"])
def test_conditions_that_change_in_mid_run_begin_anew_within_the_budget(how: str) -> None:
    shift, calls = torch.zeros(1), 0

    def sampler(denoise: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        nonlocal shift, calls
        for here, there in itertools.pairwise(sigmas):
            calls += 1
            if calls == 12 and how == "another tensor":
                shift = shift + 1
            elif calls == 12 and how == "written to":
                shift += 1
            elif calls == 12 and how == "told" and isinstance(denoise, speca.Denoiser):
                denoise.restart()
            elif how == "equal values":
                shift = shift.clone()
            x = x + (there - here) * (x - denoise(x, here, shift=shift)) / here
        return x

    sigmas = torch.linspace(10, 0.1, 25)
    denoise = speca.Denoiser(Toy(), sampler=sampler, sigmas=sigmas, speedup=3)
    assert len(denoise.response.times) == 24
    calls = 0
    sampler(denoise, noise(2) * 10, sigmas)
    (done, _) = (s.decisions for s in denoise.report().samples)
    assert done.count("F") == 8
    assert any("conditions changed" in note for note in denoise.report().notes) == (
        how in ("another tensor", "written to")
    )
    if how != "equal values":
        assert done[11] == "F" and done[12:].count("F") >= 2
