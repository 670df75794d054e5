"""Placing calls: every scale of timesteps, branches by name and by ordinal, new trajectories."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from speca.model.calls import Call, Clock


def clock(scheduler: Any) -> Clock:
    return Clock(lambda: scheduler, None)


def placed(call: Call | None) -> tuple[int, str, bool]:
    assert call is not None
    return call.position.index, call.branch, call.fresh


@pytest.mark.parametrize("scale", [lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000, lambda t: t.bfloat16()])
def test_any_scale_is_looked_up(scale: Any) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    c = clock(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        call = c.place(scale(t.float()).expand(3), None, 0)
        assert placed(call) == (i, "call", i == 0)
        assert call is not None and call.position.total == 50
        assert call.position.noise == pytest.approx(float(t) / 1000)


def test_a_view_of_the_timesteps_needs_no_value() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    c = clock(scheduler)
    scheduler.timesteps.tolist()
    c._read = None  # type: ignore[method-assign,assignment]  # reading would fail
    assert [placed(c.place(t.expand(4), None, 0))[0] for t in scheduler.timesteps] == list(range(20))


def test_branches_by_ordinal_and_by_name() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    c = clock(scheduler)
    seen = [placed(c.place(t.expand(2), None, 0)) for t in scheduler.timesteps for _ in range(2)]
    assert [b for _, b, _ in seen] == ["call", "call#2"] * 5
    c.reset()
    names = [placed(c.place(t.expand(2), SimpleNamespace(name=n), 0))[1] for t in scheduler.timesteps for n in "ab"]
    assert names == ["a", "b"] * 5


def test_guidance_that_stops_half_way_does_not_shift_the_branch() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    c = clock(scheduler)
    seen = [placed(c.place(t, None, 0))[1] for i, t in enumerate(scheduler.timesteps) for _ in range(2 if i < 3 else 1)]
    assert seen == ["call", "call#2"] * 3 + ["call"] * 3


def test_second_order_schedulers_are_placed_on_their_own_list() -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    c, x = clock(scheduler), torch.zeros(1, 2)
    indices = []
    for t in scheduler.timesteps:
        indices.append(placed(c.place(t.clone(), None, 0))[:2])
        x = scheduler.step(torch.ones(1, 2), t, x).prev_sample
    assert indices == [(i, "call") for i in range(len(scheduler.timesteps))]


def test_new_trajectory_on_new_timesteps_going_back_or_another_shape() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(8)
    c = clock(scheduler)
    t = scheduler.timesteps
    assert [placed(c.place(t[i], None, 0))[2] for i in (0, 1, 2, 1)] == [True, False, False, True]
    assert placed(c.place(t[2], None, "other"))[2]
    scheduler.set_timesteps(8)
    assert placed(c.place(scheduler.timesteps[3], None, "other"))[2]
    c.reset()
    assert placed(c.place(scheduler.timesteps[4], None, "other"))[2]


def test_context_with_index_wins() -> None:
    c = Clock(None, None)
    context = SimpleNamespace(name="cond", step_index=3, num_inference_steps=9, sigma=None)
    call = c.place(torch.tensor([77.0]), context, 0)
    assert placed(call) == (3, "cond", True) and call is not None and call.position.total == 9


def test_what_cannot_be_placed_is_not_guessed() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    assert clock(scheduler).place(torch.tensor(-500.0), None, 0) is None
    assert clock(scheduler).place(torch.tensor([900.0, 100.0]), None, 0) is None
    assert Clock(None, None).place(torch.tensor(3.0), None, 0) is None
