"""Models and loops as people write them: any order and name of arguments, any scheduler with a `step`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import speca
from speca.sampler.scheduler import scheduler_response

STEPS = 24
START = torch.randn((4, 3, 5), generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A small velocity field; how it is called is what the subclasses differ in."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn((5, 5), generator=generator) / 3)
        self.rows = 0

    def velocity(self, x: Tensor, time: Any) -> Tensor:
        self.rows += len(x)
        t = torch.as_tensor(time, dtype=x.dtype).reshape(-1, 1, 1)
        t = t / 1000 if float(t.max()) > 1 else t
        return torch.tanh(x @ self.mix + t) + x * t / 2


class TimeFirst(Network):
    def forward(self, t: Any, x: Tensor) -> Tensor:
        return self.velocity(x, t)


class Named(Network):
    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.velocity(x, sigma)


class InKeywords(Network):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.velocity(x, kwargs["ts"])


class InDictionary(Network):
    def forward(self, x: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.velocity(x, cond["level"])


class Unusual(Network):
    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.velocity(x, s)


class Positional(Network):
    def forward(self, x: Tensor, timestep: Tensor, *more: Tensor) -> Tensor:
        return self.velocity(x, timestep) + sum(more, torch.zeros(()))


@dataclass
class Predicted:
    sample: Tensor
    note: str = "kept"


class InObject(Network):
    def forward(self, x: Tensor, timestep: Tensor) -> Predicted:
        return Predicted(self.velocity(x, timestep))


class Wrapped(nn.Module):
    """Preconditioning around a network whose blocks are called by index and whose skips are summed after the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Named()
        self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))

    @property
    def rows(self) -> int:
        return self.inner.rows

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h, skips = x, torch.zeros_like(x)
        for index in range(len(self.blocks)):
            h = torch.tanh(self.blocks[index](h))
            skips = skips + h
        return self.inner(x, sigma) + 0.1 * skips


Ask = Callable[[nn.Module, Tensor, Tensor], Tensor]
MODELS: dict[str, tuple[type[nn.Module], Ask, dict[str, Any]]] = {
    "time first, scalar": (TimeFirst, lambda m, x, t: m(t, x), {}),
    "time first, a number": (TimeFirst, lambda m, x, t: m(float(t), x), {}),
    "time first, one a row": (TimeFirst, lambda m, x, t: m(t.expand(len(x)), x), {}),
    "sigma": (Named, lambda m, x, t: m(x, (t / 1000).expand(len(x))), {}),
    "in **kwargs": (InKeywords, lambda m, x, t: m(x, ts=t.expand(len(x))), {}),
    "in a dictionary": (InDictionary, lambda m, x, t: m(x, {"level": t.expand(len(x))}), dict(time="cond.level")),
    "an unusual name": (Unusual, lambda m, x, t: m(x, t.expand(len(x))), dict(time="s")),
    "more by position": (Positional, lambda m, x, t: m(x, t.expand(len(x)), torch.full((4, 1, 1), 0.1)), {}),
    "an object with fields": (InObject, lambda m, x, t: m(x, t.expand(len(x))).sample, {}),
    "wrapped, indexed blocks, skips": (Wrapped, lambda m, x, t: m(x, (t / 1000).expand(len(x))), {}),
}


