"""What schedulers do at each step, against their published formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from speca.model import sampler
from speca.model.sampler import transitions


@pytest.fixture(autouse=True)
def nothing_is_known() -> None:
    sampler._known.clear()


def ready(name: str, **config: Any) -> Any:
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(12)
    return scheduler


def test_flow_euler_is_the_difference_of_sigmas() -> None:
    scheduler = ready("FlowMatchEulerDiscreteScheduler", shift=3.0)
    found, reason = transitions(scheduler)
    steps = scheduler.sigmas.diff().tolist()
    assert not reason
    assert [t.move for t in found] == [(pytest.approx(step, abs=1e-6),) for step in steps]
    assert all(t.keep == (pytest.approx(1, abs=1e-6),) and t.size == pytest.approx(1, abs=1e-6) for t in found)
    assert all(abs(t.pull) < 1e-3 for t in found)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_that_stands_somewhere_has_the_same_path(name: str) -> None:
    scheduler = ready(name)
    untouched, _ = transitions(scheduler)
    scheduler.set_begin_index(0)
    sampler._known.clear()
    assert transitions(scheduler)[0] == untouched
    scheduler.step(torch.ones(1, 4, 8, 8), scheduler.timesteps[0], torch.ones(1, 4, 8, 8))
    sampler._known.clear()
    assert transitions(scheduler)[0] == untouched
    known = len(sampler._known)
    scheduler.step(torch.ones(1, 4, 8, 8), scheduler.timesteps[1], torch.ones(1, 4, 8, 8))
    assert transitions(scheduler)[0] == untouched and len(sampler._known) == known, "where it stands is no part of it"
    assert len({t.signal for t in untouched} | {t.size for t in untouched}) > len(untouched) // 2


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_its_formula(eta: float) -> None:
    """Song et al., arXiv:2010.02502, equation 12."""
    scheduler = ready("DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
    found, _ = transitions(scheduler, eta=eta)
    for t, ((keep,), (move,), pull, size, signal, *_) in zip(scheduler.timesteps.tolist(), found, strict=True):
        before = max(t - scheduler.config.num_train_timesteps // 12, 0)
        now, then = scheduler.alphas_cumprod[t].item(), scheduler.alphas_cumprod[before].item()
        noise = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        a = (then / now) ** 0.5
        assert keep == pytest.approx(a, rel=1e-4)
        assert move == pytest.approx((1 - then - noise**2) ** 0.5 - a * (1 - now) ** 0.5, rel=1e-3, abs=1e-5)
        assert size == pytest.approx(now**0.5 + (1 - now) ** 0.5, rel=1e-5)
        assert signal == pytest.approx(now**0.5, rel=1e-5)
        assert pull * move <= 0


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("PNDMScheduler", {}),
        ("DPMSolverMultistepScheduler", dict(thresholding=True)),
        ("UniPCMultistepScheduler", dict(predict_x0=False)),  # its last step is no number
        ("DDIMScheduler", dict(clip_sample=True)),
        ("DDIMScheduler", dict(thresholding=True, clip_sample=False)),
    ],
)
def test_what_is_not_linear_or_remembers_too_much_is_noticed(name: str, config: dict[str, Any]) -> None:
    found, reason = transitions(ready(name, **config))
    assert found == () and name in reason


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler"])
def test_trying_leaves_no_trace(name: str) -> None:
    scheduler = ready(name, clip_sample=False) if name != "EulerAncestralDiscreteScheduler" else ready(name)
    before, state = dict(vars(scheduler)), torch.get_rng_state()
    found, _ = transitions(scheduler)
    assert len(found) == 12 and torch.equal(torch.get_rng_state(), state)
    assert vars(scheduler).keys() == before.keys() and all(vars(scheduler)[k] is v for k, v in before.items())


def test_equal_schedulers_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    real = sampler._tried
    monkeypatch.setattr(sampler, "_tried", lambda *args: tried.append(type(args[0]).__name__) or real(*args))
    for _ in range(3):
        first = ready("DDIMScheduler", clip_sample=False)
        transitions(first, eta=0.0)
    assert len(tried) == 1
    others: list[tuple[Any, dict[str, Any]]] = [
        (first, dict(eta=0.5)),
        (ready("DDIMScheduler", clip_sample=False, beta_end=0.03), dict(eta=0.0)),
        (ready("DDPMScheduler", clip_sample=False), dict(eta=0.0)),
    ]
    longer = ready("DDIMScheduler", clip_sample=False)
    longer.set_timesteps(11)
    moved = ready("DDIMScheduler", clip_sample=False)
    moved.timesteps[3] += 1
    others += [(longer, dict(eta=0.0)), (moved, dict(eta=0.0))]
    for number, (scheduler, given) in enumerate(others, 2):
        assert transitions(scheduler, **given)[0] == real(scheduler, given)[0]
        assert len(tried) == number, f"{scheduler} was taken for another one"


def test_a_step_of_ones_own_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = ready("FlowMatchEulerDiscreteScheduler")
    plain, _ = transitions(scheduler)
    step = type(scheduler).step

    def slower(self: Any, out: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return step(self, out / 2, *args, **kwargs)

    scheduler.told = print  # what cannot be compared is no reason to take it for the other, nor to fail
    assert transitions(scheduler)[0] == plain and len(sampler._known) == 1
    del scheduler.told
    monkeypatch.setattr(type(scheduler), "step", slower)
    halves = [pytest.approx(t.move[0] / 2) for t in plain]
    assert [t.move[0] for t in transitions(scheduler)[0]] == halves


def test_a_scheduler_of_ones_own_needs_no_class() -> None:
    own = SimpleNamespace(timesteps=torch.arange(4, 0, -1))
    own.step = lambda out, t, x, return_dict=False: (x - out * t / 10,)
    found, reason = transitions(own)
    assert not reason and [step.move[0] for step in found] == pytest.approx([-0.4, -0.3, -0.2, -0.1], abs=1e-6)
    assert transitions(SimpleNamespace(timesteps=own.timesteps))[1].startswith("SimpleNamespace cannot be tried")


def test_what_is_kept_is_bounded() -> None:
    for steps in range(4, 4 + sampler.KEPT + 8):
        scheduler = ready("FlowMatchEulerDiscreteScheduler")
        scheduler.set_timesteps(steps)
        assert len(transitions(scheduler)[0]) == steps
    assert len(sampler._known) <= sampler.KEPT
