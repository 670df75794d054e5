"""Rows of a transformer's own inputs and outputs: select, merge, and the layout of block features.

B is the number of rows of a call, n of a selection. Inputs whose first dimension is B, and lists of length B, belong to
rows; everything else (position ids, sizes, dictionaries of options) is shared. What shapes cannot tell is in
`overrides.py`. With B = 1 there is nothing to select.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.history import table
from ..errors import UnsupportedModelError
from .overrides import ROW_DIMENSIONS


def batch_size(value: Any) -> int:
    """Rows of the model's first argument: a tensor (B, ...) or a list with one item per row."""
    if isinstance(value, Tensor):
        return int(value.shape[0])
    if isinstance(value, (list, tuple)):
        return len(value)
    raise UnsupportedModelError(f"cannot tell the number of rows from an argument of type {type(value).__name__}.")


# ------------------------------------------------------------------------------------------------ inputs
def select(arguments: dict[str, Any], rows: Sequence[int], total: int) -> dict[str, Any]:
    """The arguments of a call for `rows` only. All rows in order: the very same tensors, in fresh containers."""
    if list(rows) == list(range(total)):
        return {name: _fresh(value) for name, value in arguments.items()}
    listed = _takes_lists(arguments)
    return {n: _select(v, rows, total, listed, ROW_DIMENSIONS.get(n, 0)) for n, v in arguments.items()}


def owners(arguments: dict[str, Any], total: int) -> object:
    """Which inputs `select` takes apart, by structure alone: what was tested for one batch size holds for all that
    give the same. Nothing can be told, and nothing is taken apart, with one row."""
    if total == 1:
        return None
    listed = _takes_lists(arguments)
    return tuple((n, _owners(v, total, listed, ROW_DIMENSIONS.get(n, 0))) for n, v in arguments.items())


def weights(arguments: dict[str, Any], total: int) -> list[float]:
    """How much of the inputs each row really uses: ones in its masks, numbers in its list items, its given lengths.

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


def _takes_lists(arguments: dict[str, Any]) -> bool:
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
        if _owned(value, total, dim):
            return value.index_select(dim, table(rows, value.device))
        return value
    if isinstance(value, dict):
        return {k: _select(v, rows, total, listed, dim) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        per_row = _one_each(value, total, listed)
        picked = [value[i] for i in rows] if per_row else [_select(v, rows, total, listed, dim) for v in value]
        return picked if isinstance(value, list) else tuple(picked)
    return value


def _owners(value: Any, total: int, listed: bool, dim: int | None) -> object:
    if dim is None:
        return "shared"
    if isinstance(value, Tensor):
        return dim if _owned(value, total, dim) else "shared"
    if isinstance(value, dict):
        return tuple((k, _owners(v, total, listed, dim)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return "items" if _one_each(value, total, listed) else tuple(_owners(v, total, listed, dim) for v in value)
    return "shared"


def _owned(value: Tensor, total: int, dim: int) -> bool:
    return value.dim() > dim and value.shape[dim] == total


def _one_each(value: Sequence[Any], total: int, listed: bool) -> bool:
    """Whether a list holds one item per row. Unless samples come as lists, B batched tensors are one per layer, and a
    tuple of tensors is a group such as cosine and sine."""
    if len(value) != total or listed:
        return len(value) == total
    tensors = [v for v in value if isinstance(v, Tensor)]
    grouped = isinstance(value, tuple) and bool(tensors)
    return not grouped and not (len(tensors) == total and all(v.dim() > 1 and v.shape[0] == total for v in tensors))


# ------------------------------------------------------------------------------------------------ calls put together
def content(tensor: Tensor) -> bytes:
    """The numbers of a tensor, read from its device."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


Token = Callable[[Tensor], Hashable]


def signature(arguments: dict[str, Any], total: int, token: Token) -> Hashable:
    """What has to be equal in calls that `join` may put together: all but the numbers that belong to rows.

    Args:
        arguments: of a call of `total` rows.
        token: equal for shared tensors of equal content, such as position ids.
    """
    listed = _takes_lists(arguments)
    return tuple((n, _signature(v, total, listed, ROW_DIMENSIONS.get(n, 0), token)) for n, v in arguments.items())


def join(calls: Sequence[dict[str, Any]], totals: Sequence[int]) -> dict[str, Any]:
    """One call of all the rows of calls of equal `signature`; what they share is that of the first. `select` undoes it
    for inputs, `split` for outputs."""
    listed = _takes_lists(calls[0])
    return {n: _join([c[n] for c in calls], totals, listed, ROW_DIMENSIONS.get(n, 0)) for n in calls[0]}


def split(out: Any, totals: Sequence[int]) -> list[Any]:
    """The outputs of the single calls from that of their `join`, tensors as views."""
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


