"""Which evaluations of different requests are put together: tested on the model, the first time two of a kind meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import speca
import tiny
from engine.mixes import CLOSE, decisions, distance
from speca.denoiser.executor import Evaluation
from speca.denoiser.rows import Invocation
from speca.engine import Engine, Result
from speca.engine.packing import Packer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
ROWS_EACH = 2
"""Rows of one image of `DiTPipeline`: cond and uncond are one call."""


# ------------------------------------------------------------------------------------------------ whole engines
def asked(count: int, steps: Callable[[int], int] = lambda n: 10) -> list[dict[str, Any]]:
    return [
        dict(class_labels=[n % 10], num_inference_steps=steps(n), generator_seed=n, output_type="np", speedup=2.5)
        for n in range(count)
    ]


def both(pipe: Any, requests: list[dict[str, Any]], **how: Any) -> tuple[list[Result], list[Result], dict[str, Any]]:
    """Alone, together, and the statistics of the latter."""
    with Engine(pipe, mode="one-at-a-time") as engine:
        alone = sorted(engine.generate(requests), key=lambda r: r.index)
    with Engine(pipe, max_batch=8, **how) as engine:
        together = sorted(engine.generate(requests), key=lambda r: r.index)
        return alone, together, engine.statistics


def demand_equal(alone: list[Result], together: list[Result]) -> None:
    for one, other in zip(alone, together, strict=True):
        assert decisions(one) == decisions(other) and distance(other, one) < CLOSE


def normalising(model: Any, rows: list[int]) -> None:
    """As in a model that normalises over its batch."""
    block = model.transformer_blocks[1]
    real = block.forward

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        rows.append(len(hidden_states))
        out: Tensor = real(hidden_states, **kwargs)
        return out - 0.5 * out.mean(0, keepdim=True)

    block.forward = forward


def first_for_all(model: Any, rows: list[int]) -> None:
    """As in a model that takes the time of its first row for all of them."""
    real = model.forward

    def forward(hidden_states: Tensor, timestep: Tensor, **kwargs: Any) -> Any:
        rows.append(len(hidden_states))
        return real(hidden_states, timestep=timestep[:1].expand_as(timestep), **kwargs)

    model.forward = forward


def harmless(model: Any, rows: list[int]) -> None:
    """Nothing but told of the rows."""
    real = model.forward

    def forward(hidden_states: Tensor, timestep: Tensor, **kwargs: Any) -> Any:
        rows.append(len(hidden_states))
        return real(hidden_states, timestep=timestep, **kwargs)

    model.forward = forward


@pytest.mark.parametrize("change", [normalising, first_for_all])
def test_rows_that_influence_each_other_are_never_joined(change: Callable[[Any, list[int]], None]) -> None:
    case, rows = tiny.dit(), list[int]()
    change(case.transformer, rows)
    requests = asked(5, lambda n: 8 + 3 * (n % 2))
    with Engine(case.pipe, mode="one-at-a-time") as engine:
        alone = sorted(engine.generate(requests), key=lambda r: r.index)
    rows.clear()
    with Engine(case.pipe, max_batch=8) as engine:
        together = sorted(engine.generate(requests), key=lambda r: r.index)
        lanes = engine.statistics["lanes"]
    demand_equal(alone, together)
    assert sum(n > ROWS_EACH for n in rows) == 1, "they were joined once, for the test"
    assert lanes["full"]["rows_a_batch"] == ROWS_EACH


def test_nor_are_they_with_verified_drafts() -> None:
    """There the self-test of the model has found it out."""
    case, rows = tiny.dit(), list[int]()
    normalising(case.transformer, rows)
    requests = [{n: v for n, v in r.items() if n != "speedup"} for r in asked(5)]
    with Engine(case.pipe, tiny.VERIFYING, max_batch=8) as engine, pytest.warns(UserWarning, match="runs plainly"):
        together = list(engine.generate(requests))
    assert all(set(decisions(r)[0]) == {"F"} for r in together) and max(rows) == ROWS_EACH


def test_rows_that_do_not_are_joined_once_that_was_tested() -> None:
    case, rows = tiny.dit(), list[int]()
    harmless(case.transformer, rows)
    alone, together, found = both(case.pipe, asked(4))
    demand_equal(alone, together)
    full = decisions(together[0])[0].count("F")
    assert rows[4 * full :] == [ROWS_EACH, 2 * ROWS_EACH] + [4 * ROWS_EACH] * full, (
        "one alone, two to compare, then all"
    )
    assert found["lanes"]["full"]["batches"] == full
    assert found["lanes"]["draft"]["calls"] == 0 < found["accepted"], "a forecast output asks the engine for nothing"


def test_a_time_that_all_rows_share_is_tested_once_and_not_at_every_step() -> None:
    """As U-Nets are given it, in a tensor without dimensions; calls at different times are not joined."""
    unet = tiny.randomised(
        diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8),
            norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=4,
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    requests = [dict(num_inference_steps=10, generator_seed=n, output_type="np", speedup=2.0) for n in range(4)]
    seen: list[int] = []
    real = type(unet).forward

    def forward(self: Any, sample: Tensor, timestep: Tensor, **kwargs: Any) -> Any:
        assert timestep.dim() == 0
        seen.append(len(sample))
        return real(self, sample, timestep, **kwargs)

    unet.forward = forward.__get__(unet)
    alone, together, found = both(pipe, requests)
    demand_equal(alone, together)
    full = decisions(together[0])[0].count("F")
    assert seen[4 * full :] == [1, 2] + [4] * full, "one alone, two to compare, then all"
    assert found["lanes"]["full"]["batches"] == full
    uneven = [{**r, "num_inference_steps": 8 + n} for n, r in enumerate(requests)]
    alone, together, _ = both(pipe, uneven)
    demand_equal(alone, together)


def test_a_wrong_request_does_not_keep_the_others_apart() -> None:
    """Of class 5000, of which the model knows nothing: the first, or the one that meets the first."""
    case = tiny.dit()
    for wrong in (0, 1):
        requests = asked(6)
        requests[wrong]["class_labels"] = [5000]
        good = [n for n in range(6) if n != wrong]
        with Engine(case.pipe, mode="one-at-a-time") as engine:
            alone = {r.index: r for r in engine.generate(requests)}
        with Engine(case.pipe, max_batch=16) as engine:
            together = {r.index: r for r in engine.generate(requests)}
            found = engine.statistics["lanes"]["full"]
        assert isinstance(together[wrong].error, IndexError)
        demand_equal([alone[n] for n in good], [together[n] for n in good])
        assert found["rows_a_batch"] > 2 * ROWS_EACH, f"with a wrong request {wrong} the others ran alone"


def test_drafts_of_masked_prompts_are_joined_like_full_forwards() -> None:
    """Once rows that use their prompts to different lengths are known to be independent, so they are in drafts."""
    case = tiny.hunyuan_video()
    requests = []
    for n in range(6):
        given = case.conditions([n])
        mask = given["prompt_attention_mask"].clone()
        mask[:, 3 + n % 3 :] = 0
        requests.append(
            {**case.arguments, **given, "prompt_attention_mask": mask, "num_inference_steps": 9, "generator_seed": n}
        )
    settings = dict(preset=tiny.VERIFYING, threshold=1e9)
    with Engine(case.pipe, **settings, mode="one-at-a-time") as engine:
        alone = sorted(engine.generate(requests), key=lambda r: r.index)
    with Engine(case.pipe, **settings, max_batch=8) as engine:
        together = sorted(engine.generate(requests), key=lambda r: r.index)
        lanes = engine.statistics["lanes"]
    demand_equal(alone, together)
    assert lanes["draft"]["rows_a_batch"] > 2.5, "only drafts of prompts of one length were joined"


# ------------------------------------------------------------------------------------------------ the packer alone
def evaluation(function: Callable[..., Any], rows: int = 1, **arguments: Any) -> Evaluation:
    return Evaluation(Invocation(function, arguments), rows, step=0, total=8, model=1)


def plain(x: Tensor, t: Tensor) -> Tensor:
    if not bool((t < 1000).all()):
        raise IndexError("a time above 999")
    return x * 2 + t.view(-1, *[1] * (x.dim() - 1))


def drawn(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(seed))


def at(time: int, rows: int = 1) -> Tensor:
    return torch.full((rows,), time)


def test_calls_are_joined_from_the_second_on() -> None:
    packer = Packer()
    calls = [evaluation(plain, x=drawn(n), t=at(7)) for n in range(3)]
    buckets = [packer.bucket(call) for call in calls]
    assert buckets[0] is not None and buckets == buckets[:1] * 3, "the first waits in the bucket that others may join"
    for one, call in zip(packer.run(calls), calls, strict=True):
        assert torch.equal(one, call.run())
    assert not packer._first, "nothing of a call is kept once its kind was tested"
    other = evaluation(lambda x, t: x, x=drawn(0), t=at(7))
    assert packer.bucket(other) == buckets[1], "the function of a call is that of its model"


def test_equal_calls_tell_nothing() -> None:
    """Whatever a model does with its rows, it gives the same for equal ones."""
    packer, mixing = Packer(), lambda x, t: x + x.mean(0, keepdim=True)
    same = [evaluation(mixing, x=drawn(1), t=at(7)) for _ in range(3)]
    assert [packer.bucket(call) for call in same][1:] == [None] * 2
    assert not packer._joined
    assert packer.bucket(evaluation(mixing, x=drawn(2), t=at(7))) is None
    assert list(packer._joined.values()) == [False]


@pytest.mark.parametrize("number", [dict(t=at(7)), dict(t=torch.tensor([0.5])), dict(t=at(0))])
def test_a_number_that_is_equal_in_both_calls_is_changed_for_the_test(number: dict[str, Tensor]) -> None:
    packer = Packer()

    def greedy(x: Tensor, t: Tensor) -> Tensor:
        return x + t[:1].view(-1, 1, 1)

    kept = number["t"].clone()
    assert [packer.bucket(evaluation(greedy, x=drawn(n), **number)) for n in range(3)][1:] == [None] * 2
    assert list(packer._joined.values()) == [False] and torch.equal(number["t"], kept)


@pytest.mark.parametrize("first", [True, False])
def test_a_call_that_fails_or_is_not_finite_decides_nothing(first: bool) -> None:
    wrong = [evaluation(plain, x=drawn(1), t=at(5000)), evaluation(plain, x=drawn(2) * float("nan"), t=at(7))]
    for bad in wrong:
        packer = Packer()
        good = [evaluation(plain, x=drawn(n), t=at(7)) for n in range(10, 13)]
        order = [bad, *good] if first else [good[0], bad, *good[1:]]
        buckets = [packer.bucket(call) for call in order]
        assert buckets[-1] is not None and set(packer._joined.values()) == {True}


def test_a_model_that_takes_no_two_rows_runs_each_alone() -> None:
    def single(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 1:
            raise RuntimeError("one row at a time")
        return x

    packer = Packer()
    calls = [evaluation(single, x=drawn(n), t=at(7)) for n in range(3)]
    assert [packer.bucket(call) for call in calls][1:] == [None] * 2
    assert list(packer._joined.values()) == [False]


def test_an_output_without_all_rows_is_not_joined() -> None:
    packer = Packer()
    calls = [evaluation(lambda x, t: x.sum(), x=drawn(n), t=at(7)) for n in range(3)]
    assert [packer.bucket(call) for call in calls][1:] == [None] * 2
    assert list(packer._joined.values()) == [False]


def test_shapes_options_and_shared_inputs_keep_calls_apart() -> None:
    def with_ids(x: Tensor, t: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale + ids.sum() + t.view(-1, 1, 1)

    packer, ids = Packer(), torch.arange(5.0)
    base = dict(t=at(7), ids=ids)
    for n in range(2):
        packer.bucket(evaluation(with_ids, x=drawn(n), **base))
    known = packer.bucket(evaluation(with_ids, x=drawn(3), **base))
    assert known is not None
    assert packer.bucket(evaluation(with_ids, x=drawn(3), t=at(7), ids=ids.clone())) == known
    other_ids = packer.bucket(evaluation(with_ids, x=drawn(3), t=at(7), ids=ids + 1))
    assert other_ids not in (None, known), "the same kind, but what the rows share is another"
    for other in (dict(x=drawn(3), scale=2.0), dict(x=drawn(3)[:, :2])):
        assert packer.bucket(evaluation(with_ids, **base, **other)) not in (None, known, other_ids)
    assert len(packer._first) == 2, "these are of another kind, not tested yet"


def test_at_most_one_call_of_a_kind_is_kept_for_the_test() -> None:
    packer = Packer()

    def shared(x: Tensor, t: Tensor) -> Tensor:
        return x + t

    for step in range(20):  # a time without dimensions, at which no other request is
        bucket = packer.bucket(evaluation(shared, x=drawn(step), t=torch.tensor(step)))
        assert (bucket is None) == (step > 0)
    assert len(packer._first) == 1


def test_requests_of_several_rows_are_joined_with_single_ones() -> None:
    packer = Packer()
    calls = [evaluation(plain, rows, x=drawn(rows, rows), t=at(rows, rows)) for rows in (1, 3, 2)]
    buckets = [packer.bucket(call) for call in calls]
    assert buckets[1] is not None and buckets[1] == buckets[2]
    for one, call in zip(packer.run(calls), calls, strict=True):
        assert torch.equal(one, call.run())


def test_enabled_settings_are_of_no_concern_to_the_packer() -> None:
    """Requests of any planning settings are joined: the full evaluation is the same."""
    case = tiny.dit()
    presets: list[dict[str, Any]] = [dict(), dict(preset="fast"), dict(speedup=3.0), dict(settings=dict(order=2))]
    requests = [{**r, "speedup": None, **presets[n % 4]} for n, r in enumerate(asked(8))]
    alone, together, found = both(case.pipe, requests)
    demand_equal(alone, together)
    assert found["lanes"]["full"]["rows_a_batch"] > 1.5 * ROWS_EACH
    assert speca.SpecaConfig.build("fast") != speca.SpecaConfig.build("balanced")
