"""What goes wrong in one request stays in it, and nothing of it is left."""

from __future__ import annotations

import gc
import random
from typing import Any

import greenlet
import pytest
import torch

import speca
import tiny
from engine.mixes import CLOSE, decisions, distance
from speca.diffusers.accelerator import ATTRIBUTE
from speca.engine import Engine, Event, Future, Result
from speca.errors import CancelledError, NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
STEPS = 6
KINDS = 8


def good(case: tiny.Case, n: int) -> dict[str, Any]:
    asked = {**case.arguments, **case.conditions([n % KINDS])}
    return {**asked, "num_inference_steps": STEPS, "generator_seed": n % KINDS, "id": "good"}


def broken(case: tiny.Case, n: int, how: str) -> dict[str, Any]:
    """A request that is going to fail: at once, in the middle, by its time, or at its end as there is NaN in it."""
    asked = {**good(case, n), "id": how}
    if how == "shape":
        asked["prompt_embeds"] = asked["prompt_embeds"][..., :5]
    elif how == "callback":
        asked["callback_on_step_end"] = _raise
    elif how == "nan":
        asked["prompt_embeds"] = asked["prompt_embeds"] * float("nan")
    elif how == "late":
        asked["deadline"] = 1e-6
    return asked


def _raise(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        raise ZeroDivisionError("of this request")
    return kwargs


def alive() -> tuple[int, int, int]:
    """Tensors, greenlets and pipelines in memory."""
    gc.collect()
    found = [type(o) for o in gc.get_objects()]
    tensors = sum(issubclass(t, torch.Tensor) for t in found)
    return tensors, sum(issubclass(t, greenlet.greenlet) for t in found), sum("Pipeline" in t.__name__ for t in found)


def alone(case: tiny.Case, preset: Any = tiny.VERIFYING) -> list[Result]:
    with Engine(case.pipe, preset, mode="one-at-a-time") as engine:
        return list(engine.generate(good(case, n) for n in range(KINDS)))


def demand_right(result: Result, oracle: list[Result]) -> None:
    expected = oracle[result.seed or 0]
    assert decisions(result) == decisions(expected) and distance(result, expected) < CLOSE


@pytest.mark.parametrize("preset", [tiny.VERIFYING, "balanced"], ids=["verified", "forecast"])
def test_a_thousand_requests_of_which_many_fail(preset: Any) -> None:
    """Cancelled at random, too late, wrong and NaN among good ones: those are right, and nothing is kept."""
    case = tiny.flux()
    oracle, chance = alone(case, preset), random.Random(3)
    hows = {n: chance.choice(["shape", "callback", "late", "cancel"]) for n in range(1000) if chance.random() < 0.4}
    hows[500] = "nan"
    futures: dict[int, Future] = {}
    after: dict[int, int] = {}  # steps told of after a request was cancelled

    def listen(event: Event) -> None:
        if event.index in after:
            after[event.index] += event.kind == "step"
        if hows.get(event.index) == "cancel" and event.kind == "step" and event.step == 1 + event.index % STEPS:
            after[event.index] = 0
            futures[event.index].cancel()

    with Engine(case.pipe, preset, max_batch=8, memory="4MiB", on_event=listen) as engine:
        hub, before = engine._loop, (0, 0, 0)
        for n in range(1000):
            asked = broken(case, n, hows[n]) if n in hows else good(case, n)
            if n == 250:
                Future.wait(list(futures.values())[-1:])
                before = alive()
            futures[n] = engine.post(**asked)
            if n % 50 == 49:  # a queue of moderate length
                Future.wait([futures[n]])
        for future in futures.values():
            Future.wait([future])
        results = {n: future.outcome for n, future in futures.items()}
        futures.clear()
        counted = engine.statistics
        accelerator = case.transformer.__dict__[ATTRIBUTE]
        assert not hub.live and not hub.queued and not hub.meet.asked and not len(hub.meet) and not hub._readings
        assert counted["live"] == counted["queued"] == counted["bytes"] == 0
        assert counted["peak_bytes"] <= 4 * 2**20
        for result in results.values():
            how = result.id
            if how == "good":
                demand_right(result, oracle)
            else:
                expected = dict(shape=RuntimeError, callback=ZeroDivisionError, late=CancelledError, nan=NonFiniteError)
                assert isinstance(result.error, expected.get(how, CancelledError)), (how, result.error)
        assert max(after.values()) <= 1, "a cancelled request went on beyond the tick"
        assert counted["failed"] == len(hows)
        results.clear()
        gc.collect()
        assert len(accelerator.callers) <= 1
        tensors, greenlets, pipelines = alive()
        assert tensors <= before[0] + 20 and greenlets <= before[1] and pipelines <= before[2]


def test_a_row_that_breaks_its_batch_fails_alone() -> None:
    case = tiny.dit()
    classes = [1, 2, 5000, 3]  # there are 1000
    with Engine(case.pipe, tiny.VERIFYING, max_batch=8) as engine:
        asked = [dict(class_labels=[c], num_inference_steps=5, generator_seed=0) for c in classes]
        results = sorted(engine.generate(asked), key=lambda r: r.index)
    assert [type(r.error) for r in results] == [type(None), type(None), IndexError, type(None)]
    with pytest.raises(IndexError):
        _ = results[2].images


def test_leaving_the_loop_cancels_the_rest() -> None:
    case = tiny.flux()
    with Engine(case.pipe, max_batch=4) as engine:
        for _ in engine.generate(good(case, n) for n in range(100)):
            break
        assert engine.statistics["live"] == engine.statistics["queued"] == 0
        assert engine.statistics["done"] < 20


def test_interrupting_is_not_taken_for_a_failure_of_a_request() -> None:
    case = tiny.flux()

    def interrupt(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with Engine(case.pipe) as engine, pytest.raises(KeyboardInterrupt):
        list(engine.generate([good(case, 0), {**good(case, 1), "callback_on_step_end": interrupt}]))
    assert ATTRIBUTE not in case.transformer.__dict__


def test_gradients_and_autocast_of_one_request_do_not_reach_another() -> None:
    case = tiny.flux()
    seen: dict[str, set[tuple[bool, bool]]] = {"plain": set(), "cast": set()}

    def watch(name: str) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            seen[name].add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            torch.set_autocast_enabled("cpu", name == "cast")
            return kwargs

        return callback

    asked = [{**good(case, n), "callback_on_step_end": watch(["plain", "cast"][n % 2])} for n in range(6)]
    assert torch.is_grad_enabled()
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        results = list(engine.generate(asked))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert all(r.error is None for r in results)
    assert seen["plain"] == {(False, False)} and seen["cast"] == {(False, False), (False, True)}


def test_without_greenlet_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "greenlet", None)
    with pytest.raises(speca.ConfigError, match=r"pip install 'speca-diffusers\[engine\]'"):
        Engine(tiny.dit().pipe)


def test_a_listener_that_raises_hurts_no_request() -> None:
    case = tiny.flux()

    def listen(event: Event) -> None:
        if event.kind == "step":
            raise ZeroDivisionError

    with (
        Engine(case.pipe, on_event=listen) as engine,
        pytest.warns(UserWarning, match="a listener of request 0 raised"),
    ):
        (result,) = engine.generate([good(case, 0)])
    assert result.error is None


def test_a_defect_of_the_engine_lets_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny.flux()
    with Engine(case.pipe) as engine:
        scheduler = engine._loop.scheduler
        with monkeypatch.context() as patch:
            patch.setattr(type(scheduler), "plan", None)
            with pytest.raises(TypeError, match="not callable"):
                engine.post(**good(case, 0)).result(timeout=30)
        assert engine.post(**good(case, 1)).result(timeout=30).error is None


def test_a_bare_transformer_is_refused() -> None:
    with pytest.raises(speca.ConfigError, match="whole pipelines"):
        Engine(tiny.dit_transformer())
