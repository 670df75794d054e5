"""Placing calls: every scale of timesteps, branches by name and by order, new runs."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from speca.diffusers.branches import MAX_BRANCHES, Branches
from speca.diffusers.clock import Clock, Position
from speca.diffusers.stack import index_of_loop


def clock(scheduler: Any) -> Clock:
    return Clock(lambda: scheduler, None)


def placed(call: Position | None) -> tuple[int, bool]:
    assert call is not None
    return call.index, call.fresh


def named(branches: Branches, calls: Iterable[tuple[int, str | None, object, Tensor]]) -> list[str | None]:
    """Names of calls given as (step, context, shape, condition)."""
    return [branches.name(step, context, shape, {"encoder": condition}) for step, context, shape, condition in calls]


@pytest.mark.parametrize("scale", [lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000, lambda t: t.bfloat16()])
def test_any_scale_is_looked_up(scale: Any) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    c = clock(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        call = c.place(scale(t.float()).expand(3))
        assert placed(call) == (i, i == 0)
        assert call is not None and call.total == 50
        assert call.noise == pytest.approx(float(t) / 1000)


def test_a_view_of_the_timesteps_needs_no_value() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    c = clock(scheduler)
    scheduler.timesteps.tolist()
    c._read = None  # type: ignore[method-assign,assignment]  # reading would fail
    assert [placed(c.place(t.expand(4)))[0] for t in scheduler.timesteps] == list(range(20))


@pytest.mark.parametrize("begin", [0, 3])
def test_a_scheduler_that_keeps_its_index_spares_reading_the_device(begin: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(begin)
    c, x = clock(scheduler), torch.zeros(1, 2)
    unreadable = torch.empty(2, device="meta")  # a tensor on a device, made from the timestep
    for i in range(begin, 8):
        assert placed(c.place(unreadable)) == (i, i == begin)
        x = scheduler.step(x, scheduler.timesteps[i], x).prev_sample
    assert c.device_reads == 0


def test_a_loop_over_the_timesteps_spares_reading_the_device() -> None:
    """As `DiTPipeline` has one: the scheduler keeps no index, and the timestep is copied to the device at each step."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    c, unreadable = clock(scheduler), torch.empty(2, device="meta")

    def a_pipeline(steps: Tensor) -> list[int]:
        about = torch.eye(3).to_sparse()  # other things that a pipeline may hold
        assert about.is_sparse
        return [placed(c.place(unreadable))[0] for _ in steps]

    assert a_pipeline(scheduler.timesteps) == list(range(20)) and c.device_reads == 0


def test_two_timesteps_in_variables_leave_it_open() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    c = clock(scheduler)
    assert c.place(scheduler.timesteps[0]) is not None
    now, later = scheduler.timesteps[3], scheduler.timesteps[4]
    assert index_of_loop(c._element) is None and not torch.equal(now, later)
    del later
    assert index_of_loop(c._element) == 3


def test_branches_by_name_and_by_order() -> None:
    def fresh() -> Tensor:
        return torch.zeros(1)  # a pipeline that makes its conditions anew at each step leaves only the order

    b = Branches()
    assert named(b, ((i, None, 0, fresh()) for i in range(4) for _ in range(3))) == ["call", "call#2", "call#3"] * 4
    b.reset()
    assert named(b, ((i, n, 0, fresh()) for i in range(4) for n in "ab")) == ["a", "b"] * 4
    assert named(b, ((i, None, shape, fresh()) for i in range(4) for shape in "xy")) == ["call", "call#2"] * 4


@pytest.mark.parametrize("first", ["cond", "uncond"])
def test_guidance_that_stops_or_starts_half_way_does_not_shift_the_branch(first: str) -> None:
    order = [first, "uncond" if first == "cond" else "cond"]
    text = {name: torch.zeros(1) for name in order}
    during = [[n for n in order if n == "cond" or guided] for guided in (False, True, True, False, False, True)]
    b = Branches()
    seen: dict[str, set[str | None]] = {name: set() for name in order}
    for step, names in enumerate(during):
        for name, got in zip(names, named(b, [(step, None, 0, text[n]) for n in names]), strict=True):
            seen[name].add(got)
    assert seen == {"cond": {"call"}, "uncond": {"call#2"}}


