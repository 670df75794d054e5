"""Quality of a method at a given speed, interpolated between the settings of its sweep, with bootstrap intervals."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

SPEEDS = (2.0, 3.0, 5.0, 7.0)
DRAWS = 2000


@dataclass(frozen=True)
class Point:
    """One setting: its measured speed and the quality (N,) of each sample, in the same order of seeds for all settings.

    `redrawn` holds bootstrap draws (DRAWS,) of the speed over rounds of timing; None if the speed is in FLOPs or only
    one round was timed.
    """

    speed: float
    values: tuple[float, ...]
    redrawn: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Reading:
    """Quality (N,) of each sample at a speed, and bootstrap draws (DRAWS, N) of it over rounds of timing, if timed.

    A draw is NaN if the speed lies outside its sweep; intervals ignore such draws.
    """

    values: Tensor
    redrawn: Tensor | None = None

    def others(self) -> Tensor:
        """Return the bootstrap draws of the quality (DRAWS, N), or the quality itself (1, N) if there are none."""
        return self.values[None] if self.redrawn is None else self.redrawn


def front(points: Sequence[Point]) -> list[Point]:
    """Return the Pareto front of a sweep by speed and median quality, slowest first.

    Settings are selected on the reporting seeds, which favours methods with many settings.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.speed, -_median(p))):
        if not best or _median(point) > _median(best[-1]):
            best.append(point)
    return best[::-1]


def at_speed(points: Sequence[Point], speed: float) -> Tensor | None:
    """Return the quality (N,) at `speed`, linear in log speed between neighbours on the front; None outside of it."""
    found = reading(points, speed, redraw=False)
    return None if found is None else found.values


def reading(points: Sequence[Point], speed: float, redraw: bool = True) -> Reading | None:
    """Return the quality as `at_speed` does; with `redraw`, also compute it for every bootstrap draw of the speeds."""
    if not points:
        return None
    ordered = sorted(points, key=lambda p: -_median(p))
    values = torch.stack([_values(p) for p in ordered])
    as_timed = _between(values, torch.tensor([[p.speed for p in ordered]], dtype=torch.float64), speed)[0]
    if as_timed.isnan().any():
        return None
    if not redraw or all(p.redrawn is None for p in ordered):
        return Reading(as_timed)
    speeds = [torch.full((DRAWS,), p.speed, dtype=torch.float64) if p.redrawn is None else p.redrawn for p in ordered]
    return Reading(as_timed, _between(values, torch.stack(speeds, 1), speed))


def _between(values: Tensor, speeds: Tensor, speed: float) -> Tensor:
    """Return qualities (D, N) at `speed` from qualities (S, N) of settings, best median first, and speeds (D, S)."""
    fastest = speeds.argsort(dim=1, descending=True, stable=True)
    median = values.quantile(0.5, dim=1)[fastest]
    best = torch.nn.functional.pad(median.cummax(1).values[:, :-1], (1, 0), value=-math.inf)
    ordered, kept = speeds.gather(1, fastest), median > best
    slower, faster = kept & (ordered <= speed), kept & (ordered >= speed)
    low = ordered.where(slower, 0.0).argmax(1, keepdim=True)
    high = ordered.where(faster, math.inf).argmin(1, keepdim=True)
    start, end = ordered.gather(1, low).log(), ordered.gather(1, high).log()
    share = torch.where(end > start, (math.log(speed) - start) / (end - start), 0.0)
    low, high = (fastest.gather(1, k).squeeze(1) for k in (low, high))
    read = torch.lerp(values[low], values[high], share)
    return read.where((slower.any(1) & faster.any(1))[:, None], math.nan)


def needed(points: Sequence[Point], target: float, q: float = 0.5) -> float | None:
    """Return the largest speed at which quantile `q` of the quality reaches `target`; None if no setting does."""
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


def median_interval(found: Reading, seed: int = 0) -> tuple[float, float, float]:
    """Return the median over samples with its 95 % bootstrap interval over samples and rounds of timing."""
    return float(found.values.quantile(0.5)), *_interval(_resampled(found.others(), seed).quantile(0.5, dim=1))


def paired_difference(one: Reading, other: Reading, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of `one - other` on the same seeds with its 95 % bootstrap interval over samples and rounds."""
    drawn = _resampled(one.others() - other.others(), seed).mean(1)
    return float((one.values - other.values).mean()), *_interval(drawn)


def redrawn(rounds: Mapping[tuple[str, Any], Sequence[float]], seed: int = 0) -> dict[tuple[str, Any], Tensor]:
    """Return bootstrap draws (DRAWS,) of the median over rounds for each (method, setting) of `rounds`.

    Load on the machine changes all times of a round together, so whole rounds are drawn: for each round of a method,
    draw a round of any method, and give each setting the deviation of some setting in that round. Deviations are pooled
    over methods, as a method timed once has none. Return an empty dict if no setting was timed twice.
    """
    off: dict[tuple[str, int], list[float]] = defaultdict(list)
    for (method, _), speeds in rounds.items():
        if (count := len(speeds)) > 1:
            logs = [math.log(s) for s in speeds]
            for number, value in enumerate(logs):  # deviations from a mean of few values are too small
                off[method, number].append((value - statistics.fmean(logs)) * math.sqrt(count / (count - 1)))
    if not off:
        return {}
    flat = torch.tensor([x for block in off.values() for x in block], dtype=torch.float64)
    size = torch.tensor([len(block) for block in off.values()])
    start, generator = size.cumsum(0) - size, torch.Generator().manual_seed(seed)
    found, picked = {}, {}
    for (method, setting), speeds in rounds.items():
        if method not in picked:
            longest = max(len(s) for (m, _), s in rounds.items() if m == method)
            picked[method] = torch.randint(len(size), (DRAWS, longest), generator=generator)
        at = picked[method][:, : len(speeds)]
        member = (torch.rand(at.shape, generator=generator) * size[at]).long()
        moved = flat[start[at] + member].quantile(0.5, dim=1).exp()
        found[method, setting] = statistics.median(speeds) * moved
    return found


def _median(point: Point) -> float:
    return statistics.median(point.values)


def _values(point: Point) -> Tensor:
    return torch.tensor(point.values, dtype=torch.float64)


def _resampled(values: Tensor, seed: int) -> Tensor:
    """Return (DRAWS, N) samples drawn with replacement from (DRAWS, N) or (1, N)."""
    count = values.shape[1]
    drawn = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(seed))
    return values.expand(DRAWS, count).gather(1, drawn)


def _interval(drawn: Tensor) -> tuple[float, float]:
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return low, high
