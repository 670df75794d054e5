"""What a model gives at its second call, if all that is known of it is what its first call showed.

    python recipes/learning.py                          # the four bundled models without their calibrations
    python recipes/learning.py emoji-flux --samples 8

A copy of the model without its calibration draws one picture in full, from a seed that is not reported, and learns from
it (`calibration="auto"`). Then it draws the reporting seeds with budgets. Beside it, at equal numbers of full steps:
the sampler with so many steps, the copy without learning, and the model with the calibration that it ships with. PSNR
to the own full run of as many steps, median / 5th percentile in dB. The last row of each model is the default preset.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import speca
from speca.reports.comparison import psnr, quantile
from speca.reports.measure import Run, example_call, generate, joined, run_once, split
from speca.zoo import WEIGHTS, call_arguments, names, resolve

LEARNT_FROM = 700_123
BUDGETS = ((50, 16), (50, 10), (50, 7), (28, 9), (28, 7), (20, 7))


def without_calibration(model: str, folder: Path) -> Any:
    """Return a pipeline from a copy of a bundled model's folder that brings no calibration."""
    shutil.copytree(WEIGHTS / model, folder / model, ignore=shutil.ignore_patterns("speca.json"))
    pipe = resolve(str(folder / model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Bundled models; by default all.")] = None,
    samples: Annotated[int, typer.Option(help="Samples.", min=4)] = 32,
    seeds_from: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Samples in one call.", min=1)] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Run and print a table for each model."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", message="speca:")
    seeds = list(range(seeds_from, seeds_from + samples))
    for model in models or names():
        table = Table(
            "steps", "full", "fewer steps", "nothing known", "one run", "shipped", title=model, title_style=""
        )
        with tempfile.TemporaryDirectory() as made:
            os.environ["SPECA_CACHE"] = str(Path(made) / "cache")
            bare, shipped = without_calibration(model, Path(made)), resolve(model)
            shipped.set_progress_bar_config(disable=True)
            for steps in dict.fromkeys(steps for steps, _ in BUDGETS):
                call = {**call_arguments(model), **example_call(bare, seeds), "num_inference_steps": steps}
                first = {**call, **example_call(bare, [LEARNT_FROM])}
                full = plain(bare, call, seeds, batch)

                def quality(run: Run, full: Run = full) -> str:
                    values = psnr(run.images, full.images).tolist()
                    return f"{quantile(values, 0.5):.1f} / {quantile(values, 0.05):.1f}"

                for count in [c for s, c in BUDGETS if s == steps]:
                    config = speca.SpecaConfig.build("balanced", speedup=steps / count)
                    row = [quality(plain(bare, {**call, "num_inference_steps": count}, seeds, batch))]
                    row.append(quality(generate(bare, call, seeds, config, batch=batch, calibration=False)))
                    generate(bare, first, [LEARNT_FROM], config, calibration="auto")  # in full the first time
                    row.append(quality(generate(bare, call, seeds, config, batch=batch, calibration="auto")))
                    row.append(quality(generate(shipped, call, seeds, config, batch=batch)))
                    table.add_row(str(steps), str(count), *row)
                chosen = generate(bare, call, seeds, "balanced", batch=batch, calibration="auto")
                assert chosen.report is not None
                mean = sum(sample.full for sample in chosen.report.samples) / samples
                table.add_row(str(steps), f"balanced: {mean:.1f}", "", "", quality(chosen), "")
        Console(width=110).print(table)


def plain(pipe: Any, call: dict[str, Any], seeds: list[int], batch: int) -> Run:
    """Return the samples of runs without speca."""
    return joined([run_once(pipe, *part, None) for part in split(call, seeds, batch)])


if __name__ == "__main__":
    typer.run(main)
