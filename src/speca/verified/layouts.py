"""Batch dimension of the features of a block. B is the number of rows of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import UnsupportedModelError

Layout = Literal["rows", "second", "folded", "whole"]


def layout(feature: Tensor, rows: int, alone: Tensor | None = None) -> Layout:
    """Return the layout of a block feature: rows in dimension 0, in dimension 1, folded into dimension 0, or, for one
    row without other evidence, the whole tensor as that row.

    Args:
        feature: of a call with `rows` rows.
        rows: B.
        alone: the same feature of one of these rows computed alone; without it the first that fits is taken.

    Raises:
        UnsupportedModelError: none of these fits.
    """
    if rows == 1:
        return "whole"
    one = tuple(alone.shape) if alone is not None else (1, 1) if feature.shape[0] == rows else (feature.shape[0], 1)
    if feature.shape[0] == rows and one[0] == 1:
        return "rows"
    if feature.dim() > 1 and feature.shape[1] == rows and one[1] == 1:
        return "second"
    if feature.shape[0] == rows * (one[0] if alone is not None else feature.shape[0] // rows):
        return "folded"
    raise UnsupportedModelError(f"a block feature of shape {tuple(feature.shape)} does not hold {rows} rows.")


def rows_first(feature: Tensor, rows: int, kind: Layout) -> Tensor:
    """Return a block feature as (B, ...)."""
    if kind == "second":
        return feature.transpose(0, 1)
    if kind == "whole":
        return feature.unsqueeze(0)
    return feature.reshape(rows, -1, *feature.shape[1:]) if kind == "folded" else feature


def as_given(feature: Tensor, kind: Layout) -> Tensor:
    """Undo `rows_first`."""
    if kind == "second":
        return feature.transpose(0, 1)
    if kind == "whole":
        return feature.squeeze(0)
    return feature.flatten(0, 1) if kind == "folded" else feature


def fit(feature: Tensor, shape: Sequence[int]) -> Tensor:
    """Cut or zero-pad at the end of each dimension: ragged rows carry their own tokens first, padding after them."""
    for dim, size in enumerate(shape):
        if feature.shape[dim] > size:
            feature = feature.narrow(dim, 0, size)
        elif feature.shape[dim] < size:
            missing = [*feature.shape[:dim], size - feature.shape[dim], *feature.shape[dim + 1 :]]
            feature = torch.cat([feature, feature.new_zeros(missing)], dim)
    return feature
