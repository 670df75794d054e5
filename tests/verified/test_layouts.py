"""Where block features carry the rows of a call, and how features of unequal length are made to fit."""

from __future__ import annotations

import pytest
import torch

from speca.errors import UnsupportedModelError
from speca.verified import layouts


@pytest.mark.parametrize("kind", ["rows", "second", "folded"])
def test_layouts_round_trip(kind: layouts.Layout) -> None:
    shape = dict(rows=(3, 5, 2), second=(7, 3, 2), folded=(6, 5, 2))[kind]
    x = torch.randn(shape)
    assert layouts.layout(x, 3) == kind
    first = layouts.rows_first(x, 3, kind)
    assert first.shape[0] == 3
    assert torch.equal(layouts.as_given(first, kind), x)


def test_a_feature_that_holds_no_rows_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="does not hold 3 rows"):
        layouts.layout(torch.zeros(5, 4, 2), 3)


def test_a_layout_is_read_off_a_row_computed_alone() -> None:
    batch, tokens = torch.zeros(2, 2, 5), torch.zeros(6, 2, 5)
    assert layouts.layout(batch, 2, torch.zeros(1, 2, 5)) == "rows"
    assert layouts.layout(batch, 2, torch.zeros(2, 1, 5)) == "second", "as many tokens as rows"
    assert layouts.layout(tokens, 2, torch.zeros(3, 2, 5)) == "folded", "as many frames as rows"
    assert layouts.layout(tokens, 2, torch.zeros(6, 1, 5)) == "second"
    assert layouts.layout(tokens, 1, tokens) == "whole"
    first = layouts.rows_first(tokens, 1, "whole")
    assert first.shape == (1, 6, 2, 5) and torch.equal(layouts.as_given(first, "whole"), tokens)


def test_fit_cuts_and_pads_at_the_end() -> None:
    x = torch.arange(6.0).view(1, 3, 2)
    assert torch.equal(layouts.fit(x, (1, 2, 2)), x[:, :2])
    longer = layouts.fit(x, (1, 4, 2))
    assert torch.equal(longer[:, :3], x) and not longer[:, 3:].any()
    assert layouts.fit(x, x.shape) is x
