"""Is a sampler that remembers its outputs accelerated as well as one that does not?

    python recipes/samplers.py fashion-dit --samples 32

DPM-Solver++ and UniPC mix in outputs of earlier steps. The reference is each sampler's own run of as many steps. At
equal numbers of full steps stand fewer steps of the sampler itself, even periods of order-1 drafts, an even budget
with and without the corrector, and the budget placed by the prior that the model comes with, which was measured with
the model's own sampler.
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

from speca.bench.methods import fewer_steps, plain, scheduled, solver, speca_with
from speca.bench.recording import uniform_schedule
from speca.bench.setup import Call
from speca.reports.comparison import psnr, quantile
from speca.reports.measure import Run, example_call, joined, run_once, split
from speca.zoo import call_arguments, resolve

SAMPLERS = ("own", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
METHODS = ("fewer steps", "even periods, order 1", "even budget, not corrected", "even budget", "budget and prior")


@contextmanager
def sampled(pipe: DiffusionPipeline, call: Call, sampler: str) -> Iterator[None]:
    """`pipe` with another sampler inside."""
    with solver(sampler)(pipe, call, 0) if sampler != "own" else plain(pipe, call, None):
        yield


def made(pipe: DiffusionPipeline, call: Call, seeds: list[int], batch: int, method: str, full: int) -> Run:
    """The samples of `seeds` by a method that computes `full` steps."""
    steps = call["num_inference_steps"]
    budget = dict(tolerance=0.0)
    even = dict(**budget, measured=False, prior="none")
    apply, value = {
        "": (plain, None),
        "fewer steps": (fewer_steps, full),
        "even periods, order 1": (scheduled(corrector=False), uniform_schedule(steps, full)),
        "even budget, not corrected": (
            speca_with("speedup", "balanced", corrector=False, **even), steps / full
        ),
        "even budget": (speca_with("speedup", "balanced", **even), steps / full),
        "budget and prior": (speca_with("speedup", "balanced", **budget), steps / full),
    }[method]  # fmt: skip
    with apply(pipe, call, value) as setup:
        return joined([run_once(pipe, *part, setup.session) for part in split(setup.call, seeds, batch)])


def main(
    model: Annotated[str, typer.Argument(help="A bundled model.")] = "fashion-dit",
    samples: Annotated[int, typer.Option(help="Samples, of seeds from 0.", min=4)] = 32,
    steps: Annotated[list[int], typer.Option(help="Denoising steps.", min=10)] = [50, 25],  # noqa: B006
    ratios: Annotated[list[float], typer.Option(help="Steps over full steps.", min=1)] = [3, 5],  # noqa: B006
    batch: Annotated[int, typer.Option(help="Samples in one call.", min=1)] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Run and print a table: PSNR to the sampler's own full run, median / 5th percentile in dB."""
    torch.set_num_threads(threads)
    pipe = resolve(model)
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(samples))
    table = Table("steps", "full", *SAMPLERS, title=f"{model}, {samples} samples", title_style="")
    for total in steps:
        call: Call = {**call_arguments(model), **example_call(pipe, seeds), "num_inference_steps": total}
        found: dict[tuple[str, int, str], str] = {}
        counts = sorted({int(total / ratio) for ratio in ratios}, reverse=True)
        for sampler in track(SAMPLERS, description=f"{model}, {total} steps"):
            with sampled(pipe, call, sampler):
                full = made(pipe, call, seeds, batch, "", total).images
                for method in METHODS:
                    for count in counts:
                        run = made(pipe, call, seeds, batch, method, count)
                        _demand(run, method, count)
                        values: Any = psnr(run.images, full)
                        low = quantile(values.tolist(), 0.05)
                        found[method, count, sampler] = f"{float(np.median(values)):.1f} / {low:.1f}"
        for count in counts:
            for method in METHODS:
                table.add_row(str(total), f"{count}, {method}", *(found[method, count, s] for s in SAMPLERS))
    Console(width=150).print(table)


def _demand(run: Run, method: str, count: int) -> None:
    spent = {s.full + s.rejected for s in run.report.samples} if run.report else {count}
    if spent != {count}:
        raise AssertionError(f"{method} computed {spent} steps instead of {count}")


if __name__ == "__main__":
    typer.run(main)
