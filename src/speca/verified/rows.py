"""What verified drafts need to know of rows: how much of its inputs each one uses, and how outputs become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.history import on_device
from ..denoiser.arguments import ROW_DIMENSIONS
from ..errors import UnsupportedModelError


def weights(arguments: dict[str, Any], total: int) -> list[float]:
    """Return how much of the inputs each row uses: ones in its masks, numbers in its list items, its given lengths.

    Rows of different weight may be ragged: alone, such a row can have fewer tokens than in its batch.
    """
    found = [0.0] * total
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == total and ROW_DIMENSIONS.get(name, 0) == 0:
            if _is_mask(name, value):
                used = value.count_nonzero(1) if value.dim() > 1 else value
                found = [w + u for w, u in zip(found, used.tolist(), strict=True)]
        elif isinstance(value, (list, tuple)) and len(value) == total and all(isinstance(v, Tensor) for v in value):
            found = [w + v.numel() for w, v in zip(found, value, strict=True)]
    return found


def _is_mask(name: str, value: Tensor) -> bool:
    """A mask (B, L) of zeros and ones, or the lengths of rows (B,)."""
    if value.dim() == 1:
        return "len" in name
    return value.dim() == 2 and bool(((value == 0) | (value == 1)).all())


def merge(parts: Sequence[tuple[Sequence[int], Any]], total: int) -> Any:
    """Return one output of `total` rows from parts `(rows, output)`; later parts win where rows overlap."""
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
        merged.index_copy_(0, on_device(rows, out.device), part)
    return merged.flatten(0, 1)
