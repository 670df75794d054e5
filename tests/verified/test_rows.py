"""How much rows use of their inputs, and outputs of some rows put together."""

from __future__ import annotations

import torch

from speca.verified.rows import merge, weights


def test_weights_count_masks_lengths_and_list_items() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert weights(dict(x=torch.randn(2, 4), mask=mask), 2) == [3, 1]
    assert weights(dict(x=torch.randn(2, 4), text_lens=torch.tensor([6, 4]), labels=torch.tensor([9, 1])), 2) == [6, 4]
    assert weights(dict(x=[torch.ones(2, 3), torch.ones(1, 3)]), 2) == [6, 3]


def test_merge_puts_rows_in_their_places_and_later_parts_win() -> None:
    y = torch.randn(4, 7)
    merged = merge([([0, 2], (y[[0, 2]],)), ([1, 3], (y[[1, 3]],))], 4)
    assert torch.equal(merged[0], y)
    later = merge([(range(4), (y,)), ([3], (torch.zeros(1, 7),))], 4)
    assert torch.equal(later[0][:3], y[:3]) and not later[0][3].any()
