"""What schedulers do at each step, against their published formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from speca.sampler import scheduler as module
from speca.sampler.scheduler import scheduler_response


@pytest.fixture(autouse=True)
def nothing_is_known() -> None:
    module._found.cache_clear()


def ready(name: str, **config: Any) -> Any:
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(12)
    return scheduler


def known() -> int:
    """How many schedulers have been tried and are kept."""
    return module._found.cache_info().currsize


def test_flow_euler_is_the_difference_of_sigmas() -> None:
    scheduler = ready("FlowMatchEulerDiscreteScheduler", shift=3.0)
    found = scheduler_response(scheduler)
    steps = scheduler.sigmas.diff().tolist()
    assert not found.reason and not found.note
    assert [t.effect for t in found.transitions] == [(pytest.approx(step, abs=1e-6),) for step in steps]
    assert all(
        t.keep == (pytest.approx(1, abs=1e-6),) and t.size == pytest.approx(1, abs=1e-6) for t in found.transitions
    )
    assert all(abs(t.jacobian) < 1e-3 for t in found.transitions)
    assert found.times == tuple(scheduler.timesteps.tolist())
    assert found.noise == pytest.approx([t / 1000 for t in found.times])


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_that_stands_somewhere_has_the_same_path(name: str) -> None:
    scheduler = ready(name)
    untouched = scheduler_response(scheduler)
    scheduler.set_begin_index(0)
    module._found.cache_clear()
    assert scheduler_response(scheduler) == untouched
    scheduler.step(torch.ones(1, 4, 8, 8), scheduler.timesteps[0], torch.ones(1, 4, 8, 8))
    module._found.cache_clear()
    assert scheduler_response(scheduler) == untouched
    count = known()
    scheduler.step(torch.ones(1, 4, 8, 8), scheduler.timesteps[1], torch.ones(1, 4, 8, 8))
    assert scheduler_response(scheduler) == untouched and known() == count, "where it stands is no part of it"
    steps = untouched.transitions
    assert len({t.signal for t in steps} | {t.size for t in steps}) > len(steps) // 2


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler"])
def test_a_run_that_begins_later_has_the_rest_of_the_steps(name: str) -> None:
    scheduler = ready(name, **(dict(clip_sample=False) if name == "DDIMScheduler" else {}))
    whole, rest = scheduler_response(scheduler), scheduler_response(scheduler, 5)
    assert len(rest.transitions) == 7 and known() == 2
    assert rest.noise == whole.noise[5:] and rest.times == whole.times[5:]
    for one, other in zip(rest.transitions, whole.transitions[5:], strict=True):
        for field in ("keep", "effect", "jacobian", "size", "signal", "parts"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), abs=1e-3), field


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_its_formula(eta: float) -> None:
    """Song et al., arXiv:2010.02502, equation 12."""
    scheduler = ready("DDIMScheduler", clip_sample=False, set_alpha_to_one=False)
    found = scheduler_response(scheduler, eta=eta).transitions
    for t, ((keep,), (effect,), jacobian, size, signal, *_) in zip(scheduler.timesteps.tolist(), found, strict=True):
        before = max(t - scheduler.config.num_train_timesteps // 12, 0)
        now, then = scheduler.alphas_cumprod[t].item(), scheduler.alphas_cumprod[before].item()
        noise = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        a = (then / now) ** 0.5
        assert keep == pytest.approx(a, rel=1e-4)
        assert effect == pytest.approx((1 - then - noise**2) ** 0.5 - a * (1 - now) ** 0.5, rel=1e-3, abs=1e-5)
        assert size == pytest.approx(now**0.5 + (1 - now) ** 0.5, rel=1e-5)
        assert signal == pytest.approx(now**0.5, rel=1e-5)
        assert jacobian * effect <= 0
    assert {t.noisy for t in found} == {eta > 0}


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
    found = scheduler_response(ready(name, **config))
    assert found.transitions == () and name in found.reason


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler"])
def test_trying_leaves_no_trace(name: str) -> None:
    scheduler = ready(name, clip_sample=False) if name != "EulerAncestralDiscreteScheduler" else ready(name)
    before, state = dict(vars(scheduler)), torch.get_rng_state()
    found = scheduler_response(scheduler).transitions
    assert len(found) == 12 and torch.equal(torch.get_rng_state(), state)
    assert vars(scheduler).keys() == before.keys() and all(vars(scheduler)[k] is v for k, v in before.items())


def test_functions_put_in_the_place_of_methods_are_not_called() -> None:
    """They may hold the real scheduler, which must not be stepped."""
    scheduler, calls = ready("FlowMatchEulerDiscreteScheduler"), []
    plain = scheduler_response(scheduler)
    real = scheduler.step

    def logged(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    scheduler.step = logged
    module._found.cache_clear()
    assert scheduler_response(scheduler) == plain and not calls and scheduler.step_index is None
    assert scheduler.step is logged


def test_equal_schedulers_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    real = module._tried
    monkeypatch.setattr(module, "_tried", lambda trial: tried.append(type(trial.scheduler).__name__) or real(trial))
    for _ in range(3):
        first = ready("DDIMScheduler", clip_sample=False)
        scheduler_response(first, eta=0.0)
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
        alone = real(module._Trial(None, module.fresh(scheduler), 0, given))
        assert alone.transitions and scheduler_response(scheduler, **given) == alone
        assert len(tried) == number, f"{scheduler} was taken for another one"


def test_a_step_of_ones_own_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = ready("FlowMatchEulerDiscreteScheduler")
    plain = scheduler_response(scheduler)
    step = type(scheduler).step

    def slower(self: Any, out: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return step(self, out / 2, *args, **kwargs)

    scheduler.told = print  # what cannot be compared is no reason to take it for the other, nor to fail
    assert scheduler_response(scheduler) == plain and known() == 1
    del scheduler.told
    monkeypatch.setattr(type(scheduler), "step", slower)
    halves = [pytest.approx(t.effect[0] / 2) for t in plain.transitions]
    assert [t.effect[0] for t in scheduler_response(scheduler).transitions] == halves


def test_a_scheduler_of_ones_own_needs_no_class() -> None:
    own = SimpleNamespace(timesteps=torch.arange(4, 0, -1))
    own.step = lambda out, t, x, return_dict=False: (x - out * t / 10,)
    found = scheduler_response(own)
    effects = [step.effect[0] for step in found.transitions]
    assert not found.reason and effects == pytest.approx([-0.4, -0.3, -0.2, -0.1], abs=1e-6)
    without = scheduler_response(SimpleNamespace(timesteps=own.timesteps))
    assert without.reason.startswith("SimpleNamespace cannot be tried") and not without.transitions


def test_without_timesteps_nothing_is_known() -> None:
    assert "no timesteps" in scheduler_response(SimpleNamespace()).reason


def test_what_is_kept_is_bounded() -> None:
    kept = module._found.cache_info().maxsize
    assert kept is not None
    for steps in range(4, 4 + kept + 8):
        scheduler = ready("FlowMatchEulerDiscreteScheduler")
        scheduler.set_timesteps(steps)
        assert len(scheduler_response(scheduler).transitions) == steps
    assert known() <= kept