def loop(model: nn.Module, scheduler: Any, ask: Ask) -> Tensor:
    x = START.clone()
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(ask(model, x, t), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", MODELS)
def test_models_of_any_signature(name: str) -> None:
    cls, ask, more = MODELS[name]
    model, scheduler = cls().eval(), diffusers.FlowMatchEulerDiscreteScheduler()
    plain = loop(model, scheduler, ask)
    speca.enable(model, tolerance=0.0, scheduler=scheduler, **more)
    assert torch.equal(loop(model, scheduler, ask), plain)
    speca.enable(model, speedup=4, scheduler=scheduler, **more)
    before = model.rows
    made = loop(model, scheduler, ask)
    report = speca.report(model)
    assert [s.full for s in report.samples] == [STEPS // 4] * 4 and report.notes == ()
    assert model.rows - before == 4 * STEPS // 4
    assert (made - plain).norm() < 0.02 * plain.norm()
    speca.disable(model)
    assert torch.equal(loop(model, scheduler, ask), plain)


def test_a_time_that_cannot_be_found_is_asked_for() -> None:
    model, scheduler = Unusual().eval(), diffusers.FlowMatchEulerDiscreteScheduler()
    speca.enable(model, scheduler=scheduler, speedup=4)
    with pytest.warns(UserWarning, match=r"pass time='NAME' to speca.enable, one of x, s"):
        loop(model, scheduler, MODELS["an unusual name"][1])


def test_stacked_guidance_in_ones_own_loop() -> None:
    model, scheduler = Named().eval(), diffusers.FlowMatchEulerDiscreteScheduler()

    def guided(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = model(torch.cat([x, x]), (t / 1000).expand(2 * len(x))).chunk(2)
        return uncond + 2 * (cond - uncond)

    for branches, samples in ((1, 8), (2, 4)):
        speca.enable(model, scheduler=scheduler, speedup=4, branches=branches)
        loop(model, scheduler, guided)
        assert len(speca.report(model).samples) == samples


# -- schedulers of one's own ------------------------------------------------------------------------------
class Own:
    """Euler on a flow's path with nothing but what a scheduler needs."""

    def set_timesteps(self, steps: int) -> None:
        self.sigmas = torch.linspace(1, 0, steps + 1)
        self.timesteps = self.sigmas[:-1] * 1000

    def next(self, output: Tensor, sample: Tensor, index: int) -> Tensor:
        return sample + output * (self.sigmas[index + 1] - self.sigmas[index])

    def index_of(self, timestep: Any) -> int:
        return int((self.timesteps - float(timestep)).abs().argmin())


class GivesTensor(Own):
    def step(self, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        return self.next(output, sample, self.index_of(timestep))


class GivesObject(Own):
    def step(self, output: Tensor, timestep: Any, sample: Tensor) -> Any:
        return type("Out", (), {"prev_sample": self.next(output, sample, self.index_of(timestep))})()


class TakesIndex(Own):
    def step(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        return self.next(output, x, i)


class OtherOrder(Own):
    def step(self, x: Tensor, t: Any, velocity: Tensor) -> Tensor:
        return self.next(velocity, x, self.index_of(t))


def own_loop(model: nn.Module, scheduler: Any) -> Tensor:
    x = START.clone()
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            out = model(x, (t / 1000).expand(len(x)))
            if isinstance(scheduler, TakesIndex):
                x = scheduler.step(out, i, x)
            elif isinstance(scheduler, OtherOrder):
                x = scheduler.step(x, t, out)
            else:
                stepped = scheduler.step(out, t, x)
                x = stepped if isinstance(stepped, Tensor) else stepped.prev_sample
    return x


@pytest.mark.parametrize("cls", [GivesTensor, GivesObject, TakesIndex, OtherOrder])
def test_schedulers_of_ones_own_are_corrected(cls: Any) -> None:
    """They do what diffusers' Euler does, so the same is found of them, and the same comes out."""
    model, scheduler, known = Named().eval(), cls(), diffusers.FlowMatchEulerDiscreteScheduler()
    plain = own_loop(model, scheduler)
    for one in (scheduler, known):
        one.set_timesteps(STEPS)
    mine, theirs = scheduler_response(scheduler), scheduler_response(known)
    for a, b in zip(mine.transitions, theirs.transitions, strict=True):
        assert a.keep == pytest.approx(b.keep) and a.parts == pytest.approx(b.parts, abs=1e-3)
    speca.enable(model, scheduler=scheduler, speedup=4)
    made = own_loop(model, scheduler)
    report = speca.report(model)
    assert [s.full for s in report.samples] == [STEPS // 4] * 4
    assert any("has no add_noise; its path was taken to be x = (1 - t) x_0 + t noise" in n for n in report.notes)
    assert (made - plain).norm() < 0.02 * plain.norm()


def test_a_path_that_cannot_be_guessed_is_said() -> None:
    class Strange(GivesTensor):
        def next(self, output: Tensor, sample: Tensor, index: int) -> Tensor:
            return (1 - 0.3 * self.sigmas[index]) * sample + output * (0.1 + self.sigmas[index] ** 2) / 7

    scheduler = Strange()
    scheduler.set_timesteps(STEPS)
    found = scheduler_response(scheduler)
    assert found.transitions and "give it a method add_noise" in found.note


def test_a_step_that_returns_no_sample_says_so() -> None:
    class Broken(Own):
        def step(self, output: Tensor, timestep: Any, sample: Tensor) -> str:
            return "nothing"

    scheduler = Broken()
    scheduler.set_timesteps(STEPS)
    assert "step returned str, which holds no next sample" in scheduler_response(scheduler).reason


# -- trying a scheduler leaves everything alone -----------------------------------------------------------
def test_a_wrapper_around_step_is_never_stepped() -> None:
    """A closure, as loggers put there, holds the real scheduler: a trial that copied it would step that one."""
    scheduler, model = diffusers.FlowMatchEulerDiscreteScheduler(), Named().eval()
    ask = MODELS["sigma"][1]
    plain = loop(model, scheduler, ask)
    seen: list[float] = []
    real = scheduler.step

    def logged(output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        seen.append(float(timestep))
        return real(output, timestep, sample, **options)

    scheduler.step = logged
    speca.enable(model, scheduler=scheduler, tolerance=0.0)
    assert torch.equal(loop(model, scheduler, ask), plain) and len(seen) == STEPS
    seen.clear()
    speca.enable(model, scheduler=scheduler, speedup=4)
    loop(model, scheduler, ask)
    assert len(seen) == STEPS and [s.full for s in speca.report(model).samples] == [STEPS // 4] * 4


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler"])
def test_no_random_generator_is_touched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("a generator was seeded")

    scheduler = getattr(diffusers, name)(**(dict(clip_sample=False) if name == "DDPMScheduler" else {}))
    scheduler.set_timesteps(STEPS)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    for target in ("torch.manual_seed", "torch.random.manual_seed", "torch.cuda.manual_seed_all", "torch.seed"):
        monkeypatch.setattr(target, forbidden)
    assert scheduler_response(scheduler).transitions[0].noisy
    assert torch.equal(torch.random.get_rng_state(), before)


# -- loops that call more often than they step ------------------------------------------------------------
def midpoint(model: nn.Module) -> Tensor:
    x, times = START.clone(), torch.linspace(1, 0, STEPS + 1)
    with torch.no_grad():
        for now, following in zip(times[:-1], times[1:], strict=True):  # noqa: RUF007
            half = (now + following) / 2
            between = x + model(x, now.expand(len(x))) * (half - now)
            x = x + model(between, half.expand(len(x))) * (following - now)
    return x


def test_two_calls_a_step_are_no_second_run() -> None:
    model = Named().eval()
    plain = midpoint(model)
    speca.enable(model, speedup=4, num_inference_steps=STEPS)
    with pytest.warns(UserWarning, match="called at more times than num_inference_steps"):
        midpoint(model)
    speca.enable(model, speedup=4, num_inference_steps=2 * STEPS)
    made = midpoint(model)
    assert [s.full for s in speca.report(model).samples] == [2 * STEPS // 4] * 4
    assert (made - plain).norm() < 0.1 * plain.norm()
    speca.disable(model)

    def solve(denoise: Any, x: Tensor, times: Tensor) -> Tensor:
        for now, following in zip(times[:-1], times[1:], strict=True):  # noqa: RUF007
            half = (now + following) / 2
            between = x + denoise(x, now.expand(len(x))) * (half - now)
            x = x + denoise(between, half.expand(len(x))) * (following - now)
        return x

    times = torch.linspace(1, 0, STEPS + 1)
    denoise = speca.Denoiser(model, sampler=solve, sigmas=times, prediction="velocity", speedup=4)
    with torch.no_grad():
        better = solve(denoise, START.clone(), times)
    assert (better - plain).norm() < 0.5 * (made - plain).norm()
