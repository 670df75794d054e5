"""Rows of a call: which inputs belong to them, selection, and calls put together."""

from __future__ import annotations

import pytest
import torch

from speca.denoiser import rows as rowwise
from speca.errors import UnsupportedModelError


def test_known_exceptions_are_selected_along_their_own_dimension() -> None:
    arguments = dict(
        x=torch.randn(3, 2), encoder_hidden_states_llama3=torch.randn(4, 3, 5), visual_rope_pos=[torch.arange(2)] * 3,
        pair=(torch.randn(3, 4), torch.randn(6)), triple=(torch.ones(2), torch.ones(2), torch.ones(2)),
    )  # fmt: skip
    part = rowwise.select(arguments, [2], 3)
    assert torch.equal(part["encoder_hidden_states_llama3"], arguments["encoder_hidden_states_llama3"][:, [2]])
    assert len(part["visual_rope_pos"]) == 3 and part["visual_rope_pos"] is not arguments["visual_rope_pos"]
    assert part["pair"][0].shape == (1, 4) and part["pair"][1].shape == (6,)
    assert len(part["triple"]) == 3, "a tuple of tensors is a group, not one item per row"


def test_owners_tell_coincidences_apart() -> None:
    arguments = dict(x=torch.randn(2, 2), sizes=[(1, 2)] * 2, places=[torch.ones(5), torch.ones(6), torch.ones(7)])
    two = rowwise.owners(arguments, 2)
    four = rowwise.owners({**arguments, "x": torch.randn(4, 2), "sizes": [(1, 2)] * 4}, 4)
    three = rowwise.owners({**arguments, "x": torch.randn(3, 2), "sizes": [(1, 2)] * 3}, 3)
    assert two == four != three
    assert rowwise.owners(arguments, 1) is None


def test_select_takes_what_belongs_to_rows() -> None:
    arguments = dict(
        x=torch.randn(4, 2, 3), ids=torch.randn(6, 3), img_ids=torch.randn(4, 3),
        extra=dict(mask=torch.randn(4, 5), scale=0.5), layers=[torch.randn(4, 2)] * 2, sizes=[1, 2, 3, 4],
    )  # fmt: skip
    part = rowwise.select(arguments, [2, 0], 4)
    assert torch.equal(part["x"], arguments["x"][[2, 0]]) and part["ids"] is arguments["ids"]
    assert part["img_ids"] is arguments["img_ids"] and part["sizes"] == [3, 1]
    assert torch.equal(part["extra"]["mask"], arguments["extra"]["mask"][[2, 0]])
    assert [v.shape for v in part["layers"]] == [(2, 2), (2, 2)]
    whole = rowwise.select(arguments, range(4), 4)
    assert whole["x"] is arguments["x"] and whole["extra"] is not arguments["extra"]


def test_an_invocation_hands_arguments_on_by_name() -> None:
    def function(*args: object, **kwargs: object) -> object:
        return args, kwargs

    x, y = torch.randn(3, 2), torch.randn(3, 2)
    assert rowwise.Invocation(function, dict(x=1, y=2))() == ((), dict(x=1, y=2))
    _, named = rowwise.Invocation(function, {"x": x, "t": 2, "y": y}).on([2, 0], 3)()
    assert torch.equal(named["x"], x[[2, 0]]) and named["t"] == 2 and torch.equal(named["y"], y[[2, 0]])


# ------------------------------------------------------------------------------------------------ calls put together
def a_call(rows: int, seed: int, **changes: object) -> dict[str, object]:
    """A call with inputs of every kind."""
    draw = torch.Generator().manual_seed(seed)
    return dict(
        hidden_states=torch.randn(rows, 4, 6, generator=draw), timestep=torch.full((rows,), 0.5 + seed),
        encoder_hidden_states_llama3=torch.randn(3, rows, 5, generator=draw), img_ids=torch.arange(12.0).view(4, 3),
        image_rotary_emb=(torch.ones(rows, 2), torch.zeros(rows, 2)), shapes=[[(1, 4, 4)]] * rows,
        residuals=[torch.randn(rows, 2, generator=draw) for _ in range(3)], guidance=3.5, return_dict=False,
        options={"adapter": torch.randn(rows, 2, generator=draw), "scale": 1.0}, nothing=None,
    ) | changes  # fmt: skip


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def test_select_takes_calls_apart_as_they_were_before_join() -> None:
    counts = [1, 2, 4]
    calls = [a_call(n, seed) for seed, n in enumerate(counts)]
    joined = rowwise.join(calls, counts)
    assert rowwise.batch_size(joined["hidden_states"]) == 7
    starts = [0, 1, 3]
    for call, start, count in zip(calls, starts, counts, strict=True):
        part = rowwise.select(joined, range(start, start + count), 7)
        part["image_rotary_emb"] = call["image_rotary_emb"]  # shared, whatever its length
        assert same(part, call)


def test_split_undoes_join_for_outputs_of_every_structure() -> None:
    counts = [1, 2]
    out = torch.randn(6, 4)  # two frames a row
    assert [p.shape[0] for p in rowwise.split(out, counts)] == [2, 4]
    assert torch.equal(torch.cat(rowwise.split(out, counts)), out)
    one, two = rowwise.split(dict(sample=torch.arange(3), other=(torch.arange(3), None)), counts)
    assert one["sample"].tolist() == [0] and two["sample"].tolist() == [1, 2]
    assert two["other"][0].tolist() == [1, 2] and two["other"][1] is None
    assert rowwise.split([10, 11, 12], counts) == [[10], [11, 12]]
    with pytest.raises(UnsupportedModelError, match="does not hold 3 rows"):
        rowwise.split(torch.randn(4, 2), counts)
