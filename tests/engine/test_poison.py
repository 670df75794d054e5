"""A first request that is not finite, fails or runs out of memory teaches nothing; a batch that fails is halved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from engine.mixes import decisions
from engine.test_failures import good
from engine.test_packing import at, drawn, evaluation, plain
from speca.denoiser.partial import PartialCalls
from speca.denoiser.rows import Invocation
from speca.engine import Engine
from speca.engine.components import Call, Components
from speca.engine.packing import Packer
from speca.engine.signature import Tokens
from speca.errors import NonFiniteError
from speca.verified import probe

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, and of requests that run plainly
NAN = float("nan")


def full_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("of this test")


# ------------------------------------------------------------------------------------------------ whole engines
@pytest.mark.parametrize(
    "how", [dict(preset=tiny.VERIFYING, threshold=1e9), dict(speedup=2.5)], ids=["verified", "forecast"]
)
def test_requests_after_one_with_nan_are_drafted_and_batched_as_ever(how: Any) -> None:
    case = tiny.flux()
    bad = {**good(case, 0), "num_inference_steps": 10}
    bad["prompt_embeds"] = bad["prompt_embeds"] * NAN
    with Engine(case.pipe, **how, max_batch=8) as engine:
        with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
            engine.post(**bad).result(timeout=30)
        two = [engine.post(**bad), engine.post(**{**good(case, 1), "num_inference_steps": 10})]
        assert two[1].result(timeout=30).error is None
        before = engine.statistics["lanes"]["full"]
        results = list(engine.generate({**good(case, n), "num_inference_steps": 10} for n in range(8)))
        after = engine.statistics["lanes"]["full"]
    assert all("A" in decisions(result)[0] for result in results)
    assert (after["rows"] - before["rows"]) / (after["batches"] - before["batches"]) > 3


def test_memory_that_did_not_suffice_in_the_self_test_is_not_taken_for_a_model_without_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = tiny.flux()
    with Engine(case.pipe, tiny.VERIFYING, threshold=1e9, max_batch=8) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(probe, "_counted", full_memory)
            first = engine.post(**good(case, 0)).result(timeout=30)
            assert set(decisions(first)[0]) == {"F"}
        later = engine.post(**good(case, 0)).result(timeout=30)
    assert "A" in decisions(later)[0]


def test_a_batch_too_large_for_memory_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    case, rows = tiny.flux(), list[int]()
    real = case.transformer.forward

    def forward(hidden_states: Tensor, **given: Any) -> Any:
        rows.append(len(hidden_states))
        if len(hidden_states) > 3:
            full_memory()
        return real(hidden_states, **given)

    monkeypatch.setattr(case.transformer, "forward", forward)
    with Engine(case.pipe, max_batch=8) as engine:
        list(engine.generate(good(case, n) for n in range(2)))
        rows.clear()
        results = list(engine.generate(good(case, n) for n in range(8)))
    assert all(result.error is None for result in results)
    assert rows[:7] == [8, 4, 2, 2, 4, 2, 2] and 1 not in rows


def test_one_that_is_too_large_by_itself_gets_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case, rows = tiny.dit(), list[int]()
    real = case.transformer.forward

    def forward(hidden_states: Tensor, **given: Any) -> Any:
        rows.append(len(hidden_states))
        if 7 in given["class_labels"].tolist():
            full_memory()
        return real(hidden_states, **given)

    monkeypatch.setattr(case.transformer, "forward", forward)
    asked = [dict(class_labels=[n], num_inference_steps=4, generator_seed=n) for n in (0, 1, 7, 2)]
    with Engine(case.pipe, max_batch=8) as engine:
        list(engine.generate(asked[:2]))
        rows.clear()
        results = sorted(engine.generate(asked), key=lambda r: r.index)
    assert [type(r.error).__name__ for r in results] == ["NoneType", "NoneType", "OutOfMemoryError", "NoneType"]
    assert rows[:5] == [8, 4, 4, 2, 2]


# ------------------------------------------------------------------------------------------------ what is remembered
def mixing(x: Tensor, t: Tensor) -> Tensor:
    return x + x.mean(0, keepdim=True)


@pytest.mark.parametrize("model", [plain, mixing])
def test_the_packer_concludes_from_finite_calls_alone(model: Callable[..., Any]) -> None:
    """Whichever of two is not finite, also where it spoils the other in a model that mixes its rows."""
    for order in ([NAN, 1.0, 1.0, 1.0], [1.0, NAN, 1.0, 1.0], [1.0, NAN, NAN, 1.0]):
        packer = Packer()
        calls = [evaluation(model, x=drawn(n) * factor, t=at(7)) for n, factor in enumerate(order)]
        for call, factor in zip(calls[:-1], order, strict=False):
            packer.bucket(call)
            assert NAN not in order or not packer._joined or factor == 1.0
        packer.bucket(calls[-1])
        packer.bucket(evaluation(model, x=drawn(9), t=at(7)))
        assert list(packer._joined.values()) == [model is plain], order


def test_the_packer_concludes_nothing_from_memory_that_does_not_suffice() -> None:
    packer, room = Packer(), [1]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * 2 if len(x) <= room[0] else full_memory()

    calls = [evaluation(model, x=drawn(n), t=at(7)) for n in range(4)]
    assert [packer.bucket(call) for call in calls[:3]][1:] == [None, None] and not packer._joined
    room[0] = 8
    assert packer.bucket(calls[3]) is not None and list(packer._joined.values()) == [True]


class Part(torch.nn.Module):
    most = 8

    def forward(self, a: Tensor) -> Tensor:
        return a * 2 if len(a) <= self.most else full_memory()


@pytest.mark.parametrize("how", ["nan", "memory"])
def test_components_conclude_from_finite_calls_for_which_there_is_memory(how: str) -> None:
    part, components = Part(), Components(Tokens())

    def calls(*values: float) -> list[Call]:
        return [Call.of(part, "forward", (torch.full((1, 2), value),), {}) for value in values]

    part.most = 1 if how == "memory" else 8
    outs = components.run(calls(1.0, NAN if how == "nan" else 2.0))
    assert outs[0].tolist() == [[2.0, 2.0]] and not components._together
    part.most = 8
    components.run(calls(1.0, 2.0))
    assert list(components._together.values()) == [True]


@pytest.mark.parametrize("how", ["nan", "memory"])
def test_rows_are_said_to_depend_on_each_other_by_finite_calls_alone(how: str) -> None:
    partial, x = PartialCalls(), torch.randn(3, 4)

    def run(call: Invocation) -> Any:
        return full_memory() if how == "memory" and len(call.arguments["x"]) == 1 and fails[0] else call()

    def call(x: Tensor) -> Invocation:
        return Invocation(lambda x: x * 2, {"x": x})

    fails = [True]
    assert not partial.work(call(x * NAN if how == "nan" else x), 3, run)
    fails[0] = False
    assert partial.work(call(x), 3, run)
