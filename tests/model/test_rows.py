"""Rows of inputs, outputs and block features: who owns what, uneven rows, layouts, fitting."""

from __future__ import annotations

import torch

from speca.model import rows as rowwise


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


def test_weights_count_masks_lengths_and_list_items() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert rowwise.weights(dict(x=torch.randn(2, 4), mask=mask), 2) == [3, 1]
    assert rowwise.weights(
        dict(x=torch.randn(2, 4), text_lens=torch.tensor([6, 4]), labels=torch.tensor([9, 1])), 2
    ) == [6, 4]
    assert rowwise.weights(dict(x=[torch.ones(2, 3), torch.ones(1, 3)]), 2) == [6, 3]


def test_a_layout_is_read_off_a_row_computed_alone() -> None:
    batch, tokens = torch.zeros(2, 2, 5), torch.zeros(6, 2, 5)
    assert rowwise.layout(batch, 2, torch.zeros(1, 2, 5)) == "rows"
    assert rowwise.layout(batch, 2, torch.zeros(2, 1, 5)) == "second", "as many tokens as rows"
    assert rowwise.layout(tokens, 2, torch.zeros(3, 2, 5)) == "folded", "as many frames as rows"
    assert rowwise.layout(tokens, 2, torch.zeros(6, 1, 5)) == "second"
    assert rowwise.layout(tokens, 1, tokens) == "whole"
    first = rowwise.rows_first(tokens, 1, "whole")
    assert first.shape == (1, 6, 2, 5) and torch.equal(rowwise.as_given(first, "whole"), tokens)


def test_fit_cuts_and_pads_at_the_end() -> None:
    x = torch.arange(6.0).view(1, 3, 2)
    assert torch.equal(rowwise.fit(x, (1, 2, 2)), x[:, :2])
    longer = rowwise.fit(x, (1, 4, 2))
    assert torch.equal(longer[:, :3], x) and not longer[:, 3:].any()
    assert rowwise.fit(x, x.shape) is x


def test_take_is_one_row_of_any_output() -> None:
    y = torch.randn(3, 2)
    assert torch.equal(rowwise.take((y, None), 1, 3)[0], y[1:2])
    assert torch.equal(rowwise.take(dict(sample=y.repeat_interleave(2, 0)), 1, 3)[0], y[[1, 1]])
    assert rowwise.take(([y[0], y[1], y[2]],), 2, 3)[0] is not None
    assert [t.shape for t in rowwise.tensors(dict(a=[y, y], b=None))] == [(3, 2), (3, 2)]
