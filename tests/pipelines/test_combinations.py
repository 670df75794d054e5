"""What people put on a model beside speca: hooks and caches of diffusers, copies, LoRA, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_first_block_cache
from torch import nn

import speca
import tiny
from speca.diffusers.accelerator import ATTRIBUTE
from speca.verified.gate import GatedModuleList, Mode

SEEDS = [3, 8]
EXACT = dict(preset=tiny.VERIFYING, threshold=0.0, min_draft=0)
LOOSE = dict(preset=tiny.VERIFYING, threshold=1e9, min_draft=0, max_draft=3)


@dataclass
class Road:
    """Settings of one way to draft: those that compute every step in full, and those that draft.

    Attributes:
        letters: of a run with the settings `exact`.
    """

    exact: dict[str, Any]
    loose: dict[str, Any]
    letters: set[str]


ROADS = {
    "verified": Road(EXACT, LOOSE, {"F", "R"}),
    "forecast": Road(dict(threshold=0.0), dict(speedup=3.0), {"F"}),
}
roads = pytest.mark.parametrize("road", ROADS.values(), ids=list(ROADS))


def decisions(case: tiny.Case) -> str:
    return speca.report(case.pipe).samples[0].decisions


# -- another hook -------------------------------------------------------------------------------------
class Doubling(ModelHook):
    """Changes outputs in `post_forward`, as most hooks do."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return (output[0] * 2, *output[1:])


