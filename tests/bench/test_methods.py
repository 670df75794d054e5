"""Methods of the bench: they leave no trace, do what they say, and oracles cannot be beaten by chance."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

import speca
import tiny
from bench.toy import PLAN, arguments
from speca.bench import measure, modules, oracle, recording, rivals
from speca.bench.field import methods
from speca.bench.methods import plain, scheduled
from speca.bench.search import search
from speca.verified import rules

STEPS = PLAN.steps


def tuning_data(case: tiny.Case, seeds: tuple[int, ...] = (1, 2), tries: int = 4) -> recording.TuningData:
    make, tuning = arguments(case), [500_001, 500_002]
    calls = (make(case.pipe, some, STEPS) for some in (list(seeds), tuning))
    call, tuning_call = calls
    return recording.TuningData(case.pipe, call, list(seeds), tuning_call, tuning, 2, tries)


@pytest.mark.parametrize("name", sorted(set(methods()) - {"none", "presets", "fewer-steps"}))
@pytest.mark.parametrize("model", ["dit", "flux"])
def test_every_method_leaves_the_pipeline_as_it_was(model: str, name: str) -> None:
    case = tiny.PIPELINES[model]()
    transformer, scheduler, before = case.transformer, case.pipe.scheduler, case([1])
    kept = set(vars(transformer))
    cls, method = type(transformer), methods(STEPS)[name]
    pytest.importorskip("cache_dit") if method.package == "cache-dit" else None
    prepared = method.prepare(tuning_data(case, (1,), 1), method.values[0]) if method.prepare else None
    call = arguments(case)(case.pipe, [1], STEPS)
    refused = pytest.raises(speca.InputError, match="belongs to no flow")
    with refused if (name, model) == ("adams-bashforth", "dit") else contextlib.nullcontext():
        measure.played(method.apply, case.pipe, call, prepared or method.values[len(method.values) // 2], [1], 1)
    assert case.pipe.scheduler is scheduler and type(transformer) is cls
    assert set(vars(transformer)) - {"_diffusers_hook", "_cache_config"} == kept - {"_diffusers_hook"}, "but diffusers'"
    assert torch.equal(case([1]), before)


# ------------------------------------------------------------------------------------------------ module caches
def test_differences_are_exact_on_lines_and_keep_one_term_an_order() -> None:
    differences = modules.Differences(2)
    for step in (0, 3, 6):
        differences.push(torch.tensor([2.0 * step + 1, -step]), step)
    assert torch.allclose(differences.at(8), torch.tensor([17.0, -8.0]))
    assert len(differences.terms) == 3 and differences.bytes() == 3 * 2 * 4


@pytest.mark.parametrize("model", ["dit", "flux", "hunyuan-video"])
def test_module_caches_without_drafts_change_nothing_and_drafts_cost_little(model: str) -> None:
    case = tiny.PIPELINES[model]()
    call = arguments(case)(case.pipe, [1], STEPS)
    full, cost = measure.weighed(plain, case.pipe, call, 0, [1], 1)
    always = speca.VerifiedConfig(rule="schedule", schedule=tuple(range(STEPS)), warmup=2, final=0)
    every = speca.VerifiedConfig(rule="interval", max_draft=2, warmup=2, final=0)
    same, whole = measure.weighed(modules.per_module(lambda _: always), case.pipe, call, 0, [1], 1)
    assert torch.equal(same.images, full.images) and whole.flops == cost.flops
    drafted, saved = measure.weighed(modules.per_module(lambda _: every), case.pipe, call, 0, [1], 1)
    assert not torch.equal(drafted.images, full.images)
    assert saved.flops < 0.75 * cost.flops and (saved.kept or 0) > 0


def test_the_released_rule_checks_the_last_block_and_acts_a_step_late() -> None:
    """A threshold that nothing meets makes a full step after each shortest draft; one that all meet, the longest."""
    case = tiny.dit()
    call = arguments(case)(case.pipe, [1], STEPS)
    base = dataclasses.replace(speca.PRESETS["paper"], rule="released", error="elementwise_l1", min_draft=2)
    _, full = measure.weighed(plain, case.pipe, call, 0, [1], 1)
    spent = {}
    for threshold in (1e-9, 1e9):
        config = dataclasses.replace(base, threshold=threshold, max_draft=4)
        _, cost = measure.weighed(modules.per_module(lambda _, c=config: c), case.pipe, call, 0, [1], 1)
        spent[threshold] = STEPS * cost.flops / full.flops
    every = speca.VerifiedConfig(rule="interval", max_draft=2, warmup=2, final=0)  # FFttFttFttFt
    _, cost = measure.weighed(modules.per_module(lambda _: every), case.pipe, call, 0, [1], 1)
    draft, check = (STEPS * cost.flops / full.flops - 5) / 7, 1 / 4  # embeddings and modulations; one of four blocks
    # F t F t t v F t t v F t against F t F t t v v F t t v v.
    assert spent[1e-9] == pytest.approx(4 + 8 * draft + 2 * check, abs=0.1)
    assert spent[1e9] == pytest.approx(3 + 9 * draft + 4 * check, abs=0.1)


def test_models_without_a_table_say_so() -> None:
    with pytest.raises(speca.InputError, match="no table of the modules of Linear"):
        modules.ModuleCache(torch.nn.Linear(2, 2), 1, None)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ recordings
def test_a_recording_predicts_what_drafts_do() -> None:
    """Of a linear sampler with outputs that do not depend on the sample, to the last digit."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 8, 5, generator=generator, dtype=torch.float64)
    effect = np.linspace(0.2, 1.0, 8)
    found = recording.Recording((outputs @ outputs.transpose(1, 2)).numpy(), effect)
    schedule = [0, 1, 4]
    v = outputs[0].numpy()
    used = v.copy()
    for step, (last, before) in {2: (1, 0), 3: (1, 0), 5: (4, 1), 6: (4, 1), 7: (4, 1)}.items():
        used[step] = v[last] + (v[last] - v[before]) * (step - last) / (last - before)
    error = (effect[:, None] * (used - v)).sum(0)
    assert found.errors(schedule)[0] == pytest.approx((error**2).sum())
    assert found.errors(range(8))[0] == pytest.approx(1e-12)
    middle = v.copy()  # interpolated where a full step follows
    weights = [((s - 1) * (s - 4) / 4, -s * (s - 4) / 3, s * (s - 1) / 12) for s in (2, 3)]
    for step, (a, b, c) in zip((2, 3), weights, strict=True):
        middle[step] = a * v[0] + b * v[1] + c * v[4]
    middle[5:] = used[5:]
    corrected = (effect[:, None] * (middle - v)).sum(0)
    assert found.errors(schedule, corrected=True)[0] == pytest.approx((corrected**2).sum())


