"""Rows of a call: which of its inputs belong to rows, how some are selected, and how calls become one and are undone.

B is the number of rows of a call, n of a selection. Inputs whose first dimension is B, and lists of length B, belong to
rows; everything else (position ids, sizes, dictionaries of options) is shared by all rows. What shapes cannot tell is
in `arguments.py`. With B = 1 there is nothing to select.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.history import on_device
from ..errors import UnsupportedModelError
from .arguments import ROW_DIMENSIONS


@dataclass(frozen=True)
class Invocation:
    """A function and its arguments by name."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    def __call__(self) -> Any:
        """Call it."""
        return self.function(**self.arguments)

    def on(self, rows: Sequence[int], total: int) -> Invocation:
        """Return the same call for some of its `total` rows only."""
        return Invocation(self.function, select(self.arguments, rows, total))


def batch_size(value: Any) -> int:
    """Return the rows of a model's noisy input: a tensor (B, ...) or a list with one item per row.

    Raises:
        UnsupportedModelError: it is neither.
    """
    if isinstance(value, Tensor):
        return int(value.shape[0])
    if isinstance(value, (list, tuple)):
        return len(value)
    raise UnsupportedModelError(f"cannot tell the number of rows from an argument of type {type(value).__name__}.")


# ------------------------------------------------------------------------------------------------ inputs
def select(arguments: dict[str, Any], rows: Sequence[int], total: int) -> dict[str, Any]:
    """Return the arguments of a call for `rows` only. All rows in order: the very same tensors, in fresh containers."""
    if list(rows) == list(range(total)):
        return {name: _fresh(value) for name, value in arguments.items()}
    listed = takes_lists(arguments)
    return {n: _select(v, rows, total, listed, ROW_DIMENSIONS.get(n, 0)) for n, v in arguments.items()}


def owners(arguments: dict[str, Any], total: int) -> object:
    """Return which inputs `select` takes apart, by structure alone: what was tested for one batch size holds for all
    that give the same. None with one row, where nothing is taken apart."""
    if total == 1:
        return None
    listed = takes_lists(arguments)
    return tuple((n, _owners(v, total, listed, ROW_DIMENSIONS.get(n, 0))) for n, v in arguments.items())


def takes_lists(arguments: dict[str, Any]) -> bool:
    return isinstance(next(iter(arguments.values())), (list, tuple))


def _fresh(value: Any) -> Any:
    """Copies of containers, not of tensors: models change dictionaries and lists they are given."""
    if isinstance(value, dict):
        return {k: _fresh(v) for k, v in value.items()}
    return [_fresh(v) for v in value] if isinstance(value, list) else value


def _select(value: Any, rows: Sequence[int], total: int, listed: bool, dim: int | None) -> Any:
    if dim is None:
        return _fresh(value)
    if isinstance(value, Tensor):
        if owned(value, total, dim):
            return value.index_select(dim, on_device(rows, value.device))
        return value
    if isinstance(value, dict):
        return {k: _select(v, rows, total, listed, dim) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        per_row = one_each(value, total, listed)
        picked = [value[i] for i in rows] if per_row else [_select(v, rows, total, listed, dim) for v in value]
        return picked if isinstance(value, list) else tuple(picked)
    return value


def _owners(value: Any, total: int, listed: bool, dim: int | None) -> object:
    if dim is None:
        return "shared"
    if isinstance(value, Tensor):
        return dim if owned(value, total, dim) else "shared"
    if isinstance(value, dict):
        return tuple((k, _owners(v, total, listed, dim)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return "items" if one_each(value, total, listed) else tuple(_owners(v, total, listed, dim) for v in value)
    return "shared"


def owned(value: Tensor, total: int, dim: int) -> bool:
    return value.dim() > dim and value.shape[dim] == total


def one_each(value: Sequence[Any], total: int, listed: bool) -> bool:
    """Whether a list holds one item per row. Unless samples come as lists, B batched tensors are one per layer, and a
    tuple of tensors is a group such as cosine and sine."""
    if len(value) != total or listed:
        return len(value) == total
    tensors = [v for v in value if isinstance(v, Tensor)]
    grouped = isinstance(value, tuple) and bool(tensors)
    return not grouped and not (len(tensors) == total and all(v.dim() > 1 and v.shape[0] == total for v in tensors))


# ------------------------------------------------------------------------------------------------ calls put together
def join(calls: Sequence[dict[str, Any]], totals: Sequence[int]) -> dict[str, Any]:
    """Return one call of all the rows of calls of equal `signature`; what they share is that of the first.

    `select` undoes it for inputs, `split` for outputs.
    """
    listed = takes_lists(calls[0])
    return {n: _join([c[n] for c in calls], totals, listed, ROW_DIMENSIONS.get(n, 0)) for n in calls[0]}


def split(out: Any, totals: Sequence[int]) -> list[Any]:
    """Return the outputs of the single calls from that of their `join`, tensors as views."""
    if isinstance(out, Tensor):
        fold, rest = divmod(out.shape[0], sum(totals))
        if rest or not fold:
            raise UnsupportedModelError(f"an output of shape {tuple(out.shape)} does not hold {sum(totals)} rows.")
        return list(torch.split(out, [fold * n for n in totals]))
    if isinstance(out, dict):  # includes diffusers' BaseOutput
        parts = {k: split(v, totals) for k, v in out.items()}
        return [type(out)(**{k: v[i] for k, v in parts.items()}) for i in range(len(totals))]
    if isinstance(out, list) and len(out) == sum(totals):
        ends = list(itertools.accumulate(totals))
        return [out[end - n : end] for n, end in zip(totals, ends, strict=True)]
    if isinstance(out, (list, tuple)):
        columns = [split(v, totals) for v in out]
        return [type(out)(column[i] for column in columns) for i in range(len(totals))]
    return [out] * len(totals)


def _join(values: Sequence[Any], totals: Sequence[int], listed: bool, dim: int | None) -> Any:
    first = values[0]
    if dim is None:
        return _fresh(first)
    if isinstance(first, Tensor):
        return torch.cat(list(values), dim) if owned(first, totals[0], dim) else first
    if isinstance(first, dict):
        return {k: _join([v[k] for v in values], totals, listed, dim) for k in first}
    if isinstance(first, (list, tuple)):
        if one_each(first, totals[0], listed):
            return type(first)(item for value in values for item in value)
        return type(first)(_join(column, totals, listed, dim) for column in zip(*values, strict=True))
    return first
