"""What a method gives at a speed fixed beforehand: read between neighbours of its own sweep, with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SPEEDS = (2.0, 3.0, 5.0, 7.0)
DRAWS = 2000


@dataclass(frozen=True)
class Point:
    """One setting: its realised speed, and the quality (N,) of each sample, seeds in the same order everywhere."""

    speed: float
    values: tuple[float, ...]


def front(points: Sequence[Point]) -> list[Point]:
    """The best settings of one sweep, slowest first: none other is both faster and, at the median, better.

    For all methods alike, so each is seen at its best swept settings; that they are picked on the reporting seeds is in
    favour of methods with many knobs.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speed, -_median(p))):
        if not best or _median(point) > _median(best[-1]):
            best.append(point)
    return best[::-1]


def at_speed(points: Sequence[Point], speed: float) -> Tensor | None:
    """Quality (N,) at `speed`, linear in log speed between two neighbours of the front of one sweep; None outside."""
    ordered = front(points)
    for low, high in pairwise(ordered):
        if low.speed <= speed <= high.speed:
            width = math.log(high.speed / low.speed)
            share = math.log(speed / low.speed) / width if width else 0.0
            return torch.lerp(_values(low), _values(high), share)
    return None


def needed(points: Sequence[Point], target: float, q: float = 0.5) -> float | None:
    """The largest speed at which quantile `q` of the quality still reaches `target`; None if no setting does."""
    ordered = front(points)
    best = None
    for low, high in pairwise(ordered):
        a, b = (_values(p).quantile(q).item() for p in (low, high))
        if a >= target:
            share = 1.0 if b >= target else (a - target) / (a - b)
            best = low.speed * (high.speed / low.speed) ** share
    if best is None and ordered and _values(ordered[0]).quantile(q).item() >= target:
        best = ordered[0].speed
    return best


def median_interval(values: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Median of `values` (N,) with its 95 % bootstrap interval."""
    drawn = values[_draws(len(values), seed)].quantile(0.5, dim=1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return float(values.quantile(0.5)), low, high


def paired_difference(one: Tensor, other: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `one - other`, both (N,) over the same seeds, with its 95 % bootstrap interval."""
    gaps = one - other
    drawn = gaps[_draws(len(gaps), seed)].mean(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=gaps.dtype)).tolist()
    return float(gaps.mean()), low, high


def _median(point: Point) -> float:
    return statistics.median(point.values)


def _values(point: Point) -> Tensor:
    return torch.tensor(point.values, dtype=torch.float64)


def _draws(count: int, seed: int) -> Tensor:
    return torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(seed))
