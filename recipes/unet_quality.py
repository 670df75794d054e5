"""What `speca` gives a U-Net with stacked guidance, under two samplers, at two numbers of steps.

    python recipes/unet_quality.py --unmeasured                  # as for a model that nobody has calibrated
    python recipes/unet_quality.py --seeds-from 800000           # with the calibration beside the model

Each preset and budget stands beside a run of as many steps of the same sampler as it computed in full. PSNR is to the
sampler's own full run of as many steps; times are of whole calls of the pipeline, each timed next to a full one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import track
from rich.table import Table

from speca.bench.methods import fewer_steps, plain, solver, speca_with
from speca.bench.setup import Apply, Call
from speca.reports.comparison import psnr, quantile
from speca.reports.measure import Run, example_call, run_once
from speca.zoo import call_arguments, resolve

SAMPLERS = ("own", "DPMSolverMultistepScheduler")
SETTINGS = (("preset", "faithful"), ("preset", "balanced"), ("preset", "fast"), ("speedup", 3.0), ("speedup", 5.0))


@contextmanager
def sampled(pipe: DiffusionPipeline, call: Call, sampler: str) -> Iterator[None]:
    """Put another sampler into `pipe`."""
    with plain(pipe, call, None) if sampler == "own" else solver(sampler)(pipe, call, 0):
        yield


def made(pipe: DiffusionPipeline, call: Call, seeds: list[int], apply: Apply, value: Any) -> Run:
    """Return one timed call with the samples of `seeds`."""
    with apply(pipe, call, value) as setup:
        return run_once(pipe, setup.call, seeds, setup.session)


def main(
    model: Annotated[str, typer.Argument(help="A bundled model or a folder.")] = "emoji-unet",
    samples: Annotated[int, typer.Option(help="Samples, all in one call.", min=4)] = 16,
    seeds_from: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    steps: Annotated[list[int], typer.Option(help="Denoising steps.", min=10)] = [50, 28],  # noqa: B006
    unmeasured: Annotated[bool, typer.Option("--unmeasured", help="Ignore the calibration of the model.")] = False,
    rounds: Annotated[int, typer.Option(help="Pairs of timed calls.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Run and print a table: full steps, wall-clock ratio, PSNR as median / 5th percentile in dB."""
    torch.set_num_threads(threads)
    pipe = resolve(model)
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(seeds_from, seeds_from + samples))
    title = f"{model}, {samples} samples, seeds from {seeds_from}, {'nothing measured' if unmeasured else 'calibrated'}"
    table = Table("sampler", "steps", "setting", "full steps", "time", "PSNR", "as many steps", title=title)
    for sampler in SAMPLERS:
        for total in steps:
            call: Call = {**call_arguments(model), **example_call(pipe, seeds), "num_inference_steps": total}
            with sampled(pipe, call, sampler):
                name = type(pipe.scheduler).__name__.removesuffix("Scheduler")
                full = made(pipe, call, seeds, plain, None).images
                for knob, value in track(SETTINGS, description=f"{name}, {total} steps"):
                    apply = speca_with(knob, "balanced", measured=not unmeasured)
                    count, ratio, run = _timed(pipe, call, seeds, apply, value, rounds)
                    fewer = made(pipe, call, seeds, fewer_steps, max(1, round(count)))
                    quality = _decibels(run, full), _decibels(fewer, full)
                    table.add_row(name, str(total), f"{knob} {value}", f"{count:.1f}", f"{ratio:.2f}x less", *quality)
    Console(width=150).print(table)


def _timed(
    pipe: DiffusionPipeline, call: Call, seeds: list[int], apply: Apply, value: Any, rounds: int
) -> tuple[float, float, Run]:
    """Return full steps, median ratio of the seconds of a full call to the next one with `apply`, and the last run."""
    ratios = []
    for _ in range(rounds):
        before = made(pipe, call, seeds, plain, None)
        run = made(pipe, call, seeds, apply, value)
        ratios.append(before.seconds_total / run.seconds_total)
    assert run.report is not None
    return float(np.mean([s.full + s.rejected for s in run.report.samples])), float(np.median(ratios)), run


def _decibels(run: Run, full: torch.Tensor) -> str:
    values = psnr(run.images, full).tolist()
    return f"{float(np.median(values)):.1f} / {quantile(values, 0.05):.1f}"


if __name__ == "__main__":
    typer.run(main)
