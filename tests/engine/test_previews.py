"""What is seen of a request while it runs: every step, drafted or full, and pictures of what it is going to be."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from engine.mixes import decisions, mix
from engine.test_failures import good
from engine.test_waiters import Held, held
from speca import zoo
from speca.engine import Engine, Event
from speca.engine.preview import decoded, watched

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
__all__ = ["held"]


@pytest.mark.parametrize("scheduler", [None, diffusers.HeunDiscreteScheduler()], ids=["one call", "two calls"])
def test_there_is_an_event_for_every_step_drafted_or_full(scheduler: Any) -> None:
    """A sampler of second order calls the model twice a step: each call counts."""
    case, told = tiny.flux() if scheduler is None else tiny.dit(), list[Event]()
    asked = {**case.arguments, **case.conditions([0]), "num_inference_steps": 12, "speedup": 3.0}
    with Engine(case.pipe, max_batch=4, on_event=told.append) as engine:
        results = list(engine.generate({**asked, "generator_seed": n, "scheduler": scheduler} for n in range(3)))
    for result in results:
        letters = decisions(result)[0]
        assert letters.count("A") > 4 and len(letters) == (12 if scheduler is None else 23)
        mine = [e for e in told if e.index == result.index]
        assert [e.kind for e in mine[:2] + mine[-1:]] == ["queued", "started", "done"]
        assert [e.step for e in mine if e.kind == "step"] == list(range(1, len(letters) + 1))
        assert {e.total for e in mine if e.kind == "step"} == {len(letters)} and mine[-1].step == len(letters)


def test_progress_counts_drafted_steps_though_nobody_listens() -> None:
    case, seen = tiny.flux(), list[float]()

    def look(*_: Any) -> dict[str, Any]:
        seen.append(futures[0].progress)
        return {}

    with Engine(case.pipe, speedup=3.0) as engine:
        futures = [engine.post(**{**good(case, 0), "num_inference_steps": 12}, callback_on_step_end=look)]
        futures[0].result(timeout=30)
        assert not futures[0].heard
    assert seen == pytest.approx([n / 12 for n in range(1, 13)])


def test_a_cancel_takes_effect_at_the_next_step_though_it_is_drafted() -> None:
    case, told = tiny.flux(), list[int]()

    def listen(event: Event) -> None:
        if event.kind == "step":
            told.append(event.step)
            if event.step == 5:
                futures[0].cancel()

    with Engine(case.pipe, speedup=12.0, on_event=listen) as engine:
        futures = [engine.post(**{**good(case, 0), "num_inference_steps": 60})]
        assert isinstance(futures[0]._done.result(timeout=30).error, Exception)
    assert told == [1, 2, 3, 4, 5]


def test_a_copy_of_a_watched_scheduler_is_not_watched() -> None:
    import copy

    scheduler, told = diffusers.DDIMScheduler(), list[Any]()
    scheduler.set_timesteps(4)
    given = torch.zeros(1, 3, 4, 4), scheduler.timesteps[0], torch.ones(1, 3, 4, 4)
    with watched(scheduler, lambda sample, clean: told.append((sample, clean()))):
        copy.deepcopy(scheduler).step(*given)
        assert not told
        out = scheduler.step(*given)
        assert told[0][0] is out.prev_sample and told[0][1] is out.pred_original_sample
    scheduler.step(*given)
    assert len(told) == 1


# ------------------------------------------------------------------------------------------------ pictures
@pytest.mark.parametrize("name", ["fashion-dit", "emoji-flux", "emoji-unet"])
@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_a_finished_sample_is_decoded_to_what_the_pipeline_returns(name: str, kind: str) -> None:
    pipe, last = mix(name).pipe, list[torch.Tensor]()
    asked = {**mix(name).pool[0], "output_type": kind, "num_inference_steps": 4}

    def keep(event: Event) -> None:
        if event.clean is not None:
            last[:] = [event.clean]

    with Engine(pipe, on_event=keep) as engine:
        (result,) = engine.generate([{**asked, "preview": True, "scheduler": None}])
        found = decoded(pipe, last[0], asked)
    assert type(found) is type(result.output[0]) and len(found) == len(result.output[0])
    a, b = (_numbers(images) for images in (found, result.output[0]))
    scale = 255 if kind == "pil" else 1
    # The sampler of the U-Net leaves a little noise at its last step.
    gap = np.abs(a - b).mean() if name == "emoji-unet" else np.abs(a - b).max()
    assert a.shape == b.shape and gap < (0.1 if name == "emoji-unet" else 0.01) * scale


def _numbers(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


def test_what_cannot_be_decoded_is_none() -> None:
    case = tiny.flux()
    assert decoded(case.pipe, torch.zeros(1, 9, 16), dict(height=16, width=16)) is None  # too many tokens
    assert decoded(case.pipe, torch.zeros(1, 4, 4, 4, 4), {}) is None
    assert decoded(case.pipe, torch.zeros(1, 3, 4, 4), {}) is None
    assert decoded(tiny.hunyuan_video().pipe, torch.zeros(1, 4, 2, 4, 4), {}) is None


def test_pictures_come_to_who_listens_the_newest_first_and_change_nothing() -> None:
    pipe = mix("emoji-flux").pipe
    asked = {
        **zoo.call_arguments("emoji-flux"),
        "prompt": "a red apple",
        "num_inference_steps": 12,
        "generator_seed": 1,
    }
    asked |= {"output_type": "np", "speedup": 3.0}
    told: list[Event] = []
    with Engine(pipe, on_event=told.append) as engine:
        (plain,) = engine.generate([asked])
        assert not any(event.image is not None for event in told)
        told.clear()
        results = sorted(engine.generate([{**asked, "preview": 3}, asked]), key=lambda r: r.index)
    assert all(np.allclose(result.output[0], plain.output[0], atol=1e-5) for result in results)
    shown = [event for event in told if event.image is not None]
    assert 1 < len(shown) <= 3 and {event.index for event in shown} == {results[0].index + 1}
    assert all(event.kind == "step" and event.image.shape == plain.output[0].shape for event in shown)
    steps = [event.step for event in shown]
    assert set(steps) <= {3, 6, 9} and steps == sorted(set(steps))
    ends = [float(np.abs(event.image - plain.output[0]).mean()) for event in shown]
    assert ends[-1] < ends[0], "they come closer to the result"
    assert [e.step for e in told if e.kind == "step" and e.image is None and e.index == shown[0].index] == list(
        range(1, 13)
    )


def test_pictures_wait_while_something_is_urgent_and_are_made_for_nobody(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, decoding = tiny.flux(), list[int]()
    monkeypatch.setattr("speca.engine.loop.decoded", lambda *_: decoding.append(1) or [Image.new("RGB", (1, 1))])
    asked = {**good(case, 0), "preview": 5}
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        engine.post(**asked).result(timeout=30)
        assert not decoding, "nobody listens"
    told: list[Event] = []
    with Engine(case.pipe, tiny.VERIFYING, max_live=1, on_event=told.append) as engine:
        first = engine.post(**asked, callback_on_step_end=held)
        assert held.reached.wait(30)
        second = engine.post(**good(case, 1))
        held.go.set()
        first.result(timeout=30), second.result(timeout=30)
        assert len(decoding) <= 1, "only in the round at whose beginning no other request was waiting"
        decoding.clear()
        engine.post(**asked).result(timeout=30)
    assert decoding and any(event.image is not None for event in told)