def _signature(value: Any, total: int, listed: bool, dim: int | None, token: Token) -> Hashable:
    if isinstance(value, Tensor):
        if dim is None or not _owned(value, total, dim):
            return "shared", token(value)
        return dim, (*value.shape[:dim], *value.shape[dim + 1 :]), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((k, _signature(v, total, listed, dim, token)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        if dim is not None and _one_each(value, total, listed):  # items, which need not be all alike
            kinds = {(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else repr(v) for v in value}
            return "items", type(value), frozenset(kinds)
        return type(value), tuple(_signature(v, total, listed, dim, token) for v in value)
    return type(value), value if isinstance(value, Hashable) else id(value)


def _join(values: Sequence[Any], totals: Sequence[int], listed: bool, dim: int | None) -> Any:
    first = values[0]
    if dim is None:
        return _fresh(first)
    if isinstance(first, Tensor):
        return torch.cat(list(values), dim) if _owned(first, totals[0], dim) else first
    if isinstance(first, dict):
        return {k: _join([v[k] for v in values], totals, listed, dim) for k in first}
    if isinstance(first, (list, tuple)):
        if _one_each(first, totals[0], listed):
            return type(first)(item for value in values for item in value)
        return type(first)(_join(column, totals, listed, dim) for column in zip(*values, strict=True))
    return first


# ------------------------------------------------------------------------------------------------ outputs
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
        merged.index_copy_(0, table(rows, out.device), part)
    return merged.flatten(0, 1)


def tensors(out: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    if isinstance(out, Tensor):
        return [out]
    values = list(out.values()) if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else []
    return [tensor for value in values for tensor in tensors(value)]


class _Listed(list[Tensor]):
    """In a template, a list with one tensor a row."""


def _listed(out: Any, rows: int) -> list[Tensor] | None:
    """The list with one tensor a row, all alike, that is all a model's output holds, as that of Z-Image; else None."""
    if isinstance(out, list) and len(out) == rows and all(isinstance(item, Tensor) for item in out):
        return out if len({(item.shape, item.dtype) for item in out}) == 1 else None
    values = list(out.values()) if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else []
    return _listed(values[0], rows) if len(values) == 1 else None


def streams(out: Any, rows: int) -> list[Tensor]:
    """All tensors of a model's output as (B, ...), as views but of a list with one a row; raises UnsupportedModelError
    where one holds no B rows."""
    if (items := _listed(out, rows)) is not None:
        return [torch.stack(items)]
    found = tensors(out)
    if not found or isinstance(out, list) or any(t.dim() == 0 or t.shape[0] % rows for t in found):
        raise UnsupportedModelError(f"the model's output does not hold {rows} rows in each tensor.")
    return [t if t.shape[0] == rows else t.view(rows, -1, *t.shape[1:]) for t in found]


def template(out: Any, rows: int) -> Any:
    """The output of one row, without content: what `like` is to be given."""
    if (items := _listed(out, rows)) is not None:
        return _replaced(out, items, _Listed([items[0].new_empty(items[0].shape)]))
    return _like(out, (t.new_empty((t.shape[0] // rows, *t.shape[1:])) for t in tensors(out)))


def like(out: Any, given: Sequence[Tensor]) -> Any:
    """An output of the structure of `out` that holds the tensors `given`, as `streams` gives them."""
    return _like(out, iter(given))


def _replaced(out: Any, items: list[Tensor], new: list[Tensor]) -> Any:
    """`out` with a list in it replaced."""
    if out is items:
        return new
    if isinstance(out, dict):
        return type(out)(**{k: _replaced(v, items, new) for k, v in out.items()})
    return type(out)(_replaced(v, items, new) for v in out)


def _like(out: Any, given: Iterator[Tensor]) -> Any:
    if isinstance(out, _Listed):
        return list(next(given).unbind(0))
    if isinstance(out, Tensor):
        new = next(given)
        return new if new.dim() == out.dim() else new.flatten(0, 1)
    if isinstance(out, dict):  # includes diffusers' BaseOutput
        return type(out)(**{k: _like(v, given) for k, v in out.items()})
    if isinstance(out, (list, tuple)):
        return type(out)(_like(v, given) for v in out)
    return out


def main(out: Any, rows: int, arguments: dict[str, Any]) -> Tensor:
    """What a sampler takes of a model's output, rows first: of a mean and a variance, the mean. A view, which what is
    changed in it changes; of a list with one tensor a row a copy, see `put`.

    Raises:
        UnsupportedModelError: the output is neither one floating-point tensor whose first dimension holds the rows, nor
            a list of them.
    """
    items = _listed(out, rows)
    found = tensors(out) if items is None else [torch.stack(items)]
    if len(found) != 1 or not found[0].is_floating_point() or found[0].shape[0] % rows:
        raise UnsupportedModelError("the model's output is not one tensor of all rows")
    whole = found[0].view(rows, -1, *found[0].shape[1:]) if found[0].shape[0] != rows else found[0]
    sample = next(iter(arguments.values()))
    if not isinstance(sample, Tensor) or whole.dim() < 2 or whole.shape[2:] != sample.shape[2:]:
        return whole
    return whole[:, : sample.shape[1]] if whole.shape[1] == 2 * sample.shape[1] else whole


def put(out: Any, changed: Tensor) -> None:
    """Let `out` hold what was `changed` (n, ...) in its `main`."""
    for item, row in zip(_listed(out, len(changed)) or (), changed, strict=False):
        item.copy_(row)


def take(out: Any, row: int, total: int) -> list[Tensor]:
    """All tensors of one row of a model's output, as if it had been computed alone."""
    if isinstance(out, Tensor):
        fold = out.shape[0] // total
        return [out[row * fold : (row + 1) * fold]]
    if isinstance(out, list) and len(out) == total:
        return tensors(out[row])
    values = list(out.values()) if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else []
    return [tensor for value in values for tensor in take(value, row, total)]


# ------------------------------------------------------------------------------------------------ block features
Layout = Literal["rows", "second", "folded", "whole"]


def layout(feature: Tensor, rows: int, alone: Tensor | None = None) -> Layout:
    """Where a block feature carries its rows: dimension 0, dimension 1, folded into dimension 0, or, with one row of
    which nothing else is known, the whole tensor is that row.

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
    """A block feature as (B, ...)."""
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
