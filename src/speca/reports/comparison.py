"""Run the same seeds with and without acceleration; compare FLOPs, time and quality, and draw both."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..calibration.file import Calibration
from ..config import MIN_STEPS, PRESETS, Config, SpecaConfig
from ..diffusers.enable import enabled
from ..errors import InputError
from .measure import Run, Ticker, joined, run_once, split, steps_of, ticking
from .pictures import MOST_SAMPLES, draw_grid
from .report import Report

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# ------------------------------------------------------------------------------------------------ quality
def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each sample, (B,) float64; infinite for identical samples.

    Both are (B, ...) floats of data range 1. Raises InputError for integers (differences of uint8 would wrap
    around) and for unequal shapes.
    """
    if not (images.is_floating_point() and references.is_floating_point()):
        kinds = f"{images.dtype} and {references.dtype}"
        raise InputError(f"PSNR takes floats in [0, 1], not {kinds}; divide uint8 by 255 first.")
    if images.shape != references.shape:
        raise InputError(f"PSNR compares equal shapes, not {tuple(images.shape)} and {tuple(references.shape)}.")
    squares = (images.double() - references.double()).square()
    return -10 * squares.flatten(1).mean(1).log10()


def quantile(values: Iterable[float], q: float) -> float:
    """Return quantile `q` of `values`, interpolated linearly; next to an infinite value, the finite neighbour."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    share = position - low
    if share == 0 or math.isinf(ordered[low + 1]):
        return ordered[low]
    return ordered[low] + share * (ordered[low + 1] - ordered[low])


# ------------------------------------------------------------------------------------------------ result
@dataclass(frozen=True)
class Comparison:
    """Two runs over the same seeds. `model`, `command` and `captions` (one a sample) only label the results."""

    full: Run
    speca: Run
    report: Report  # of the accelerated run, all samples
    seeds: tuple[int, ...]
    preset: str  # "custom" if the configuration equals no preset
    psnr: tuple[float, ...] = field(init=False)  # dB of each sample, infinite if identical
    model: str = ""
    command: str = ""
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "psnr", tuple(psnr(self.speca.images, self.full.images).tolist()))

    @property
    def wall_speedup(self) -> float:
        """Return the speed-up of the time spent in the transformer."""
        return self.full.seconds / self.speca.seconds

    @property
    def wall_speedup_total(self) -> float:
        """Return the speed-up of the time of the whole pipeline."""
        return self.full.seconds_total / self.speca.seconds_total

    @property
    def saved_wall_share(self) -> float | None:
        """Return the saved share of transformer time over the saved share of FLOPs; None if no FLOPs are saved."""
        saved = 1 - 1 / self.report.flops_speedup
        return (1 - 1 / self.wall_speedup) / saved if saved > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON. A PSNR of null means identical to the full run (infinite), never unknown."""
        samples = [
            {
                "seed": seed,
                "full": sample.full,
                "accepted": sample.accepted,
                "rejected": sample.rejected,
                "psnr": _finite(value),
                "decisions": sample.decisions,
            }
            for seed, sample, value in zip(self.seeds, self.report.samples, self.psnr, strict=True)
        ]
        return {
            "model": self.model or self.report.model,
            "preset": self.preset,
            "config": self.report.config,
            "steps": self.report.steps,
            "seeds": list(self.seeds),
            "flops_speedup": self.report.flops_speedup,
            "wall_speedup": self.wall_speedup,
            "wall_speedup_total": self.wall_speedup_total,
            "saved_wall_share": self.saved_wall_share,
            "psnr_median": _finite(quantile(self.psnr, 0.5)),
            "psnr_p5": _finite(quantile(self.psnr, 0.05)),
            "identical": sum(map(math.isinf, self.psnr)),
            "seconds": {"full": self.full.seconds, "speca": self.speca.seconds},
            "seconds_total": {"full": self.full.seconds_total, "speca": self.speca.seconds_total},
            "bytes_per_sample": self.report.bytes_per_sample,
            "notes": list(self.report.notes),
            "hardware": self.full.hardware,
            "command": self.command,
            "samples": samples,
        }

    def to_json(self) -> str:
        """Return `to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def grid(self, path: str | Path) -> None:
        """Write the PNG: full above, SpeCa below, their amplified difference below that; at most 64 samples."""
        captions = self.captions or tuple(f"seed {seed}" for seed in self.seeds)
        lines = [f"{text}\n{decibels(value)}" for text, value in zip(captions, self.psnr, strict=True)]
        title = (
            f"{self.model or self.report.model}, {self.preset}: {self.report.flops_speedup:.2f}x fewer FLOPs, "
            f"transformer at {self.wall_speedup:.2f}x the speed"
        )
        shown = f" · first {MOST_SAMPLES} of {len(self.seeds)} samples" if len(self.seeds) > MOST_SAMPLES else ""
        subtitle = (
            f"{self.report.steps} steps · PSNR to the full run: median {decibels(quantile(self.psnr, 0.5))}, "
            f"5th percentile {decibels(quantile(self.psnr, 0.05))}{shown}"
        )
        draw_grid(self.full.images, self.speca.images, lines, title, subtitle).save(path)


def decibels(value: float | None) -> str:
    """Format a PSNR; infinite (or None, as in JSON) is "identical"."""
    return "identical" if value is None or math.isinf(value) else f"{value:.1f} dB"


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


# ------------------------------------------------------------------------------------------------ measuring
def compare(
    pipe: DiffusionPipeline,
    call_kwargs: dict[str, Any],
    seeds: Sequence[int],
    config: Config | str = "balanced",
    *,
    repeats: int = 1,
    batch: int = 16,
    progress: Ticker | None = None,
    **how: Any,
) -> Comparison:
    """Make the same samples without and with acceleration, and measure both; arguments as in `measure.generate`.

    Calls alternate in order (off, on, then on, off, and so on), so that changes of the machine's speed affect both. A
    short call of each kind comes first and is not timed. Times are medians over `repeats`. The self-test, once for
    each batch size, is included in the accelerated figures. With `calibration="auto"` a sample of another seed is drawn
    before, so that a model that nothing is known of is not measured while it is learnt from.
    """
    settings, how = SpecaConfig.build(config), {"calibration": None, **how}
    chunks, steps = split(call_kwargs, seeds, batch), steps_of(pipe, call_kwargs)

    passes: dict[bool, list[Run]] = {False: [], True: []}
    total = 2 * (MIN_STEPS + repeats * len(chunks) * steps)
    with ticking(pipe, progress, total), enabled(pipe, settings, **how) as session:

        def run(call: dict[str, Any], some: list[int], accelerated: bool) -> Run:
            with nullcontext() if accelerated else session.paused():
                return run_once(pipe, call, some, session if accelerated else None)

        for accelerated in (False, True):
            call, some = chunks[0]
            run({**call, "num_inference_steps": MIN_STEPS}, some, accelerated)
        if how["calibration"] == "auto" and Calibration.beside(pipe) is None:
            alone, _ = split(call_kwargs, seeds, 1)[0]
            run(alone, [max(seeds) + 1], True)
        for repeat in range(repeats):
            runs: dict[bool, list[Run]] = {False: [], True: []}
            for index, chunk in enumerate(chunks):
                first = (repeat + index) % 2 == 1
                for accelerated in (first, not first):
                    runs[accelerated].append(run(*chunk, accelerated))
            for accelerated, calls in runs.items():
                passes[accelerated].append(joined(calls))
    full, speca = _typical(passes[False]), _typical(passes[True])
    assert speca.report is not None
    preset = next((name for name, preset in PRESETS.items() if preset == settings), "custom")
    return Comparison(full, speca, speca.report, tuple(seeds), preset)


def _typical(passes: list[Run]) -> Run:
    """Return the first pass with median times; all passes make the same images."""
    return replace(
        passes[0],
        seconds=statistics.median(run.seconds for run in passes),
        seconds_total=statistics.median(run.seconds_total for run in passes),
    )