class Negating(ModelHook):
    """Replaces the forward, as ours does."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = self.fn_ref.original_forward(*args, **kwargs)
        return (-out[0], *out[1:])


def put_on(case: tiny.Case, hook: type[ModelHook]) -> None:
    HookRegistry.check_if_exists_or_initialize(case.transformer).register_hook(hook(), "other")


def take_off(case: tiny.Case) -> None:
    HookRegistry.check_if_exists_or_initialize(case.transformer).remove_hook("other")


@roads
@pytest.mark.parametrize("hook", [Doubling, Negating])
@pytest.mark.parametrize("speca_first", [False, True])
def test_another_hook_works_before_during_and_after(road: Road, hook: type[ModelHook], speca_first: bool) -> None:
    case = tiny.flux()
    plain = case(SEEDS)
    put_on(case, hook)
    hooked = case(SEEDS)
    assert not torch.equal(hooked, plain)
    take_off(case)
    steps = [lambda: speca.enable(case.pipe, **road.exact), lambda: put_on(case, hook)]
    for step in steps if speca_first else reversed(steps):
        step()
    assert torch.equal(case(SEEDS), hooked)
    assert set(decisions(case)) == road.letters
    speca.disable(case.pipe)
    assert torch.equal(case(SEEDS), hooked), "disable leaves the other hook"
    take_off(case)
    assert torch.equal(case(SEEDS), plain)


@roads
@pytest.mark.parametrize("hook", [Doubling, Negating])
@pytest.mark.parametrize("speca_first", [False, True])
def test_another_hook_that_goes_leaves_speca_working(road: Road, hook: type[ModelHook], speca_first: bool) -> None:
    case = tiny.flux()
    plain = case(SEEDS)
    speca.enable(case.pipe, **road.loose)
    fast = case(SEEDS)
    if not speca_first:
        speca.disable(case.pipe)
    put_on(case, hook)
    if not speca_first:
        speca.enable(case.pipe, **road.loose)
    take_off(case)
    assert torch.equal(case(SEEDS), fast)
    assert "A" in decisions(case)
    speca.disable(case.pipe)
    assert torch.equal(case(SEEDS), plain)


# -- diffusers' own caches ----------------------------------------------------------------------------
def broadcast(case: tiny.Case) -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: case.pipe.current_timestep,
    )  # fmt: skip


CACHES: dict[str, Callable[[tiny.Case], Any]] = {
    "first block": lambda case: diffusers.FirstBlockCacheConfig(threshold=10.0),
    "taylorseer": lambda case: diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3),
    "broadcast": broadcast,
}


@roads
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_of_diffusers_is_refused_with_the_remedy(road: Road, cache: str) -> None:
    case = tiny.flux()
    plain = case(SEEDS)
    case.transformer.enable_cache(CACHES[cache](case))
    cached = case(SEEDS)
    with pytest.raises(speca.ConfigError, match=r"transformer\.disable_cache\(\)"):
        speca.enable(case.pipe)
    assert ATTRIBUTE not in case.transformer.__dict__
    assert torch.equal(case(SEEDS), cached), "what was refused has changed nothing"
    case.transformer.disable_cache()
    speca.enable(case.pipe, **road.exact)
    assert torch.equal(case(SEEDS), plain)


@roads
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_enabled_after_speca_runs_alone_and_says_so(road: Road, cache: str) -> None:
    case = tiny.flux()
    case.transformer.enable_cache(CACHES[cache](case))
    cached = case(SEEDS)
    case.transformer.disable_cache()
    speca.enable(case.pipe, **road.loose)
    fast = case(SEEDS)
    assert not torch.equal(fast, cached)
    case.transformer.enable_cache(CACHES[cache](case))
    with pytest.warns(UserWarning, match=r"transformer\.disable_cache\(\)") as told:
        outputs = [case(SEEDS) for _ in range(2)]
    assert len(told) == 1
    assert all(torch.equal(out, cached) for out in outputs)
    assert any("runs plainly" in note for note in speca.report(case.pipe).notes)
    case.transformer.disable_cache()
    assert torch.equal(case(SEEDS), fast)
    assert "A" in decisions(case)


@roads
def test_a_cache_applied_as_a_function_is_noticed_too(road: Road) -> None:
    case = tiny.flux()
    speca.enable(case.pipe, **road.loose)
    fast = case(SEEDS)
    apply_first_block_cache(case.transformer, diffusers.FirstBlockCacheConfig(threshold=10.0))
    HookRegistry.check_if_exists_or_initialize(case.transformer).invalidate_child_registries_cache()
    with pytest.warns(UserWarning, match="remove_hook"):
        case(SEEDS)
    assert speca.report(case.pipe).samples == ()
    with pytest.raises(speca.ConfigError, match="fbc_leader_block_hook"):
        speca.enable(case.pipe)
    for name in ("fbc_leader_block_hook", "fbc_block_hook"):
        HookRegistry.check_if_exists_or_initialize(case.transformer).remove_hook(name)
    assert torch.equal(case(SEEDS), fast)


# -- copies and files ---------------------------------------------------------------------------------
def halved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@roads
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_is_plain_and_has_weights_of_its_own(
    road: Road, duplicate: Callable[[Any], Any], ran_before: bool
) -> None:
    case, other = tiny.flux(), tiny.flux()
    plain = other(SEEDS)
    halved(other.transformer)
    expected = other(SEEDS)
    if ran_before:  # diffusers then has a registry of hooks on the model already
        case(SEEDS)
    speca.enable(case.pipe, **road.loose)
    fast = case(SEEDS)
    twin = duplicate(case.transformer)
    assert ATTRIBUTE in case.transformer.__dict__
    assert ATTRIBUTE not in twin.__dict__
    assert not any(isinstance(m, GatedModuleList) for m in twin.modules())
    other.pipe.transformer = twin
    assert torch.equal(other(SEEDS), plain), "a copy is not accelerated"
    halved(twin)
    assert torch.equal(other(SEEDS), expected), "a copy computes with its own weights"
    assert torch.equal(case(SEEDS), fast), "the original goes on"
    speca.enable(other.pipe, **road.exact)
    assert torch.equal(other(SEEDS), expected)


@roads
def test_a_deepcopy_of_a_pipeline(road: Road) -> None:
    case = tiny.dit()
    plain = case(SEEDS)
    speca.enable(case.pipe, **road.loose)
    fast = case(SEEDS)
    twin = tiny.Case(copy.deepcopy(case.pipe), case.arguments, case.conditions)
    assert torch.equal(twin(SEEDS), plain)
    assert torch.equal(case(SEEDS), fast)


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_shallow_copy_is_plain_and_shares_the_weights(ran_before: bool) -> None:
    case = tiny.flux()
    if ran_before:
        case(SEEDS)
    plain = tiny.flux()(SEEDS)
    speca.enable(case.pipe, **LOOSE)
    fast = case(SEEDS)
    twin = tiny.Case(copy.copy(case.pipe), case.arguments, case.conditions)
    twin.pipe.transformer = copy.copy(case.transformer)
    assert ATTRIBUTE in case.transformer.__dict__ and ATTRIBUTE not in twin.transformer.__dict__
    assert not any(isinstance(m, GatedModuleList) for m in twin.transformer.modules())
    assert not any(m.training for m in twin.transformer.modules())
    shared = zip(twin.transformer.parameters(), case.transformer.parameters(), strict=True)
    assert all(a is b for a, b in shared)
    assert torch.equal(twin(SEEDS), plain), "a copy is not accelerated"
    accelerator: Any = case.transformer.__dict__[ATTRIBUTE]
    accelerator.drafts.gate.mode = Mode.PASS  # as while another thread drafts with the original
    assert torch.equal(twin(SEEDS), plain)
    accelerator.drafts.gate.forget()
    assert torch.equal(case(SEEDS), fast), "the original goes on"
    speca.enable(twin.pipe, **EXACT)
    assert torch.equal(twin(SEEDS), plain)
    assert torch.equal(case(SEEDS), fast), "each has a gate of its own"
    speca.disable(case.pipe)
    assert torch.equal(twin(SEEDS), plain) and set(decisions(twin)) == {"F", "R"}
    assert torch.equal(case(SEEDS), plain)


def test_a_model_that_shares_its_blocks_with_an_accelerated_one_is_refused_with_the_remedy() -> None:
    case = tiny.flux()
    twin = copy.copy(case.transformer)  # of a model that is not accelerated: the very same lists
    speca.enable(case.pipe, **LOOSE)
    fast = case(SEEDS)
    with pytest.raises(speca.ConfigError, match=r"transformer_blocks.*speca\.disable.*copy\.deepcopy"):
        speca.enable(twin, tiny.VERIFYING, num_inference_steps=10)
    assert ATTRIBUTE not in twin.__dict__
    assert torch.equal(case(SEEDS), fast), "what was refused has changed nothing"
    speca.disable(case.pipe)
    speca.enable(twin, tiny.VERIFYING, num_inference_steps=10)


@pytest.mark.parametrize("ran_before", [False, True])
def test_models_that_share_their_blocks_are_forecast_beside_each_other(ran_before: bool) -> None:
    """Outputs are forecast without anything of a model's inside, so each may be accelerated as it likes."""
    case = tiny.flux()
    if ran_before:  # diffusers then has a registry of hooks on the model, which a copy.copy has as well
        case(SEEDS)
    twin = tiny.Case(copy.copy(case.pipe), case.arguments, case.conditions)
    twin.pipe.transformer = copy.copy(case.transformer)
    before = [dict(m.__dict__) for m in (case.transformer, twin.transformer)]
    speca.enable(twin.pipe, speedup=3.0)
    forecast = twin(SEEDS)
    letters = decisions(twin)
    assert letters.count("F") == 4
    with pytest.raises(speca.NotEnabledError):
        speca.report(case.pipe)
    speca.enable(case.pipe, **LOOSE)
    fast = case(SEEDS)
    assert torch.equal(twin(SEEDS), forecast) and decisions(twin) == letters
    assert torch.equal(case(SEEDS), fast)
    speca.disable(case.pipe)
    assert torch.equal(twin(SEEDS), forecast)
    speca.disable(twin.pipe)
    for model, attributes in zip((case.transformer, twin.transformer), before, strict=True):
        assert {n: v for n, v in model.__dict__.items() if n != "_diffusers_hook"} == {
            n: v for n, v in attributes.items() if n != "_diffusers_hook"
        }
        assert not ran_before or model.__dict__["_diffusers_hook"] is attributes["_diffusers_hook"]
    assert torch.equal(twin(SEEDS), case(SEEDS))


