"""What can be had with few full steps, by whom: the question of whoever runs 20 to 28 steps.

    python recipes/few_steps.py emoji-flux                       # reporting seeds
    python recipes/few_steps.py emoji-flux --seeds-from 800000

At equal numbers of full steps stand fewer steps of the model's own sampler and of UniPC, and budgets of `speca`: with
polynomials (the default for a model that nobody has measured), placed by the generic prior, and by the measured one.
Then what the presets give a model that nobody has measured, which plan each sample's drafts by its own errors.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from speca.bench.methods import fewer_steps, plain, solver, speca_with
from speca.bench.setup import Apply, Call
from speca.reports.comparison import psnr, quantile
from speca.reports.measure import Run, example_call, joined, run_once, split
from speca.zoo import call_arguments, resolve

COUNTS = (4, 5, 6, 7, 9)
METHODS: dict[str, tuple[Apply, bool]] = {
    "fewer steps": (fewer_steps, False),
    "UniPC": (solver("UniPCMultistepScheduler"), False),
    "polynomials": (speca_with("speedup", "balanced", measured=False, prior="none"), True),
    "generic prior": (speca_with("speedup", "balanced", measured=False, prior="generic"), True),
    "measured prior": (speca_with("speedup", "balanced"), True),
}
"""How a method is put on a pipeline, and whether its knob is a speed-up instead of a number of steps."""


PRESETS = ("faithful", "balanced", "fast")


def main(
    model: Annotated[str, typer.Argument(help="A bundled model.")] = "emoji-flux",
    samples: Annotated[int, typer.Option(help="Samples.", min=4)] = 32,
    seeds_from: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    steps: Annotated[list[int], typer.Option(help="Denoising steps.", min=10)] = [28],  # noqa: B006
    batch: Annotated[int, typer.Option(help="Samples in one call.", min=1)] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Run and print a table: PSNR to the own full run of as many steps, median / 5th percentile in dB."""
    torch.set_num_threads(threads)
    pipe = resolve(model)
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(seeds_from, seeds_from + samples))
    table = Table("steps", "full", *METHODS, title=f"{model}, seeds from {seeds_from}", title_style="")
    unmeasured = Table("steps", "preset, nothing measured", "full steps", "FLOPs", "PSNR", title_style="")
    for total in steps:
        call: Call = {**call_arguments(model), **example_call(pipe, seeds), "num_inference_steps": total}

        def made(apply: Apply, value: Any, call: Call = call) -> Run:
            with apply(pipe, call, value) as setup:
                return joined([run_once(pipe, *part, setup.session) for part in split(setup.call, seeds, batch)])

        full = made(plain, None).images
        for count in track(COUNTS, description=f"{model}, {total} steps"):
            cells = []
            for apply, is_speed in METHODS.values():
                cells.append(_decibels(made(apply, total / count if is_speed else count), full))
            table.add_row(str(total), str(count), *cells)
        for preset in PRESETS:
            run = made(speca_with("preset", measured=False), preset)
            assert run.report is not None
            steps_in_full = float(np.mean([s.full + s.rejected for s in run.report.samples]))
            spent = f"{steps_in_full:.1f}", f"{run.report.flops_speedup:.2f}x"
            unmeasured.add_row(str(total), preset, *spent, _decibels(run, full))
    Console(width=140).print(table, unmeasured)


def _decibels(run: Run, full: torch.Tensor) -> str:
    values = psnr(run.images, full).tolist()
    return f"{float(np.median(values)):.1f} / {quantile(values, 0.05):.1f}"


if __name__ == "__main__":
    typer.run(main)
