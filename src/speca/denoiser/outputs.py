"""A model's output, taken apart and put together again: a tensor, a tuple, a dictionary, or an object with fields.

The player works on tensors with rows first, (B, ...). `OutputForm` is learnt from one real output and says where they
are in it. Everything that is no tensor is handed on as it was in that output.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError


def tensors(out: Any) -> list[Tensor]:
    """Return all tensors of a model's output, in order."""
    if isinstance(out, Tensor):
        return [out]
    return [tensor for value in _values(out) for tensor in tensors(value)]


def take(out: Any, row: int, total: int) -> list[Tensor]:
    """Return all tensors of one row of a model's output, as if it had been computed alone."""
    if isinstance(out, Tensor):
        fold = out.shape[0] // total
        return [out[row * fold : (row + 1) * fold]]
    if isinstance(out, list) and len(out) == total:
        return tensors(out[row])
    return [tensor for value in _values(out) for tensor in take(value, row, total)]


@dataclass(frozen=True)
class OutputForm:
    """How the outputs of one kind of call are made.

    Attributes:
        example: an output without content: what it holds besides tensors, and their order.
        dtypes, shapes: of its tensors, shapes without their first dimension.
        listed: whether its only content is a list with one tensor a row, as in Z-Image.
        channels: channels of the sample, where the output has twice as many: a mean and a variance; else 0.
        uncorrectable: why outputs cannot be corrected, empty if they can.
    """

    example: Any
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[torch.Size, ...]
    listed: bool = False
    channels: int = 0
    uncorrectable: str = ""

    @classmethod
    def of(cls, out: Any, rows: int, sample: Any = None) -> OutputForm:
        """Learn the form from an output of `rows` rows; `sample` is the model's noisy input.

        Raises:
            UnsupportedModelError: it does not hold that many rows in each of its tensors.
        """
        items = _listed(out, rows)
        found = tensors(out) if items is None else [torch.stack(items)]
        if not found or any(t.dim() == 0 or t.shape[0] % rows or not t.is_floating_point() for t in found):
            raise UnsupportedModelError(f"the model's output does not hold {rows} rows of numbers in each tensor")
        if items is None and (isinstance(out, list) or _holds_items(out, rows)):
            raise UnsupportedModelError(
                f"the model's output holds a list, but not of one tensor for each of {rows} rows"
            )
        whole = _rows_first(found[0], rows)
        twice = isinstance(sample, Tensor) and whole.dim() > 1 and whole.shape[2:] == sample.shape[2:]
        channels = sample.shape[1] if twice and whole.shape[1] == 2 * sample.shape[1] else 0
        return cls(
            example=_without_content(out, items), dtypes=tuple(t.dtype for t in found),
            shapes=tuple(t.shape[1:] for t in found), listed=items is not None, channels=channels,
            uncorrectable="" if len(found) == 1 else "the model's output is not one tensor of all rows",
        )  # fmt: skip

    def split(self, out: Any, rows: int) -> list[Tensor]:
        """Return the tensors (B, ...) of an output of this form: first the one that the sampler uses, then the others.

        Raises:
            UnsupportedModelError: the output has another form.
        """
        items = _listed(out, rows) if self.listed else None
        found = [torch.stack(items)] if items is not None else tensors(out)
        if [t.shape[1:] for t in found] != list(self.shapes):
            raise UnsupportedModelError("the model's output has another shape than at the step before")
        streams = [_rows_first(t, rows) for t in found]
        if self.channels:
            streams = [streams[0][:, : self.channels], streams[0][:, self.channels :], *streams[1:]]
        return streams

    def build(self, streams: Sequence[Tensor]) -> Any:
        """Undo `split`, in the dtypes of the model's own outputs."""
        whole = list(streams)
        if self.channels:
            whole = [torch.cat([whole[0].to(whole[1].dtype), whole[1]], 1), *whole[2:]]
        whole = [t.to(dtype) for t, dtype in zip(whole, self.dtypes, strict=True)]
        if self.listed:
            return _filled(self.example, iter([list(whole[0].unbind(0))]), list)
        folded = (
            t if t.dim() == len(shape) + 1 else t.flatten(0, 1) for t, shape in zip(whole, self.shapes, strict=True)
        )
        return _filled(self.example, folded, Tensor)


def _rows_first(tensor: Tensor, rows: int) -> Tensor:
    return tensor if tensor.shape[0] == rows else tensor.view(rows, -1, *tensor.shape[1:])


def _listed(out: Any, rows: int) -> list[Tensor] | None:
    """The list with one tensor a row, all alike, that is all a model's output holds; else None."""
    if isinstance(out, list) and len(out) == rows and all(isinstance(item, Tensor) for item in out):
        return out if len({(item.shape, item.dtype) for item in out}) == 1 else None
    values = _values(out)
    return _listed(values[0], rows) if len(values) == 1 and not isinstance(values[0], Tensor) else None


def _holds_items(out: Any, rows: int) -> bool:
    """Whether a list somewhere in an output has one tensor for each row, instead of tensors of all rows."""
    if isinstance(out, Tensor):
        return False
    if isinstance(out, list) and len(out) == rows and all(isinstance(item, Tensor) for item in out):
        return any(item.shape[:1] != (rows,) for item in out)
    return any(_holds_items(value, rows) for value in _values(out))


def _values(out: Any) -> list[Any]:
    """What a container holds; empty for anything else."""
    if isinstance(out, dict):  # includes diffusers' BaseOutput
        return list(out.values())
    if isinstance(out, (list, tuple)):
        return list(out)
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        return [getattr(out, f.name) for f in dataclasses.fields(out)]
    return []


def _without_content(out: Any, items: list[Tensor] | None) -> Any:
    """The output with empty tensors, so that nothing of it is held; a list of rows becomes an empty list."""
    if items is not None:
        return _filled(out, iter([[]]), list, items)
    return _filled(out, (t.new_empty(0) for t in tensors(out)), Tensor)


def _filled(out: Any, given: Iterator[Any], kind: type, only: Any = None) -> Any:
    """An output of the structure of `out` with its tensors (or its list of rows) replaced by what is given."""
    if out is only if only is not None else isinstance(out, kind):
        return next(given)
    if isinstance(out, dict):
        return type(out)(**{k: _filled(v, given, kind, only) for k, v in out.items()})
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return type(out)(*(_filled(v, given, kind, only) for v in out))
    if isinstance(out, (list, tuple)):
        return type(out)(_filled(v, given, kind, only) for v in out)
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        made = copy.copy(out)
        for f in dataclasses.fields(out):
            object.__setattr__(made, f.name, _filled(getattr(out, f.name), given, kind, only))
        return made
    return out