def test_a_shallow_copy_of_a_model_with_other_hooks_is_refused_with_the_remedy() -> None:
    """The hooks of diffusers on it act on the original."""
    case = tiny.flux()
    put_on(case, Doubling)
    twin = copy.copy(case.transformer)
    with pytest.raises(speca.ConfigError, match=r"copy\.copy of a model with hooks of diffusers \(other\)"):
        speca.enable(twin, num_inference_steps=10)
    assert ATTRIBUTE not in twin.__dict__
    speca.enable(case.pipe)


@pytest.mark.parametrize("ran_before", [False, True])
def test_two_models_of_one_pipeline_that_share_their_blocks_are_left_as_they_were(ran_before: bool) -> None:
    case, plain = tiny.flux(), tiny.flux()(SEEDS)
    if ran_before:
        case(SEEDS)
    twin = copy.copy(case.transformer)
    parts = mock.patch.object(type(case.pipe), "components", dict(transformer=case.transformer, transformer_2=twin))
    with parts, pytest.raises(speca.ConfigError, match="shares"):
        speca.enable(case.pipe, tiny.VERIFYING)
    assert not any(ATTRIBUTE in m.__dict__ or "forward" in m.__dict__ for m in (case.transformer, twin))
    assert not any(isinstance(m, GatedModuleList) for m in case.transformer.modules())
    assert torch.equal(case(SEEDS), plain)
    with parts:
        speca.enable(case.pipe)  # outputs are forecast, and nothing of the blocks is needed
        assert all(ATTRIBUTE in m.__dict__ for m in (case.transformer, twin))
        speca.disable(case.pipe)
    assert torch.equal(case(SEEDS), plain)


