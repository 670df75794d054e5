"""Requests that run together: each as it would alone, whatever the order, the caps and the company."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import speca
import tiny
from engine.mixes import BUNDLED, CLOSE, PRESETS, TINY, decisions, distance, mix
from speca.diffusers.accelerator import ATTRIBUTE
from speca.engine import Engine
from speca.errors import ConfigError, InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
TRACE = dict(deadline=None, suppress_health_check=list(HealthCheck))
HOW = st.fixed_dictionaries(
    dict(
        max_batch=st.integers(1, 9), max_wait=st.integers(0, 5), max_live=st.integers(1, 9),
        mode=st.sampled_from(["continuous", "continuous", "lock-step"]),
        memory=st.sampled_from([None, None, "10MiB"]),
    )
)  # fmt: skip


@pytest.mark.parametrize("mode", ["continuous", "lock-step"])
@pytest.mark.parametrize("name", [*BUNDLED, *TINY, "flux", "tiny-dit"])
def test_everything_mixed_equals_one_at_a_time(name: str, mode: str) -> None:
    found = mix(name).demand_same(list(range(8)), max_batch=6, mode=mode)
    drawn = "".join(d for n in range(8) for d in decisions(mix(name).oracle(n)))
    assert "A" in drawn and "F" in drawn
    assert found["lanes"]["full"]["rows_a_batch"] > 1.2, "nothing was put together"
    assert found["reads"] <= found["ticks"]


def test_no_forward_records_gradients() -> None:
    """Prompts of unequal length, so that the test of whether they may be mixed runs too."""
    pipe = mix("emoji-video").pipe
    seen: set[bool] = set()
    block = pipe.transformer.transformer_blocks[0]
    handle = block.register_forward_pre_hook(lambda *_: seen.add(torch.is_grad_enabled()))
    try:
        mix("emoji-video").demand_same(list(range(6)), max_batch=6)
    finally:
        handle.remove()
    assert seen == {False}


@pytest.mark.parametrize("name", ["tiny-dit", "flux"])
def test_any_order_and_any_caps(name: str) -> None:
    @settings(max_examples=12, **TRACE)
    @given(numbers=st.lists(st.integers(0, 7), min_size=1, max_size=9), how=HOW)
    def trace(numbers: list[int], how: dict[str, Any]) -> None:
        mix(name).demand_same(numbers, **how)

    trace()


@pytest.mark.slow
def test_no_decision_depends_on_the_company() -> None:
    """200 random mixes of requests, in any order, at any caps."""
    changed = []

    @settings(max_examples=200, **TRACE)
    @given(numbers=st.lists(st.integers(0, 15), min_size=2, max_size=5), how=HOW)
    def trace(numbers: list[int], how: dict[str, Any]) -> None:
        changed.append(numbers)
        mix("tiny-dit", 16).demand_same(numbers, **how)

    trace()
    assert len(changed) >= 200


def test_the_order_of_results_is_that_of_their_ends_and_they_know_their_number() -> None:
    case = tiny.dit()
    asked = [dict(class_labels=[n], num_inference_steps=steps, id=f"n{n}") for n, steps in enumerate([12, 6, 9])]
    with Engine(case.pipe, max_batch=8) as engine:
        results = list(engine.generate(asked))
    assert [r.id for r in results] == ["n1", "n2", "n0"] and [r.index for r in results] == [1, 2, 0]
    assert len({r.seed for r in results}) == 3, "requests without a seed are given one each"


def test_a_request_of_several_images_and_prompts_of_other_lengths() -> None:
    mixed = mix("flux")
    pool = [dict(asked) for asked in mixed.pool]
    for n, asked in enumerate(pool):
        asked["num_images_per_prompt"] = 1 + n % 2
        if n % 3 == 0:
            asked["prompt_embeds"] = asked["prompt_embeds"][:, :4]
    with Engine(mixed.pipe, mode="one-at-a-time") as engine:
        alone = {r.index: r for r in engine.generate(pool)}
    with Engine(mixed.pipe, max_batch=8) as engine:
        together = {r.index: r for r in engine.generate(pool)}
    for n in range(8):
        assert decisions(together[n]) == decisions(alone[n]) and len(decisions(alone[n])) == 1 + n % 2
        assert distance(together[n], alone[n]) < CLOSE


def test_masked_prompts_of_other_lengths_are_run_together_once_that_is_tested() -> None:
    mixed = mix("hunyuan-video-cfg")
    own = dict(preset=tiny.VERIFYING, settings=dict(threshold=0.6), speedup=None, num_inference_steps=9)
    pool = [{**asked, **own} for asked in mixed.pool]
    for n, asked in enumerate(pool):
        asked["prompt_attention_mask"] = asked["prompt_attention_mask"].clone()
        asked["prompt_attention_mask"][:, 3 + n % 3 :] = 0
    with Engine(mixed.pipe, mode="one-at-a-time") as engine:
        alone = {r.index: r for r in engine.generate(pool)}
    with Engine(mixed.pipe, max_batch=8) as engine:
        together = {r.index: r for r in engine.generate(pool)}
        rows = engine.statistics["lanes"]["full"]["rows_a_batch"]
    for n in range(8):
        assert decisions(together[n]) == decisions(alone[n])
        assert distance(together[n], alone[n]) < CLOSE
    assert rows > 8 / 3, "only prompts of one length were run together"


def test_the_pipeline_is_as_before_and_may_be_called_between() -> None:
    case = tiny.flux()
    plain = case([1])
    with Engine(case.pipe, tiny.VERIFYING, threshold=1e9) as engine:
        list(engine.generate([dict(case.arguments, **case.conditions([1]), num_inference_steps=8)]))
        assert not case([1]).equal(plain)
        assert "A" in speca.report(case.pipe).samples[0].decisions
    assert ATTRIBUTE not in case.transformer.__dict__
    assert case([1]).equal(plain)
    speca.enable(case.pipe, "fast")
    with Engine(case.pipe) as engine:
        list(engine.generate([dict(case.arguments, **case.conditions([1]), num_inference_steps=8)]))
    assert ATTRIBUTE in case.transformer.__dict__, "what was enabled before stays so"


def test_a_model_that_is_not_supported_runs_plainly_and_says_so() -> None:
    case = tiny.dit()
    with Engine(case.pipe) as engine, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.transformer.train()
        results = list(engine.generate([dict(class_labels=[n], num_inference_steps=5) for n in range(3)]))
    assert all(any("training mode" in note for note in r.report.notes) for r in results)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (dict(class_label=[1]), "did you mean 'class_labels'"),
        (dict(class_labels=[1], generator_seed=-1), "generator_seed=-1"),
        (dict(class_labels=[1], deadline=0), "deadline=0"),
        (dict(class_labels=[1], priority=0.5), "priority=0.5"),
        (dict(class_labels=[1], preset="quick"), "unknown preset 'quick'"),
        (dict(class_labels=[1], settings=dict(tresh=1)), "unknown setting 'tresh'"),
    ],
)
def test_a_wrong_request_is_refused_and_those_before_it_are_served(asked: dict[str, Any], says: str) -> None:
    good = dict(class_labels=[2], num_inference_steps=4)
    with Engine(tiny.dit().pipe) as engine:
        results = []
        with pytest.raises((InputError, ConfigError), match=says):
            results.extend(engine.generate([good, asked, good]))
        assert engine.statistics["done"] == 1 and engine.statistics["live"] == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(mode="continous"), "did you mean 'continuous'"),
        (dict(memory="8 apples"), "memory='8 apples' is no size"),
        (dict(max_batch=0), "max_batch=0"),
    ],
)
def test_a_wrong_engine_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Engine(tiny.dit().pipe, **wrong)


def test_model_offload_is_refused() -> None:
    case = tiny.dit()
    case.pipe._all_hooks = ["one"]
    with pytest.raises(ConfigError, match="offloads whole models"):
        Engine(case.pipe)


@pytest.mark.parametrize("number", range(len(PRESETS)))
def test_the_settings_of_a_request_are_those_it_runs_with(number: int) -> None:
    """Whatever the engine itself was made with: a request decides as its settings do outside of an engine."""
    own = dict(PRESETS[number])
    base, more = own.pop("preset", "balanced"), {**own.pop("settings", {}), **own}
    case = tiny.dit()
    asked = {**case.arguments, **case.conditions([3]), "num_inference_steps": 14, "scheduler": None}
    with speca.enabled(case.pipe, base, **more):
        case([3], steps=14)
        expected = [s.decisions for s in speca.report(case.pipe).samples]
        named = speca.report(case.pipe).config
    for engine_preset in ("balanced", tiny.VERIFYING):
        with Engine(case.pipe, engine_preset) as engine:
            (result,) = engine.generate([{**asked, "generator_seed": 3, **dict(preset=base), **PRESETS[number]}])
        assert decisions(result) == expected
        assert result.report.config == named


def test_requests_learn_and_later_ones_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is computed in full, and so are those beside it; then all are accelerated, each as alone."""
    monkeypatch.setenv("SPECA_CACHE", str(tmp_path))
    case = tiny.flux()
    asked = [
        {**case.arguments, **case.conditions([seed]), "num_inference_steps": 16, "generator_seed": seed}
        for seed in range(4)
    ]
    with speca.Engine(case.pipe, "balanced", max_batch=4, speedup=4) as engine:
        first = list(engine.generate(asked[:2]))
        assert {sample.full for result in first for sample in result.report.samples} == {16}
        later = sorted(engine.generate(asked), key=lambda result: result.index)
        assert {sample.full for result in later for sample in result.report.samples} == {4}
    assert "step" not in vars(case.pipe.scheduler)


def test_a_calibration_that_does_not_hold_for_one_request_is_used_for_the_next() -> None:
    """At ten steps that of `fashion-dit` does not hold for some samples; they decide the same whoever came before."""
    pipe = speca.zoo.load("fashion-dit")
    pipe.set_progress_bar_config(disable=True)
    asked = [dict(class_labels=[n], num_inference_steps=10, generator_seed=n) for n in range(8)]
    with Engine(pipe) as engine:
        first, second = (sorted(engine.generate(asked), key=lambda r: r.index) for _ in range(2))
    notes = "".join(note for result in first if result.report is not None for note in result.report.notes)
    assert "does not hold for some samples" in notes
    assert [decisions(r) for r in first] == [decisions(r) for r in second]
