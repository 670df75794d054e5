"""Rows of a transformer's own inputs and outputs: select, scatter, and the layout of block features.

B is the number of rows of a call, n of a selection. Inputs whose first dimension is B, and lists of length B, belong to
rows; everything else (position ids, sizes, dictionaries of options) is shared. With B = 1 there is nothing to select.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedModelError

SHARED_ARGUMENTS = frozenset({"img_ids", "txt_ids", "image_rotary_emb", "rotary_emb", "freqs_cis"})
"""Arguments that never index rows, named so that a position table of B entries is not mistaken for a batch."""


def batch_size(value: Any) -> int:
    """Rows of the model's first argument: a tensor (B, ...) or a list with one item per row."""
    if isinstance(value, Tensor):
        return int(value.shape[0])
    if isinstance(value, (list, tuple)):
        return len(value)
    raise UnsupportedModelError(f"cannot tell the number of rows from an argument of type {type(value).__name__}.")


def select(arguments: dict[str, Any], rows: Sequence[int], total: int) -> dict[str, Any]:
    """The arguments of a call for `rows` only. All rows in order: the very same tensors, in fresh containers."""
    if list(rows) == list(range(total)):
        return {name: _fresh(value) for name, value in arguments.items()}
    listed = isinstance(next(iter(arguments.values())), (list, tuple))
    return {n: v if n in SHARED_ARGUMENTS else _select(v, rows, total, listed) for n, v in arguments.items()}


def _fresh(value: Any) -> Any:
    """Copies of containers, not of tensors: models change dictionaries and lists they are given."""
    if isinstance(value, dict):
        return {k: _fresh(v) for k, v in value.items()}
    return [_fresh(v) for v in value] if isinstance(value, list) else value


def _select(value: Any, rows: Sequence[int], total: int, listed: bool) -> Any:
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] == total:
            return value.index_select(0, torch.tensor(rows, device=value.device))
        return value
    if isinstance(value, dict):
        return {k: _select(v, rows, total, listed) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        # A list of B batched tensors holds one tensor a layer, unless the model takes its samples as lists.
        per_row = len(value) == total and (listed or not all(_is_batched(v, total) for v in value))
        picked = [value[i] for i in rows] if per_row else [_select(v, rows, total, listed) for v in value]
        return type(value)(picked) if isinstance(value, list) else tuple(picked)
    return value


def _is_batched(value: Any, total: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == total


def merge(parts: Sequence[tuple[Sequence[int], Any]], total: int) -> Any:
    """One output of `total` rows from parts `(rows, output)`; later parts win where rows overlap."""
    first_rows, first = parts[0]
    if len(parts) == 1 and list(first_rows) == list(range(total)):
        return first
    return _merge(parts, total)


def _merge(parts: Sequence[tuple[Sequence[int], Any]], total: int) -> Any:
    first = parts[0][1]
    if isinstance(first, Tensor):
        return _merge_tensors(parts, total)
    if isinstance(first, dict):  # includes diffusers' BaseOutput
        return type(first)(**{k: _merge([(rows, out[k]) for rows, out in parts], total) for k in first})
    if isinstance(first, list) and len(first) == len(parts[0][0]):
        items: list[Any] = [None] * total
        for rows, out in parts:
            for row, item in zip(rows, out, strict=True):
                items[row] = item
        return items
    if isinstance(first, (list, tuple)):
        columns = [_merge([(rows, out[k]) for rows, out in parts], total) for k in range(len(first))]
        return columns if isinstance(first, list) else tuple(columns)
    return first


def _merge_tensors(parts: Sequence[tuple[Sequence[int], Tensor]], total: int) -> Tensor:
    rows, first = parts[0]
    fold, rest = divmod(first.shape[0], len(rows))
    if rest or not fold:
        raise UnsupportedModelError(f"an output of shape {tuple(first.shape)} cannot be split into {len(rows)} rows.")
    merged = first.new_empty((total, fold, *first.shape[1:]))
    for rows, out in parts:
        part = out.reshape(len(rows), fold, *out.shape[1:])
        merged.index_copy_(0, torch.tensor(rows, device=out.device), part)
    return merged.flatten(0, 1)


Layout = Literal["rows", "second", "folded"]


def layout(feature: Tensor, rows: int) -> Layout:
    """Where a block feature carries its rows: dimension 0, dimension 1, or folded into dimension 0.

    Raises:
        UnsupportedModelError: none of these fits.
    """
    if feature.shape[0] == rows:
        return "rows"
    if feature.dim() > 1 and feature.shape[1] == rows:
        return "second"
    if feature.shape[0] % rows == 0:
        return "folded"
    raise UnsupportedModelError(f"a block feature of shape {tuple(feature.shape)} has no dimension of {rows} rows.")


def rows_first(feature: Tensor, rows: int, kind: Layout) -> Tensor:
    """A block feature as (B, ...)."""
    if kind == "second":
        return feature.transpose(0, 1)
    return feature.reshape(rows, -1, *feature.shape[1:]) if kind == "folded" else feature


def as_given(feature: Tensor, kind: Layout) -> Tensor:
    """Undo `rows_first`."""
    if kind == "second":
        return feature.transpose(0, 1)
    return feature.flatten(0, 1) if kind == "folded" else feature