def test_a_condition_changed_in_mid_run_is_another_branch_and_their_number_is_bounded() -> None:
    b, kept = Branches(), [torch.zeros(1) for _ in range(20)]
    names = named(b, [(i, None, 0, t) for i, t in enumerate(kept)])
    assert names[:3] == ["call", "call#2", "call#3"] and len(set(names)) == MAX_BRANCHES
    assert named(b, ((30, None, 0, torch.zeros(1)) for _ in range(9))) == [*names[:MAX_BRANCHES], None]


def test_second_order_schedulers_are_placed_on_their_own_list() -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    c, x = clock(scheduler), torch.zeros(1, 2)
    indices = []
    for t in scheduler.timesteps:
        indices.append(placed(c.place(t.clone()))[0])
        x = scheduler.step(torch.ones(1, 2), t, x).prev_sample
    assert indices == list(range(len(scheduler.timesteps)))


def test_a_new_run_begins_with_new_timesteps_or_an_earlier_step() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(8)
    c = clock(scheduler)
    t = scheduler.timesteps
    assert [placed(c.place(t[i]))[1] for i in (0, 1, 2, 1)] == [True, False, False, True]
    scheduler.set_timesteps(8)
    assert placed(c.place(scheduler.timesteps[3]))[1]
    c.reset()
    assert placed(c.place(scheduler.timesteps[4]))[1]


def test_steps_left_out_are_seen() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(8)
    c, t = clock(scheduler), scheduler.timesteps
    calls = [c.place(t[i]) for i in (3, 3, 4, 6, 7)]
    assert [call.jumped for call in calls if call] == [False, False, False, True, False]


def test_context_with_index_wins() -> None:
    c = Clock(lambda: None, None)
    context = SimpleNamespace(name="cond", step_index=3, num_inference_steps=9, sigma=None)
    call = c.place(torch.tensor([77.0]), context)
    assert placed(call) == (3, True) and call is not None and call.total == 9


def test_clean_tokens_of_a_given_frame_do_not_hide_the_step() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    time = scheduler.timesteps[4].clone() * torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 4)
    assert placed(clock(scheduler).place(time))[0] == 4


def test_a_time_of_the_pipelines_own_making_is_placed_by_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    c, x, seen = clock(scheduler), torch.zeros(1), []
    for t in scheduler.timesteps:
        seen.append(placed(c.place(torch.tensor([-1e4 - float(t)])))[0])
        x = scheduler.step(x, t, x).prev_sample
    assert seen == list(range(6))


def test_a_scheduler_that_stands_still_is_not_the_one_in_use() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    c = clock(scheduler)
    assert [c.place(torch.tensor([-1e4 - i])) is None for i in (0, 0, 1, 2)] == [False, False, True, True]


def test_what_cannot_be_placed_is_not_guessed() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    c = clock(scheduler)
    assert c.place(torch.tensor(-500.0)) is None and "not on the scheduler's time axis" in c.problem
    assert clock(scheduler).place(torch.tensor([900.0, 100.0])) is None
    assert Clock(lambda: None, None).place(torch.tensor(3.0)) is None


def test_a_call_too_many_of_a_counted_run_is_not_placed() -> None:
    """Time goes on, so it is no new run; going back is one."""
    c = Clock(lambda: None, 4)
    assert [placed(c.place(torch.tensor(t))) for t in (9.0, 7.0, 5.0, 5.0, 1.0)] == [
        (0, True), (1, False), (2, False), (2, False), (3, False),
    ]  # fmt: skip
    assert c.place(torch.tensor(0.5)) is None and "num_inference_steps=4" in c.problem
    assert placed(c.place(torch.tensor(9.0))) == (0, True)


def test_looking_at_a_time_places_nothing() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(8)
    c, t = clock(scheduler), scheduler.timesteps
    assert placed(c.place(t[2])) == (2, True)
    assert c.peek(t[3]) == 3 and c.peek(t[5].clone()) == 5 and c.peek(torch.tensor(-500.0)) is None
    assert placed(c.place(t[3])) == (3, False)