def test_annealing_finds_the_steps_that_matter() -> None:
    """Outputs with one bend: two full steps at it, and everything else can be drafted exactly."""
    outputs = np.maximum(0.0, np.arange(30.0) - 13)[None, :, None]
    found = recording.Recording(outputs @ outputs.transpose(0, 2, 1), np.ones(30))
    even = recording.uniform_schedule(30, 5)
    best = recording.anneal(found, 5, tries=2000)
    assert {13, 14} <= set(best) or {14, 15} <= set(best), best
    assert len(best) == 5 and best[:2] == [0, 1]
    assert found.errors(best)[0] < 1e-9 and found.errors(even)[0] > 1e-3


def test_recordings_see_what_the_scheduler_sees_and_leave_it_alone() -> None:
    case = tiny.dit()
    setting = tuning_data(case)
    before = case([1])
    found = setting.recording()
    assert found.products.shape == (2, STEPS, STEPS) and len(found.effect) == STEPS
    assert np.allclose(found.products, found.products.transpose(0, 2, 1))
    assert "step" not in vars(case.pipe.scheduler) and torch.equal(case([1]), before)


def test_no_recording_of_a_sampler_that_is_not_linear() -> None:
    from diffusers import DPMSolverMultistepScheduler

    case = tiny.dit()
    case.pipe.scheduler = DPMSolverMultistepScheduler.from_config(case.pipe.scheduler.config, thresholding=True)
    with pytest.raises(speca.InputError, match="no schedule can be found on a recording"):
        tuning_data(case).recording()


def test_searching_finds_nothing_worse_than_an_even_schedule() -> None:
    case = tiny.dit()
    setting, apply = tuning_data(case), scheduled(False)
    found = search(apply, False)(setting, 5)
    loss = []
    for schedule in (found, recording.uniform_schedule(STEPS, 5)):
        made = measure.played(apply, case.pipe, setting.tuning_call, schedule, setting.tuning_seeds, 2)
        loss.append(sum(measure.quality(made.images, setting.reference())["relative_l2"]))
    assert len(found) == 5 and loss[0] <= loss[1]


