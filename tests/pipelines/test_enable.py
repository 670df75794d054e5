"""The invariants of the mechanism, on tiny DiT, FLUX and HunyuanVideo pipelines of diffusers, unmodified."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from torch import nn

import speca
import tiny
from speca.diffusers.accelerator import ATTRIBUTE
from speca.verified.gate import block_lists

LOOSE = dict(preset=tiny.VERIFYING, threshold=1e9, min_draft=0, max_draft=3)
SEEDS = [3, 8, 5]


def decisions(case: tiny.Case) -> list[str]:
    return [s.decisions for s in speca.report(case.pipe).samples]


def middling(case: tiny.Case) -> float:
    """A threshold that rejects about half of the checked drafts of this pipeline."""
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS)
    errors = sorted(e for s in speca.report(case.pipe).samples for e in s.errors if e is not None)
    return errors[len(errors) // 2]


# -- 1. threshold 0 is bit-identical ------------------------------------------------------------------
def test_threshold_zero_is_bit_identical(case: tiny.Case) -> None:
    plain = case(SEEDS)
    speca.enable(case.pipe, tiny.VERIFYING, threshold=0.0, min_draft=0)
    assert torch.equal(case(SEEDS), plain)
    assert all(set(d) == {"F", "R"} for d in decisions(case))


def test_loose_threshold_changes_the_image_and_saves_flops(case: tiny.Case) -> None:
    plain = case(SEEDS)
    speca.enable(case.pipe, **LOOSE)
    assert not torch.equal(case(SEEDS), plain)
    case(SEEDS)  # the first run of a model also pays for the self-test
    report = speca.report(case.pipe)
    assert decisions(case) == ["FFF" + "AAAF" * 2 + "AAF"] * len(SEEDS)
    assert report.flops < report.flops_full
    assert report.flops_speedup == report.flops_full / report.flops > 1.3


# -- 2. batch-mates do not matter ---------------------------------------------------------------------
def test_a_row_does_not_depend_on_its_batch_mates(case: tiny.Case) -> None:
    threshold = middling(case) * 1.01
    speca.enable(case.pipe, tiny.VERIFYING, threshold=threshold, threshold_decay=1.0, min_draft=0, max_draft=4)
    alone: dict[int, tuple[str, torch.Tensor]] = {}
    for seed in range(6):
        image = case([seed])
        alone[seed] = (decisions(case)[0], image[0])
    assert len({d for d, _ in alone.values()}) > 1, "the samples must differ for this test to say anything"
    chooser = random.Random(0)
    for _ in range(4):
        mix = chooser.sample(range(6), chooser.randint(2, 5))
        images = case(mix)
        assert decisions(case) == [alone[s][0] for s in mix]
        for image, seed in zip(images, mix, strict=True):
            torch.testing.assert_close(image, alone[seed][1], rtol=2e-4, atol=2e-4)


def test_only_rejected_rows_are_recomputed(case: tiny.Case) -> None:
    threshold = middling(case) * 1.01
    rows: list[int] = []
    first = next(iter(block_lists(case.transformer).values()))[0]
    speca.enable(case.pipe, tiny.VERIFYING, threshold=threshold, threshold_decay=1.0, min_draft=0, max_draft=4)
    case(SEEDS)
    handle = first.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v)).shape[0]),
        with_kwargs=True,
    )
    case(SEEDS)
    handle.remove()
    report = speca.report(case.pipe)
    branches = list(case.transformer.__dict__[ATTRIBUTE].branches.values())
    computed = sum(len(t.rows) * t.fulls for b in branches for t in b.records)
    assert sum(rows) == computed
    if len(branches) == 1:  # with several calls a step a sample may be recomputed in one branch only
        per_sample = len(branches[0].records[0].rows)
        assert computed == per_sample * sum(s.full + s.rejected for s in report.samples)
    assert 0 < sum(s.rejected for s in report.samples) < sum(s.rejected + s.accepted for s in report.samples)
    assert min(rows) < max(rows), "some call must have recomputed a part of the batch only"


# -- 3. enable, disable -------------------------------------------------------------------------------
def snapshot(model: nn.Module) -> Any:
    own = {k: v for k, v in model.__dict__.items() if not k.startswith(("_parameters", "_buffers", "_modules"))}
    classes = [(n, type(m), set(m.__dict__)) for n, m in model.named_modules()]
    return list(own), model.forward, classes, list(model.state_dict())


def test_disable_restores_the_object(case: tiny.Case) -> None:
    before, plain = snapshot(case.transformer), case(SEEDS)
    before = snapshot(case.transformer)  # a run may create diffusers' own hook registry
    for _ in range(2):
        speca.enable(case.pipe)
        speca.enable(case.pipe, "fast")
        assert list(case.transformer.state_dict()) == before[3]
        case(SEEDS)
        speca.disable(case.pipe)
        assert snapshot(case.transformer) == before
    speca.disable(case.pipe)
    assert torch.equal(case(SEEDS), plain)


def test_other_instances_are_untouched() -> None:
    one, other = tiny.dit(), tiny.dit()
    speca.enable(one.pipe)
    assert type(other.transformer.transformer_blocks) is nn.ModuleList
    assert ATTRIBUTE not in other.transformer.__dict__


def test_enabled_closes_after_an_exception() -> None:
    case = tiny.dit()
    with pytest.raises(RuntimeError, match="stop"), speca.enabled(case.pipe):
        raise RuntimeError("stop")
    assert ATTRIBUTE not in case.transformer.__dict__
    with speca.enabled(case.pipe, "fast") as run:
        case(SEEDS)
    assert len(run.report().samples) == len(SEEDS)


def test_paused_is_plain_and_resumes_what_is_known() -> None:
    case = tiny.dit()
    plain = case(SEEDS)
    before = snapshot(case.transformer)
    with speca.enabled(case.pipe, **LOOSE) as run:
        fast = case(SEEDS)
        assert any("self-test" in n for n in run.report().notes)
        with run.paused():
            assert snapshot(case.transformer) == before
            assert torch.equal(case(SEEDS), plain)
        assert torch.equal(case(SEEDS), fast)
        assert not run.report().notes


# -- 6. no state survives -----------------------------------------------------------------------------
def held(case: tiny.Case) -> int:
    run = case.transformer.__dict__[ATTRIBUTE]
    return sum(b.bytes() for b in run.branches.values())


def test_nothing_is_held_after_the_call(case: tiny.Case) -> None:
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS)
    assert held(case) == 0
    gate = case.transformer.__dict__[ATTRIBUTE].drafts.gate
    assert gate.features is None and gate.forecast is None and not gate.bound


def test_memory_is_what_the_report_says(case: tiny.Case) -> None:
    speca.enable(case.pipe, **LOOSE)
    peaks: list[int] = []
    step = case.pipe.scheduler.step

    def watch(*args: Any, **kwargs: Any) -> Any:
        peaks.append(held(case))
        return step(*args, **kwargs)

    case.pipe.scheduler.step = watch
    case(SEEDS)
    assert max(peaks) == speca.report(case.pipe).bytes_per_sample * len(SEEDS) > 0
    assert peaks[-1] == 0, "nothing is forecast from the last step, so nothing is kept beyond it"


def test_runs_repeat_after_changes(case: tiny.Case) -> None:
    speca.enable(case.pipe, **LOOSE)
    expected = case(SEEDS)
    for other in (dict(seeds=SEEDS, steps=9), dict(seeds=SEEDS[:1]), dict(seeds=[1, 2, 3, 4])):
        case(**other)
        assert torch.equal(case(SEEDS), expected)


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_an_exception_mid_run_leaves_nothing_behind(case: tiny.Case, at: int) -> None:
    speca.enable(case.pipe, **LOOSE)
    expected, count = case(SEEDS), 0
    step = case.pipe.scheduler.step

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise RuntimeError("interrupted")
        return step(*args, **kwargs)

    case.pipe.scheduler.step = failing
    with pytest.raises(RuntimeError, match="interrupted"):
        case(SEEDS)
    del case.pipe.scheduler.step
    assert torch.equal(case(SEEDS), expected)


def test_an_exception_inside_the_model_drops_the_features() -> None:
    case = tiny.flux()
    speca.enable(case.pipe, **LOOSE)
    expected = case(SEEDS)
    count = 0

    def fail(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise RuntimeError("broken block")

    handle = case.transformer.single_transformer_blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken block"):
        case(SEEDS)
    handle.remove()
    assert held(case) == 0
    assert torch.equal(case(SEEDS), expected)


def test_two_pipelines_at_once_do_not_meet() -> None:
    cases = [tiny.dit(), tiny.flux()]
    expected = []
    for case in cases:
        speca.enable(case.pipe, **LOOSE)
        expected.append(case(SEEDS))
    assert torch.equal(cases[0](SEEDS), expected[0])
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = cases[i](SEEDS)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


# -- the released rule, own loops, few steps ----------------------------------------------------------
def test_released_rule_judges_the_batch_and_never_rejects() -> None:
    case = tiny.dit()
    speca.enable(case.pipe, "paper", rule="released", error="elementwise_l1", min_draft=2, max_draft=5)
    case(SEEDS)
    got = decisions(case)
    assert len(set(got)) == 1 and "R" not in got[0] and got[0].startswith("FAF")


def test_own_sampling_loop_gives_the_same_as_the_scheduler_says() -> None:
    model = tiny.flux_transformer()
    scheduler = tiny.diffusers.FlowMatchEulerDiscreteScheduler()

    def sample() -> torch.Tensor:
        scheduler.set_timesteps(12)
        x = tiny._draw([1, 2], 16, 16)
        for t in scheduler.timesteps:
            v = model(
                hidden_states=x, timestep=t.expand(2) / 1000, encoder_hidden_states=tiny._draw([3, 4], 6, 12),
                pooled_projections=tiny._draw([5, 6], 10), guidance=torch.full((2,), 3.5),
                img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(6, 3), return_dict=False,
            )[0]  # fmt: skip
            x = scheduler.step(v, t, x, return_dict=False)[0]
        return x

    plain = sample()
    speca.enable(model, tiny.VERIFYING, scheduler=scheduler, threshold=0.0, min_draft=0)
    assert torch.equal(sample(), plain)
    speca.enable(model, scheduler=scheduler, **LOOSE)
    told = sample()
    assert speca.report(model).samples[0].decisions == "FFFAAAFAAAFF"
    speca.enable(model, num_inference_steps=12, **LOOSE)
    for _ in range(2):  # the second run begins a new trajectory because time turns
        assert torch.equal(sample(), told)
    assert not torch.equal(told, plain)


def test_too_few_steps_run_plainly_and_say_so(case: tiny.Case) -> None:
    plain = case(SEEDS, steps=3)
    speca.enable(case.pipe)
    case(SEEDS)
    with pytest.warns(UserWarning, match="nothing to forecast"):
        assert torch.equal(case(SEEDS, steps=3), plain)
    report = speca.report(case.pipe)
    assert {s.decisions for s in report.samples} == {"FFF"} and report.flops_speedup == 1.0
    assert len(report.samples) == len(SEEDS) and "ran plainly" in report.notes[0]


def test_one_device_read_per_checked_draft(case: tiny.Case) -> None:
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS)
    report = speca.report(case.pipe)
    branches = len(case.transformer.__dict__[ATTRIBUTE].branches)
    assert report.host_reads == branches * decisions(case)[0].count("A")


@pytest.mark.parametrize("min_draft", [0, 1])
def test_the_report_says_which_drafts_were_checked(case: tiny.Case, min_draft: int) -> None:
    speca.enable(case.pipe, **{**LOOSE, "min_draft": min_draft})
    case(SEEDS)
    report = speca.report(case.pipe)
    for sample, told in zip(report.samples, report.to_dict()["samples"], strict=True):
        drafts = [i for i, letter in enumerate(sample.decisions) if letter == "A"]
        unchecked = [i for i in drafts if min_draft and sample.decisions[i - 1] == "F"]
        assert told["checked"] == list(sample.checked) == sorted(set(drafts) - set(unchecked))


# -- wrong input --------------------------------------------------------------------------------------
def test_wrong_input_is_one_clear_sentence() -> None:
    case = tiny.dit()
    with pytest.raises(speca.ConfigError, match="did you mean 'balanced'"):
        speca.enable(case.pipe, "balnced")
    with pytest.raises(speca.ConfigError, match="did you mean 'max_draft'"):
        speca.enable(case.pipe, max_drft=3)
    with pytest.raises(speca.ConfigError, match="warmup=5"):
        speca.enable(case.pipe, "paper", order=4)
    with pytest.raises(speca.ConfigError, match="forecaster is a setting of VerifiedConfig"):
        speca.enable(case.pipe, forecaster="newton")
    with pytest.raises(speca.ConfigError, match="'controller' is gone"):
        speca.enable(case.pipe, controller="schedule")
    with pytest.raises(speca.ConfigError, match="at least 4"):
        speca.enable(case.transformer, num_inference_steps=3)
    with pytest.raises(speca.ConfigError, match="scheduler="):
        speca.enable(case.transformer)
    with pytest.raises(speca.UnsupportedModelError, match="expected a diffusers pipeline"):
        speca.enable(object())
    with pytest.raises(speca.NotEnabledError, match=r"speca\.enable"):
        speca.report(case.pipe)
    assert ATTRIBUTE not in case.transformer.__dict__


def test_verified_drafts_need_lists_of_blocks() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(speca.UnsupportedModelError, match="has no list of blocks"):
        speca.enable(model, "paper", num_inference_steps=10)
    assert ATTRIBUTE not in model.__dict__


def test_a_pipeline_without_denoising_model_is_refused() -> None:
    pipe = tiny.diffusers.DDPMPipeline(None, tiny.diffusers.DDPMScheduler())
    with pytest.raises(speca.UnsupportedModelError, match="no denoising model"):
        speca.enable(pipe)
