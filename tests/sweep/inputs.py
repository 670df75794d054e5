"""What inputs of a tiny model are made of. Row i is the same in every batch, so a row can be compared with itself.

A value of a case is either shared by all rows and written as it is, or one of the makers below: a function of the
argument's name and the rows asked for.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ROWS = 4
Maker = Callable[[str, Sequence[int]], Any]


class Time:
    """Marks the timestep: its largest value, and the shape beyond the rows where a model takes one per frame."""

    def __init__(self, largest: float, *shape: int, flat: bool = False) -> None:
        self.largest, self.shape, self.flat = largest, shape, flat

    def at(self, progress: float, rows: int) -> Tensor:
        """The timestep (rows, *shape) at a share of the way from the largest value to zero."""
        value = torch.full((rows, *self.shape), self.largest * (1 - progress))
        return value.flatten() if self.flat else value


def made(arguments: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Fresh arguments of one call for `rows`; the timestep is left out."""
    return {
        name: value(name, rows) if callable(value) else copy.deepcopy(value)
        for name, value in arguments.items()
        if not isinstance(value, Time)
    }


def noise(*shape: int, dim: int = 0) -> Maker:
    """Normal numbers (B, *shape), or with the rows in another dimension."""
    return lambda name, rows: torch.stack([_draw(name, row, shape) for row in rows], dim)


def table(*values: Any) -> Maker:
    """One number, list or tensor per row; a single one holds for every row."""
    many = list(values) * (ROWS if len(values) == 1 else 1)
    return lambda name, rows: torch.stack([torch.as_tensor(many[row]) for row in rows])


def listed(*values: Any) -> Maker:
    """A Python list with one item per row; a single one holds for every row."""
    many = list(values) * (ROWS if len(values) == 1 else 1)
    return lambda name, rows: [_item(many[row], name, row) for row in rows]


def layers(count: int, *shape: int) -> Maker:
    """A list with one (B, *shape) per layer."""
    return lambda name, rows: [noise(*shape)(f"{name}{k}", rows) for k in range(count)]


def mask(length: int, *lengths: int, dtype: torch.dtype = torch.float32) -> Maker:
    """Ones for each row's own tokens, then zeros: (B, length). Without lengths, all ones."""
    kept = list(lengths) or [length] * ROWS
    return lambda name, rows: torch.stack([(torch.arange(length) < kept[row]).to(dtype) for row in rows])


def ids(*shape: int, high: int) -> Maker:
    """Whole numbers below `high`: (B, *shape)."""
    return lambda name, rows: torch.stack([(_draw(name, row, shape) * 1000).long() % high for row in rows])


def grid(height: int, width: int, columns: int = 3) -> Tensor:
    """Position ids (height * width, columns), shared by all rows."""
    out = torch.zeros(height, width, columns)
    out[..., 1] += torch.arange(height)[:, None]
    out[..., 2] += torch.arange(width)
    return out.reshape(-1, columns)


def _draw(name: str, row: int, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{row}".encode()))
    return torch.randn(tuple(shape), generator=generator)


def _item(value: Any, name: str, row: int) -> Any:
    return _draw(name, row, value.shape) if isinstance(value, Shape) else copy.deepcopy(value)


class Shape:
    """In `listed`: noise of this shape."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape


def rotary(kind: str) -> Maker:
    """Position tables that some pipelines hand to their transformer, shared by all rows."""
    return lambda name, rows: _rotary(kind)


def _rotary(kind: str) -> Any:
    from diffusers.models import embeddings

    if kind == "allegro":
        t, h, w, *grids = embeddings.get_3d_rotary_pos_embed_allegro(
            embed_dim=24, crops_coords=((0, 0), (4, 4)), grid_size=(4, 4), temporal_size=2,
            interpolation_scale=(1.0, 1.0, 1.0), device=torch.device("cpu"),
        )  # fmt: skip
        places = torch.cartesian_prod(*(g.long() for g in grids)).T.reshape(3, 1, -1)
        return (t, h, w), tuple(places)
    if kind == "hunyuan-dit":
        return embeddings.get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    if kind == "lumina-next":
        return embeddings.get_2d_rotary_pos_embed_lumina(8, 16, 16)
    if kind == "ltx":
        angle = torch.arange(32)[None, :, None] * torch.tensor([1.0, 0.5, 0.25, 0.1]).repeat(4)
        return angle.cos(), angle.sin()
    return embeddings.get_1d_rotary_pos_embed(4, 5, use_real=True, repeat_interleave_real=False)
