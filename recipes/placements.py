"""Placements that are expected to be equally good: are they, and do other seeds agree?

    python recipes/placements.py emoji-video --full 10 --samples 32

What a prior expects of a placement leaves out how outputs answer to a sample that is off. Each placement of the
shortlist is run on two disjoint sets of seeds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from speca import SpecaConfig
from speca.calibration import Calibration
from speca.core.placement import shortlist
from speca.reports.comparison import psnr, quantile
from speca.reports.measure import example_call, generate, joined, run_once, split
from speca.sampler.scheduler import scheduler_response
from speca.zoo import call_arguments, resolve

FIRST_SEEDS = (800_000, 900_000)


def main(
    model: Annotated[str, typer.Argument(help="A bundled model.")] = "emoji-video",
    full: Annotated[list[int], typer.Option(help="Full steps, of 50.", min=4)] = [10],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Samples of each set.", min=4)] = 32,
    batch: Annotated[int, typer.Option(help="Samples in one call.", min=1)] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Run and print a table: mean PSNR to the own full run, median / 5th percentile, of each set."""
    torch.set_num_threads(threads)
    pipe: Any = resolve(model)
    pipe.set_progress_bar_config(disable=True)
    known = Calibration.beside(pipe)
    assert known is not None
    sets = []
    for first in FIRST_SEEDS:
        seeds = list(range(first, first + samples))
        call = {**call_arguments(model), **example_call(pipe, seeds), "num_inference_steps": 50}
        sets.append((call, seeds, joined([run_once(pipe, *part, None) for part in split(call, seeds, batch)]).images))
    steps = scheduler_response(pipe.scheduler).transitions
    prior = replace(known.prior, placed={})
    table = Table("full steps", "expected", *(f"seeds from {first}" for first in FIRST_SEEDS), title=model)
    options = [(count, option) for count in full for option in shortlist(prior, steps, count)]
    for count, option in track(options, description=model):
        config = SpecaConfig.build(speedup=50 / count, tolerance=0.0)
        placed, cells = replace(prior, placed={count: option.steps}), []
        for call, seeds, wanted in sets:
            made = generate(pipe, call, seeds, config, batch=batch, calibration=placed)
            values = psnr(made.images, wanted).tolist()
            cells.append(f"{np.mean(values):.1f}, {quantile(values, 0.5):.1f} / {quantile(values, 0.05):.1f}")
        table.add_row(" ".join(map(str, option.steps)), f"{option.error:.4f}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
