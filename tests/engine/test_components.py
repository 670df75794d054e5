"""Text encoders and autoencoders of several requests are run as one where that changes nothing, and else alone."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.mixes import CLOSE, decisions, distance, mix
from speca.engine import Engine, Result
from speca.engine.components import Call, Components, adopt
from speca.engine.signature import Tokens
from speca.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers


def asked(count: int = 6) -> list[dict[str, Any]]:
    base = dict(num_inference_steps=6, output_type="np", guidance_scale=3.0)
    return [{**base, "class_labels": [n], "generator_seed": n} for n in range(count)]


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


@pytest.fixture
def pipe() -> Any:
    return mix("fashion-dit").pipe


def test_decoders_and_encoders_run_together() -> None:
    mixed = mix("emoji-flux")
    seen: list[int] = []
    handle = mixed.pipe.text_encoder.register_forward_hook(lambda module, given, out: seen.append(len(out[0])))
    try:
        found = mixed.demand_same(list(range(8)), max_batch=8)["lanes"]["component"]
    finally:
        handle.remove()
    assert 1.5 < found["rows_a_batch"] <= 4 and found["longest"] == 0
    assert max(seen) == 1, "a hook of the user's saw calls that were put together"
    assert "decode" not in mixed.pipe.vae.__dict__ and "forward" not in mixed.pipe.text_encoder.__dict__


def test_the_pipeline_keeps_its_components(pipe: Any) -> None:
    before = dict(pipe.components)
    config = dict(pipe.config)
    both(pipe, asked(2))
    assert all(pipe.components[name] is part for name, part in before.items()) and dict(pipe.config) == config


def test_they_may_be_left_alone(pipe: Any) -> None:
    alone, together, found = both(pipe, asked(), component_batch=1)
    demand_equal(alone, together)
    assert found["lanes"]["component"]["batches"] == 0
    with pytest.raises(ConfigError, match="component_batch=0"):
        Engine(pipe, component_batch=0)


def test_rows_that_touch_each_other_are_found_out(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, rows = pipe.vae.decode, []

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(z))
        return real(z - 0.5 * z.mean(0, keepdim=True), *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", decode)
    alone, together, _ = both(pipe, asked())
    demand_equal(alone, together)
    assert sum(n > 1 for n in rows) == 1, "it was tested once, and then left alone"


def test_what_draws_from_the_global_generators_is_run_in_place(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipe.vae.decode

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return real(z + torch.randn(z.shape[1:]), *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", decode)
    alone, together, found = both(pipe, asked())
    demand_equal(alone, together)
    assert found["lanes"]["component"]["calls"] <= 4, "after the first batch nothing was asked"


def test_what_is_cast_for_one_call_is_run_in_place() -> None:
    """As pipelines do whose autoencoder overflows in half precision: no other request may meet it half-way."""
    part, asked = torch.nn.Linear(2, 2), []
    pipe = SimpleNamespace(components={"vae": part, "transformer": torch.nn.Linear(2, 2)}, transformer=None)
    leave = pipe.components["transformer"]
    adopt(pipe, Components(Tokens()), lambda call: asked.append(call) or call.run(), [leave])
    assert pipe.transformer is None and isinstance(pipe.vae, torch.nn.Linear) and pipe.vae.weight is part.weight
    given = torch.ones(1, 2)
    plain = part(given)
    assert pipe.vae(given).equal(plain) and len(asked) == 1
    pipe.vae.to(torch.float64)
    assert pipe.vae(given.double()).dtype is torch.float64 and len(asked) == 1
    pipe.vae.to(torch.float32)
    assert pipe.vae(given).equal(plain) and len(asked) == 2
    assert "forward" not in part.__dict__


def test_a_decoder_that_fails_for_one_fails_for_nobody_else(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = pipe.vae.decode, []
    monkeypatch.setattr(pipe.vae, "decode", lambda z: seen.append(z) or real(z))
    with Engine(pipe, mode="one-at-a-time") as engine:
        list(engine.generate(asked()[2:3]))

    def decode(z: Tensor) -> Any:
        if any(torch.allclose(row, seen[0][0], atol=1e-4) for row in z):
            raise FloatingPointError("of this one")
        return real(z)

    monkeypatch.setattr(pipe.vae, "decode", decode)
    with Engine(pipe, max_batch=8) as engine:
        together = sorted(engine.generate(asked()), key=lambda r: r.index)
    assert [type(r.error) for r in together] == [type(None)] * 2 + [FloatingPointError] + [type(None)] * 3


def test_what_they_take_counts_towards_the_memory(pipe: Any) -> None:
    with Engine(pipe, max_batch=8, memory="64MiB") as engine:
        list(engine.generate(asked()))
        weighed = engine._loop.scheduler.component
    side = 28 * 28 * 4
    assert 16 * side < weighed < 10_000 * side  # of its last, widest maps it holds several


def test_nothing_of_a_call_is_kept() -> None:
    """What is known of a component must not hold its inputs, such as the cache of a language model."""

    class Cache:
        pass

    class Part(torch.nn.Module):
        def forward(self, a: Tensor, cache: Cache) -> Tensor:
            return a

    part, components = Part(), Components(Tokens(), weighing=True)
    caches = [Cache() for _ in range(3)]
    kept = [weakref.ref(cache) for cache in caches]
    for cache in caches:
        components.run([Call.of(part, "forward", (torch.ones(1, 2), cache), {})])
    del cache, caches
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_what_fails_after_it_has_drawn_leaves_the_generators() -> None:
    class Part(torch.nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            raise ArithmeticError(float(torch.rand(())))

    components, before = Components(Tokens()), torch.get_rng_state()
    with pytest.raises(ArithmeticError):
        components.run([Call.of(Part(), "forward", (torch.ones(1, 2),), {})])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_is_run_as_it_was_made() -> None:
    class Part(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor | None = None, *, flag: bool = False) -> tuple[Tensor, None]:
            return (a + (0 if b is None else b)) * (2 if flag else 1), None

    part, components = Part(), Components(Tokens())
    calls = [Call.of(part, "forward", (torch.full((n, 2), float(n)),), dict(flag=True)) for n in (1, 2, 1)]
    assert [call.rows for call in calls] == [1, 2, 1]
    for _ in range(2):  # tested, then put together
        outs = components.run(calls)
        assert [out[0].tolist() for out in outs] == [[[2.0, 2.0]], [[4.0, 4.0]] * 2, [[2.0, 2.0]]]
        assert all(out[1] is None for out in outs)
    other = Call.of(part, "forward", (torch.ones(1, 2),), dict(flag=False))
    assert components.bucket(other) != components.bucket(calls[0])
    assert components.bucket(Call.of(part, "forward", (1.0,), {})) is None
