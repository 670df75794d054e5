"""Sweep settings of checked drafts on tuning seeds: how the numbers of those in `speca/config.py` were chosen.

    python recipes/tune_presets.py --model fashion-dit --samples 32

Quality and FLOPs only, no times: PSNR of each image to its own full run, median and 5th percentile, against the
realised FLOPs speed-up. Tuning seeds begin at 500000; reported figures use seeds from 0.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

import speca
from speca.reports.comparison import psnr, quantile
from speca.zoo import resolve

FIRST_SEED = 500_000
GRID: dict[str, list[Any]] = {
    "max_draft": [2, 3, 4, 5, 6, 8],
    "min_draft": [0, 1, 2],
    "threshold": [0.015, 0.02, 0.03, 0.04, 0.05, 1e9],  # the last one rejects nothing
}


def main(
    model: Annotated[str, typer.Option(help="Bundled name, local folder or hub id.")] = "fashion-dit",
    samples: Annotated[int, typer.Option(help="Tuning samples.", min=4)] = 32,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=8)] = 50,
    forecaster: Annotated[str, typer.Option(help="taylor, newton, hermite or reuse.")] = "newton",
    order: Annotated[int, typer.Option(help="Order of the forecaster, 0 to 2.", min=0, max=2)] = 1,
    out: Annotated[Path, typer.Option(help="JSON lines are appended here.")] = Path("recipes/_work/tune.jsonl"),
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Print the settings nobody beats in both speed and 5th percentile."""
    torch.set_num_threads(threads)
    pipe = resolve(model)
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(FIRST_SEED + i) for i in range(samples)]
        labels = [i % 10 for i in range(samples)]
        images = pipe(class_labels=labels, generator=seeds, num_inference_steps=steps, output_type="np").images
        return torch.as_tensor(images)

    full = run()
    rows: list[dict[str, Any]] = []
    fixed: dict[str, Any] = dict(forecaster=forecaster, order=order, threshold_decay=1.0, warmup=3, final=1)
    for values_of in track(list(itertools.product(*GRID.values())), description="settings"):
        settings = {**fixed, **dict(zip(GRID, values_of, strict=True))}
        with speca.enabled(pipe, speca.VerifiedConfig(**settings), calibration=None) as session:
            images = run()
        values = psnr(images, full).tolist()
        report = session.report()
        row = {**settings, "flops_speedup": report.flops_speedup, "rejected": sum(s.rejected for s in report.samples)}
        rows.append({**row, "psnr_median": quantile(values, 0.5), "psnr_p5": quantile(values, 0.05)})
        with out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    console = Console(width=140)
    for row in sorted(rows, key=lambda r: -r["flops_speedup"]):
        beaten = any(o["flops_speedup"] > row["flops_speedup"] and o["psnr_p5"] > row["psnr_p5"] for o in rows)
        if not beaten:
            console.print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    typer.run(main)
