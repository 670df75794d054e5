"""One transformer in several pipelines, with one scheduler or their own, in one thread or two."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from typing import Any

import diffusers
import pytest
import torch

import speca
import tiny
from pipelines.cases import RECIPES
from speca.diffusers.accelerator import ATTRIBUTE
from speca.diffusers.enable import HOOK

SEEDS = [3, 8]
LOOSE = dict(preset=tiny.VERIFYING, threshold=1e9, min_draft=0, max_draft=3)


def decisions(case: tiny.Case) -> str:
    return speca.report(case.pipe).samples[0].decisions


def from_an_image(case: tiny.Case, **own: Any) -> tiny.Case:
    """An image-to-image pipeline of the components of `case`, but for those given."""
    pipe = diffusers.FluxImg2ImgPipeline(**{**case.pipe.components, **own})
    pipe.set_progress_bar_config(disable=True)
    other = RECIPES["flux-img2img"].build()
    return tiny.Case(pipe, other.arguments, other.conditions)


def with_scheduler_of_its_own(case: tiny.Case, **settings: Any) -> tiny.Case:
    """A copy of the pipeline that shares the transformer, as a server makes one for each request."""
    pipe = copy.copy(case.pipe)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    return tiny.Case(pipe, case.arguments, case.conditions)


@pytest.fixture
def shared() -> tuple[tiny.Case, tiny.Case, torch.Tensor, torch.Tensor]:
    """Two pipelines of one transformer and one scheduler, and what each gives when it is alone."""
    one = RECIPES["flux"].build()
    two = from_an_image(one)
    speca.enable(one.pipe, **LOOSE)
    first = one(SEEDS)
    speca.enable(two.pipe, **LOOSE)
    second = two(SEEDS)
    speca.disable(two.pipe)
    return one, two, first, second


def test_two_pipelines_of_the_same_components(shared: Any) -> None:
    one, two, first, second = shared
    speca.enable(one.pipe, **LOOSE)
    for _ in range(2):
        assert torch.equal(one(SEEDS), first)
        assert torch.equal(two(SEEDS), second), "enabling one pipeline accelerates its transformer, whoever calls it"
    assert decisions(one) == "FFFAAAFAAAFAAF"
    assert decisions(two) == "FFFAAAFAAF"
    assert speca.report(one.pipe.transformer) == speca.report(two.pipe), "a transformer reports its last run"


def test_disabling_one_disables_the_transformer_they_share(shared: Any) -> None:
    one, two, _, _ = shared
    plain = one(SEEDS)
    speca.enable(one.pipe, **LOOSE)
    speca.disable(two.pipe)
    assert torch.equal(one(SEEDS), plain)
    with pytest.raises(speca.NotEnabledError):
        speca.report(one.pipe)


def test_enabling_the_other_replaces_the_settings_of_both(shared: Any) -> None:
    one, two, first, _ = shared
    speca.enable(one.pipe, **LOOSE)
    assert torch.equal(one(SEEDS), first)
    speca.enable(two.pipe, tiny.VERIFYING, threshold=0.0, min_draft=0)
    with pytest.raises(speca.NotEnabledError, match="nothing has run yet"):
        speca.report(one.pipe)
    one(SEEDS)
    assert set(decisions(one)) == {"F", "R"}


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_pipeline_with_a_scheduler_of_its_own_is_placed_on_it(ran_before: bool) -> None:
    one = RECIPES["flux"].build()
    two = with_scheduler_of_its_own(one, shift=7.0)
    speca.enable(two.pipe, **LOOSE)
    expected = two(SEEDS, steps=10)
    decided = decisions(two)
    speca.enable(one.pipe, **LOOSE)  # the other pipeline, which has another scheduler, is the one that was enabled
    if ran_before:
        one(SEEDS)
    assert torch.equal(two(SEEDS, steps=10), expected)
    assert decisions(two) == decided == "FFFAAAFAAF"
    assert not [n for n in speca.report(two.pipe).notes if "plainly" in n]
    assert speca.report(two.pipe).steps == 10


def test_a_run_inside_another_run() -> None:
    one = RECIPES["flux"].build()
    two = with_scheduler_of_its_own(one, shift=7.0)
    speca.enable(one.pipe, **LOOSE)
    expected, inner = one(SEEDS), two(SEEDS, steps=9)
    got: list[torch.Tensor] = []

    def preview(pipe: Any, i: int, t: Any, kwargs: Any) -> dict[str, Any]:
        if i in {4, 8}:
            got.append(two(SEEDS, steps=9))
        return {}

    assert torch.equal(one(SEEDS, callback_on_step_end=preview), expected)
    assert len(got) == 2
    assert all(torch.equal(g, inner) for g in got)


def test_two_threads_one_transformer() -> None:
    one = RECIPES["flux-cfg"].build()
    cases = [one, with_scheduler_of_its_own(one, shift=7.0)]
    seeds = [[3, 8], [5]]
    speca.enable(one.pipe, **LOOSE)
    expected = [case(s) for case, s in zip(cases, seeds, strict=True)]
    results: list[list[torch.Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(4):
            results[i].append(cases[i](seeds[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # let them take turns as often as can be
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for mine, wanted, case, s in zip(results, expected, cases, seeds, strict=True):
        assert len(mine) == 4
        assert all(torch.equal(m, wanted) for m in mine)
        assert [x.decisions for x in speca.report(case.pipe).samples] == ["FFFAAAFAAAFAAF"] * len(s)


def test_the_context_of_one_thread_is_not_that_of_another() -> None:
    model = RECIPES["flux-cfg"].build().transformer
    speca.enable(model, num_inference_steps=10)
    contexts = model._diffusers_hook.get_hook(HOOK).contexts
    seen: list[str] = []

    def work() -> None:
        with model.cache_context("uncond"):
            seen.append(contexts.here.name)

    with model.cache_context("cond"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        seen.append(contexts.here.name)
    assert seen == ["uncond", "cond"]
    assert contexts.here is None


def test_ones_own_loop_with_the_scheduler_of_the_pipeline() -> None:
    case = RECIPES["dit"].build()
    speca.enable(case.pipe, **LOOSE)
    case.pipe.scheduler.set_timesteps(10)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in case.pipe.scheduler.timesteps:
        out = case.transformer(x, timestep=t.expand(2), class_labels=torch.tensor([1, 2])).sample[:, :4]
        x = case.pipe.scheduler.step(out, t, x).prev_sample
    assert decisions(case) == "FFFAAAFAAF"


def test_a_scheduler_that_is_not_stepped_through_is_noticed() -> None:
    model, told, used = tiny.dit_transformer(), diffusers.DDIMScheduler(), diffusers.DDIMScheduler()
    used.set_timesteps(20)
    told.set_timesteps(100)
    speca.enable(model, scheduler=told, **LOOSE)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in used.timesteps:
        out = model(x, timestep=t.expand(2).clone(), class_labels=torch.tensor([1, 2])).sample[:, :4]
        x = used.step(out, t, x).prev_sample
    report = speca.report(model)
    assert set(report.samples[0].decisions) == {"F"}, "nothing is forecast across steps that were left out"
    assert any("left out" in note for note in report.notes)


def test_remarks_on_one_run_are_not_on_the_next() -> None:
    model, scheduler = tiny.dit_transformer(), diffusers.DDIMScheduler()
    speca.enable(model, scheduler=scheduler, **LOOSE)

    def loop(steps: int) -> None:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            model(torch.zeros(1, 4, 4, 4), timestep=t.expand(1), class_labels=torch.tensor([1]))

    with pytest.warns(UserWarning, match="3 steps leave nothing to forecast"):
        loop(3)
    assert [s.decisions for s in speca.report(model).samples] == ["FFF"]
    loop(10)
    loop(10)
    assert speca.report(model).notes == ()
    assert speca.report(model).steps == 10


def test_a_pipeline_that_is_dropped_takes_its_runs_along() -> None:
    one = RECIPES["flux"].build()
    speca.enable(one.pipe, **LOOSE)
    two = with_scheduler_of_its_own(one)
    for case in (one, two):
        case(SEEDS)
    run = one.transformer.__dict__[ATTRIBUTE]
    assert len(run.callers) == 2
    del two, case
    gc.collect()
    assert len(run.callers) == 1
