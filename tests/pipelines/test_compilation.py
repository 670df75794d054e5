"""Compiled models: blocks alone, or as a whole, before speca and after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from torch._dynamo.utils import counters

import speca
import tiny
from pipelines.test_combinations import EXACT, LOOSE, SEEDS, Doubling, decisions, put_on
from speca.diffusers.accelerator import ATTRIBUTE


@pytest.fixture
def counted() -> Iterator[Any]:
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize("speca_first", [False, True])
def test_compiled_blocks(counted: Any, speca_first: bool) -> None:
    bare, case = tiny.flux(), tiny.flux()
    bare.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    plain = bare(SEEDS)
    if speca_first:
        speca.enable(case.pipe, **EXACT)
    case.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    if not speca_first:
        speca.enable(case.pipe, **EXACT)
    assert torch.equal(case(SEEDS), plain)
    assert set(decisions(case)) == {"F", "R"}
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS)
    assert "A" in decisions(case)
    assert sum(counted["graph_break"].values()) == 0
    assert counted["stats"]["unique_graphs"] > 0


def test_the_original_forward_compiled_whole(counted: Any) -> None:
    bare, case = tiny.flux(), tiny.flux()
    for one in (bare, case):
        one.transformer.forward = torch.compile(one.transformer.forward, fullgraph=True, backend="eager")
    plain = bare(SEEDS)
    speca.enable(case.pipe, **EXACT)
    assert torch.equal(case(SEEDS), plain)
    assert set(decisions(case)) == {"F", "R"}
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS)
    assert "A" in decisions(case)
    assert sum(counted["graph_break"].values()) == 0
    speca.disable(case.pipe)
    assert torch.equal(case(SEEDS), plain)


WAYS = {
    "tolerance": dict(tolerance=1.0),
    "budget": dict(speedup=3.0),
    "schedule": dict(schedule=(0, 1, 5, 9)),
}


def compiled(case: tiny.Case, how: str) -> list[int]:
    """Compile the transformer as a whole; a list that tells, by its length, how often what was compiled has run."""
    ran: list[int] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(1)
            return graph.forward(*args)

        return run

    if how == "in place":
        case.transformer.compile(backend=backend)
    elif how == "wrapped":
        case.pipe.transformer = torch.compile(case.transformer, backend=backend)
    else:
        case.transformer.forward = torch.compile(case.transformer.forward, backend=backend)
    return ran


def attributes(case: tiny.Case) -> list[dict[str, Any]]:
    """What the transformer has on its instance, and what it wraps if it is a wrapper."""
    inner = getattr(case.transformer, "_orig_mod", case.transformer)
    return [dict(vars(m)) for m in dict.fromkeys((case.transformer, inner))]


HOWS = ["in place", "wrapped", "forward"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_a_model_compiled_as_a_whole_is_forecast(counted: Any, how: str, ran_before: bool, way: str) -> None:
    """Full steps go through the compiled call, drafts run nothing, and disable puts everything back."""
    bare, case = tiny.flux(), tiny.flux()
    plain = bare(SEEDS)
    speca.enable(bare.pipe, **WAYS[way])
    expected = bare(SEEDS)
    ran = compiled(case, how)
    if ran_before:  # diffusers then has a registry of hooks on the model
        case(SEEDS)
        assert len(ran) == tiny.STEPS and counted["stats"]["unique_graphs"] == 1
    before = attributes(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speca.enable(case.pipe, **WAYS[way])
        ran.clear()
        assert torch.equal(case(SEEDS), expected)
        letters = decisions(case)
        assert letters == decisions(bare) and set(letters) == {"F", "A"}
        assert len(ran) == letters.count("F"), "each full step runs what was compiled, drafts run nothing"
        graphs = counted["stats"]["unique_graphs"]
        assert torch.equal(case(SEEDS), expected)
    assert graphs <= 1 + ran_before and counted["stats"]["unique_graphs"] == graphs, "compiled once"
    assert len(ran) == 2 * letters.count("F")
    assert not any("plainly" in note or "compiled" in note for note in speca.report(case.pipe).notes)
    speca.disable(case.pipe)
    assert attributes(case) == before
    assert torch.equal(case(SEEDS), plain) and len(ran) == 2 * letters.count("F") + tiny.STEPS


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_compiled_model_with_another_hook_stays_right(counted: Any, how: str) -> None:
    """Beneath a wrapper, speca stands beside it, so that nothing is compiled."""
    bare, case = tiny.flux(), tiny.flux()
    put_on(bare, Doubling)
    put_on(case, Doubling)
    plain = bare(SEEDS)
    speca.enable(bare.pipe, speedup=3.0)
    expected = bare(SEEDS)
    ran = compiled(case, how)
    speca.enable(case.pipe, speedup=3.0)
    says = pytest.warns(UserWarning, match=r"uncompiled.*compile_repeated_blocks\(\)")
    with says if how == "wrapped" else nullcontext():
        assert torch.equal(case(SEEDS), expected)
    assert decisions(case) == decisions(bare)
    speca.disable(case.pipe)
    ran.clear()
    assert torch.equal(case(SEEDS), plain)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_drafts_of_a_model_compiled_as_a_whole_are_not_verified_and_it_says_so(counted: Any, how: str) -> None:
    case = tiny.flux()
    compiled(case, how)
    plain, before = case(SEEDS), attributes(case)
    speca.enable(case.pipe, **LOOSE)
    with pytest.warns(UserWarning, match=r"runs plainly.*compiled as a whole.*compile_repeated_blocks\(\)"):
        assert torch.equal(case(SEEDS), plain)
    assert set(decisions(case)) == {"F"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(case(SEEDS), plain)
    assert any("compiled as a whole" in note for note in speca.report(case.pipe).notes)
    speca.disable(case.pipe)
    assert attributes(case) == before
    assert torch.equal(case(SEEDS), plain)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_sampler_that_is_not_linear_runs_a_compiled_model_plainly(counted: Any, how: str) -> None:
    """Short drafts would be verified there."""
    case = tiny.dit()
    case.pipe.scheduler = diffusers.DDIMScheduler(clip_sample=True)
    compiled(case, how)
    plain = case(SEEDS)
    speca.enable(case.pipe)
    with pytest.warns(UserWarning, match="compiled as a whole"):
        assert torch.equal(case(SEEDS), plain)
    assert set(decisions(case)) == {"F"}


@pytest.mark.parametrize("how", ["in place", "forward"])
def test_a_model_compiled_after_speca_stays_right_and_says_so(counted: Any, how: str) -> None:
    case = tiny.flux()
    plain = case(SEEDS)
    speca.enable(case.pipe, **LOOSE)
    fast = case(SEEDS)
    compiled(case, how)
    expected = plain if how == "in place" else fast  # compiled as a whole, or not at all
    with pytest.warns(UserWarning, match="compile_repeated_blocks"):
        assert torch.equal(case(SEEDS), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(case(SEEDS), expected)


@pytest.mark.parametrize("how", HOWS)
def test_a_forecast_model_compiled_after_speca_stays_right(counted: Any, how: str) -> None:
    """Compiled in place, full steps are compiled as well; else they are not, and it says so."""
    case = tiny.flux()
    plain = case(SEEDS)
    speca.enable(case.pipe, speedup=3.0)
    fast, letters = case(SEEDS), decisions(case)
    assert not torch.equal(fast, plain)
    ran = compiled(case, how)
    says = pytest.warns(UserWarning, match=r"uncompiled.*beneath what was compiled.*compile_repeated_blocks")
    with nullcontext() if how == "in place" else says:
        assert torch.equal(case(SEEDS), fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(case(SEEDS), fast)
    assert decisions(case) == letters
    assert len(ran) == (2 * letters.count("F") if how == "in place" else 0)
    assert any("uncompiled" in note for note in speca.report(case.pipe).notes) == (how != "in place")


def test_a_module_wrapped_after_speca_is_still_known(counted: Any) -> None:
    case = tiny.flux()
    speca.enable(case.pipe, **LOOSE)
    fast, model = case(SEEDS), case.transformer
    case.pipe.transformer = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="beneath what was compiled"):
        assert torch.equal(case(SEEDS), fast)
    assert "A" in decisions(case)
    with speca.enabled(case.pipe, **LOOSE) as session, session.paused():
        assert ATTRIBUTE not in model.__dict__
    assert ATTRIBUTE not in model.__dict__ and ATTRIBUTE not in case.transformer.__dict__
    speca.enable(model, num_inference_steps=8)
    speca.disable(case.pipe)
    assert ATTRIBUTE not in model.__dict__