# -- blocks that change -------------------------------------------------------------------------------
def replace(model: Any) -> None:
    model.single_transformer_blocks[2] = copy.deepcopy(model.single_transformer_blocks[0])


def replace_list(model: Any) -> None:
    model.transformer_blocks = nn.ModuleList([copy.deepcopy(b) for b in reversed(list(model.transformer_blocks))])


def append(model: Any) -> None:
    model.single_transformer_blocks.append(copy.deepcopy(model.single_transformer_blocks[0]))


def remove(model: Any) -> None:
    del model.single_transformer_blocks[1]


CHANGES = {"block": replace, "list": replace_list, "append": append, "remove": remove}


@pytest.mark.parametrize("paused", [False, True], ids=["enabled", "paused"])
@pytest.mark.parametrize("change", CHANGES)
def test_blocks_changed_between_runs(change: str, paused: bool) -> None:
    bare, case = tiny.flux(), tiny.flux()
    before = bare(SEEDS)
    CHANGES[change](bare.transformer)
    plain = bare(SEEDS)
    assert not torch.equal(plain, before)
    speca.enable(bare.pipe, **LOOSE)
    fast = bare(SEEDS)
    for settings, expected in ((EXACT, plain), (LOOSE, fast)):
        case = tiny.flux()
        old = [m for m in case.transformer.children() if isinstance(m, nn.ModuleList)]
        with speca.enabled(case.pipe, **settings) as session:
            case(SEEDS)
            with session.paused() if paused else nullcontext():
                CHANGES[change](case.transformer)
            assert torch.equal(case(SEEDS), expected)
            assert any("replaced" in note for note in session.report().notes)
            assert torch.equal(case(SEEDS), expected)
            assert not any("replaced" in note for note in session.report().notes)
        assert torch.equal(case(SEEDS), plain)
        assert all(type(m) is nn.ModuleList and not vars(m).keys() - vars(nn.ModuleList()).keys() for m in old)


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_changed_in_mid_run(change: str) -> None:
    def altering(case: tiny.Case) -> torch.Tensor:
        def at_step(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
            if step == 6:
                CHANGES[change](pipe.transformer)
            return {}

        return case(SEEDS, callback_on_step_end=at_step)

    plain = altering(tiny.flux())
    exact, loose = tiny.flux(), tiny.flux()
    speca.enable(exact.pipe, **EXACT)
    assert torch.equal(altering(exact), plain)
    speca.enable(loose.pipe, **LOOSE)
    altering(loose)
    assert decisions(loose) == "FFFAAAF" + "FFF" + "AAA" + "F", "what was kept of other blocks is not forecast from"


def test_a_list_of_another_accelerated_model_runs_plainly_and_says_so() -> None:
    case, other, mixed = tiny.flux(), tiny.flux(), tiny.flux()
    theirs = tiny.randomised(other.transformer, seed=1).transformer_blocks
    mixed.transformer.transformer_blocks = theirs
    plain = mixed(SEEDS)
    speca.enable(case.pipe, **LOOSE)
    speca.enable(other.pipe, **LOOSE)
    alone = case(SEEDS)
    expected = other(SEEDS)
    own, case.transformer.transformer_blocks = case.transformer.transformer_blocks, theirs
    with pytest.warns(UserWarning, match="shares transformer_blocks"):
        assert torch.equal(case(SEEDS), plain)
    assert any("speca.disable" in note for note in speca.report(case.pipe).notes)
    assert set(decisions(case)) == {"F"}
    assert torch.equal(other(SEEDS), expected)
    case.transformer.transformer_blocks = own
    assert torch.equal(case(SEEDS), alone)
    assert "A" in decisions(case)


@roads
# -- copies of what has other hooks -------------------------------------------------------------------
def test_a_copy_beside_another_hook_is_refused_with_the_remedy(road: Road) -> None:
    case = tiny.flux()
    put_on(case, Doubling)
    speca.enable(case.pipe, **road.exact)
    with pytest.raises(speca.ConfigError, match=r"remove_hook\('other'\)"):
        copy.deepcopy(case.transformer)


@roads
def test_saved_while_enabled(road: Road, tmp_path: Path) -> None:
    case = tiny.flux()
    plain = case(SEEDS)
    speca.enable(case.pipe, **road.loose)
    fast = case(SEEDS)
    case.transformer.save_pretrained(tmp_path)
    loaded = type(case.transformer).from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(case.transformer.state_dict())
    case.pipe.transformer = loaded.eval()
    assert torch.equal(case(SEEDS), plain)
    speca.enable(case.pipe, **road.loose)
    assert torch.equal(case(SEEDS), fast)


def test_a_part_of_a_block_list_is_a_plain_list() -> None:
    model = tiny.dit_transformer()
    speca.enable(model, num_inference_steps=10)
    part = model.transformer_blocks[1:]
    assert type(part) is nn.ModuleList
    assert list(part) == list(model.transformer_blocks)[1:]


# -- LoRA ---------------------------------------------------------------------------------------------
def add_lora(case: tiny.Case) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    targets = ["to_q", "to_k", "proj_mlp", "proj_out"]
    case.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False))