def test_schedules_have_as_many_full_steps_as_asked() -> None:
    for full in (4, 8, 17, 26):
        assert len(recording.uniform_schedule(50, full)) == full and max(recording.uniform_schedule(50, full)) == 49
        drawn = recording.random_schedule(50, full, seed=1)
        assert len(drawn) == full and drawn[:2] == [0, 1]


# ------------------------------------------------------------------------------------------------ oracles
@pytest.mark.parametrize("corrector", [False, True])
def test_an_oracle_treats_each_sample_by_its_own_schedule(corrector: bool) -> None:
    """Across batches too: the fourth sample is the second of the second batch."""
    case, seeds = tiny.flux(), [1, 2, 3, 4]
    call = arguments(case)(case.pipe, seeds, STEPS)
    schedules = [[0, 1, *range(2, 2 + k)] for k in (3, 4, 5, 6)]
    own = functools.partial(oracle.own_schedules, corrector=corrector)
    made = measure.played(own, case.pipe, call, schedules, seeds, 2)
    assert made.report is not None
    assert [sample.full for sample in made.report.samples] == [5, 6, 7, 8]
    assert rules.RULES["schedule"] is rules.ScheduleRule


def test_a_perfect_verifier_computes_in_full_where_drafts_exceed_the_tolerance() -> None:
    products = np.zeros((1, 10, 10))
    outputs = np.array([0.0, 1, 2, 3, 9, 9, 9, 9, 9, 9])[:, None]
    products[0] = outputs @ outputs.T
    found = recording.Recording(products, np.ones(10))
    assert recording.true_errors(found, 0.0)[0] == [0, 1, 4, 5], "off at the bend, and once more for a slope across it"
    assert recording.true_errors(found, 100.0)[0] == [0, 1]


def test_fewest_steps_are_picked_among_what_was_measured() -> None:
    def row(steps: float, psnr: list[float]) -> dict[str, Any]:
        flops = dict(flops=steps * 10, flops_full=500.0, steps=50)
        return dict(kind="quality", method="searched-schedule", psnr=psnr, full_steps=[steps] * 2, **flops)

    rows = [row(20, [40.0, 39.0]), row(10, [36.0, 30.0]), row(7, [31.0, 25.0])]
    (found,) = oracle.fewest_steps(rows, "searched-schedule", (35.0,))
    assert found["full_steps"] == [10, 20] and found["psnr"] == [36.0, 39.0]
    assert found["flops"] == pytest.approx((100 + 200) / 2) and found["derived"] and found["family"] == "oracle"
    (out_of_reach,) = oracle.fewest_steps(rows, "searched-schedule", (90.0,))
    assert out_of_reach["full_steps"] == [50, 50] and out_of_reach["flops_speedup"] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------ rivals
def test_caches_of_diffusers_run_where_their_mixin_is_missing() -> None:
    """They do skip on DiT, which is no CacheMixin and names no context."""
    case = tiny.dit()
    call = arguments(case)(case.pipe, [1], STEPS)
    full, cost = measure.weighed(plain, case.pipe, call, 0, [1], 1)
    for name in ("first-block-cache", "taylorseer-cache", "taylorseer-lite", "mag-cache", "sea-cache", "faster-cache"):
        method = methods(STEPS)[name]
        made, spent = measure.weighed(method.apply, case.pipe, call, method.values[-1], [1], 1)
        assert spent.flops < cost.flops, name
        assert not torch.equal(made.images, full.images), name


def test_settings_of_cache_dit_are_what_they_say() -> None:
    library = pytest.importorskip("cache_dit")
    config = rivals.configuration(library, "F4B2 W3 MC6 R0.15")
    assert (config.Fn_compute_blocks, config.Bn_compute_blocks, config.max_warmup_steps) == (4, 2, 3)
    assert (config.max_continuous_cached_steps, config.residual_diff_threshold) == (6, 0.15)
    assert rivals.configuration(library, rivals.SETTINGS[-1]).max_continuous_cached_steps == -1
    with pytest.raises(speca.InputError, match="no setting of cache-dit"):
        rivals.configuration(library, "fast")
