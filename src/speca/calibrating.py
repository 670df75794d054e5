"""calibrate: the loosest tolerance that meets a quality, found on tuning seeds and tried on fresh ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .calibration import Calibration, Trial
from .compare import psnr, quantile
from .config import SpecaConfig
from .errors import InputError
from .measure import example_call, generate, joined, run_once, split, steps_of
from .pipeline import transformers_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Progress = Callable[[str], None]
"""Told in words what comes next."""

TIGHTEST, LOOSEST, FACTOR = 0.0005, 0.5, 2.0
TUNING_SEED, FRESH_SEED = 600_000, 700_000


def calibrate(
    pipe: DiffusionPipeline,
    call_kwargs: dict[str, Any] | None = None,
    *,
    target_psnr: float = 35.0,
    samples: int = 32,
    confidence: float = 0.9,
    batch: int = 16,
    progress: Progress | None = None,
) -> Calibration:
    """Find the loosest tolerance at which samples stay within `target_psnr` dB of their own full run.

        calibration = speca.calibrate(pipe, target_psnr=35)
        calibration.save("flux-35.json")
        speca.enable(pipe, calibration="flux-35.json")

    Tolerances are tried from tight to loose, each twice the one before, until one fails; the last step is halved once
    more. One passes if the k-th smallest PSNR of its n samples meets the target, `k = floor((n + 1) (1 - confidence))`:
    the bound of split conformal prediction, which a fresh sample meets with this confidence, whatever the distribution.
    As the best of several is taken, it is then tried on as many fresh seeds, and what those gave is reported.

    Args:
        pipe: a pipeline whose sampler is linear; others have no estimate to plan by.
        call_kwargs: its arguments; lists with one entry a sample hold `2 * samples` of them, the second half for the
            fresh seeds. By default its classes, or a few plain prompts, in turn, and the pipeline's own steps.
        target_psnr: in dB, above 0.
        samples: number of tuning seeds, and of fresh ones; `1 / (1 - confidence) - 1` or more.
        confidence: share of fresh samples that are to meet the target, in (0, 1).
        batch: samples in one call.

    Raises:
        InputError: a value out of range, the sampler is not linear, or the tightest tolerance misses the target.
    """
    least = math.ceil(1 / (1 - confidence) - 1 - 1e-9) if 0 < confidence < 1 else 0
    if not least or target_psnr <= 0 or samples < least:
        raise InputError(
            f"calibrate needs a target above 0 dB, a confidence between 0 and 1 and, at {confidence}, at least {least} "
            f"samples; got {target_psnr} dB and {samples} samples."
        )
    seeds = [*range(TUNING_SEED, TUNING_SEED + samples), *range(FRESH_SEED, FRESH_SEED + samples)]
    call = call_kwargs if call_kwargs is not None else example_call(pipe, seeds)
    tuning, fresh = (
        _Half(pipe, *part, name, min(batch, samples), confidence, progress)
        for part, name in zip(split(call, seeds, samples), ("tuning", "fresh"), strict=True)
    )
    trials = _search(tuning.attempt, target_psnr)
    best = max((t for t in trials if t.bound >= target_psnr), key=lambda t: t.tolerance, default=None)
    if best is None:
        raise InputError(
            f"the tightest tolerance, {TIGHTEST}, gives {trials[0].bound:.1f} dB, not {target_psnr:g}; ask for less."
        )
    trial = fresh.attempt(best.tolerance)
    met = sum(value >= target_psnr for value in fresh.values)
    low, high = wilson(met, samples)
    return Calibration(
        model=type(transformers_of(pipe)[0]).__name__, scheduler=type(pipe.scheduler).__name__,
        steps=steps_of(pipe, call), target_psnr=target_psnr, confidence=confidence, tolerance=best.tolerance,
        speedup=trial.speedup, fresh_median=trial.median, fresh_p5=trial.p5, fresh_met=met / samples, fresh_low=low,
        fresh_high=high, tuning_seeds=(TUNING_SEED, samples), fresh_seeds=(FRESH_SEED, samples), trials=tuple(trials),
    )  # fmt: skip


@dataclass
class _Half:
    """The tuning seeds or the fresh ones: their full run, and the PSNR of each sample in the last attempt."""

    pipe: DiffusionPipeline
    call: dict[str, Any]
    seeds: list[int]
    name: str
    batch: int
    confidence: float
    progress: Progress | None
    values: list[float] = field(default_factory=list)

    @cached_property
    def full(self) -> Tensor:
        """Pictures of the run without acceleration."""
        self._tell(f"full run on {self.name} seeds")
        return joined([run_once(self.pipe, *part, None) for part in split(self.call, self.seeds, self.batch)]).images

    def attempt(self, tolerance: float) -> Trial:
        """What `tolerance` gives; InputError where nothing can be planned by it."""
        full = self.full
        self._tell(f"tolerance {tolerance:.4g} on {self.name} seeds")
        made = generate(self.pipe, self.call, self.seeds, SpecaConfig.build(tolerance=tolerance), batch=self.batch)
        assert made.report is not None
        if reasons := [note for note in made.report.notes if "nothing is corrected" in note]:
            raise InputError(f"there is nothing to calibrate: {reasons[0]} Use a linear sampler, such as flow Euler.")
        self.values = psnr(made.images, full).tolist()
        k = math.floor((len(self.values) + 1) * (1 - self.confidence) + 1e-9)
        median, p5 = quantile(self.values, 0.5), quantile(self.values, 0.05)
        return Trial(tolerance, made.report.flops_speedup, median, p5, sorted(self.values)[k - 1])

    def _tell(self, words: str) -> None:
        if self.progress:
            self.progress(words)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `hits` in `count` (Wilson, 1927)."""
    z, share = 1.959964, hits / count
    middle = share + z * z / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return min(share, max(0.0, (middle - width) / scale)), max(share, min(1.0, (middle + width) / scale))


def _search(attempt: Callable[[float], Trial], target: float) -> list[Trial]:
    """Trials from tight to loose, up to the first that fails, and one between it and the last that passed."""
    trials, tolerance = [attempt(TIGHTEST)], TIGHTEST
    while trials[-1].bound >= target and tolerance * FACTOR <= LOOSEST:
        tolerance *= FACTOR
        trials.append(attempt(tolerance))
    if len(trials) > 1 and trials[-1].bound < target:
        trials.append(attempt(tolerance / math.sqrt(FACTOR)))
    return trials