@roads
@pytest.mark.parametrize("extra", [{}, dict(joint_attention_kwargs={"scale": 0.3})], ids=["whole", "scaled"])
@pytest.mark.parametrize("speca_first", [False, True])
def test_lora_before_and_after(road: Road, speca_first: bool, extra: dict[str, Any]) -> None:
    bare, case = tiny.flux(), tiny.flux()
    without = bare(SEEDS)
    add_lora(bare)
    plain = bare(SEEDS, **extra)
    assert not torch.equal(plain, without)
    assert extra == {} or not torch.equal(plain, bare(SEEDS))
    if speca_first:
        speca.enable(case.pipe, **road.exact)
        assert torch.equal(case(SEEDS), without)
        add_lora(case)
    else:
        add_lora(case)
        speca.enable(case.pipe, **road.exact)
    assert torch.equal(case(SEEDS, **extra), plain)
    assert set(decisions(case)) == road.letters


@roads
def test_lora_fused_and_taken_off_while_enabled(road: Road) -> None:
    bare, case = tiny.flux(), tiny.flux()
    speca.enable(case.pipe, **road.exact)
    outputs = []
    for one in (bare, case):
        add_lora(one)
        unfused = one(SEEDS)
        one.transformer.fuse_lora(lora_scale=0.7)
        fused = one(SEEDS)
        one.transformer.unfuse_lora()
        one.transformer.unload_lora()
        outputs.append((unfused, fused, one(SEEDS)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert not torch.equal(outputs[0][0], outputs[0][1])
    speca.enable(case.pipe, **road.loose)
    case(SEEDS)
    assert "A" in decisions(case)
