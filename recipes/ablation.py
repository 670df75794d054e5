"""What each part of the method is worth: one table, at about equal cost.

    python recipes/ablation.py fashion-dit --samples 32

PSNR of each sample to its own full run (median, 5th percentile, worst), full steps and FLOPs; no times. Rows
differ in one part each: the corrector, the planning, the last step, the order, the axis; the paper's rule and plain
periods stand beside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import speca
from speca.compare import psnr, quantile
from speca.measure import generate, joined, run_once, split
from speca.zoo import call_arguments, resolve

PROMPTS = ("a red apple", "a smiling face", "a small house", "a blue car", "a cat", "a tree", "a star", "a boat")
PERIOD = dict(controller="interval", warmup=3, final=1)
VERIFIED = dict(preset="paper", forecaster="newton", order=1, threshold_decay=1.0, final=1)

SETTINGS: dict[str, dict[str, Any]] = {
    "period of 4": dict(preset=speca.SpecaConfig(**PERIOD, max_draft=3)),
    "period of 5": dict(preset=speca.SpecaConfig(**PERIOD, max_draft=4)),
    "period of 6": dict(preset=speca.SpecaConfig(**PERIOD, max_draft=5)),
    "period of 5, corrected": dict(preset=speca.SpecaConfig(**PERIOD, max_draft=4, corrector=True)),
    "period of 6, corrected": dict(preset=speca.SpecaConfig(**PERIOD, max_draft=5, corrector=True)),
    "paper": dict(preset="paper"),
    "verified, order 1, tau 0.03": dict(**VERIFIED, threshold=0.03, min_draft=1, max_draft=4),
    "planned, not corrected, 0.01": dict(tolerance=0.01, corrector=False),
    "planned, not corrected, 0.02": dict(tolerance=0.02, corrector=False),
    "planned, corrected, 0.004 (faithful)": dict(preset="faithful"),
    "planned, corrected, 0.01 (balanced)": dict(preset="balanced"),
    "planned, corrected, 0.02 (fast)": dict(preset="fast"),
    "planned, corrected, 0.04": dict(tolerance=0.04),
    "0.01, last step full": dict(tolerance=0.01, final=1),
    "0.01, order 2": dict(tolerance=0.01, order=2, warmup=3),
    "0.01, taylor": dict(tolerance=0.01, forecaster="taylor"),
    "0.01, noise axis": dict(tolerance=0.01, axis="noise"),
    "speedup 3": dict(speedup=3.0),
    "speedup 4": dict(speedup=4.0),
    "speedup 5": dict(speedup=5.0),
    "speedup 7": dict(speedup=7.0),
}


def main(
    model: Annotated[str, typer.Argument(help="Bundled name or local folder.")] = "fashion-dit",
    samples: Annotated[int, typer.Option(help="Samples, on seeds from 0.", min=2)] = 32,
    first: Annotated[int, typer.Option(help="First seed; tuning seeds begin at 500000.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=8)] = 50,
    batch: Annotated[int, typer.Option(help="Samples in one call.", min=1)] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("docs/results"),
) -> None:
    """Run every row and print the table."""
    torch.set_num_threads(threads)
    pipe = resolve(model)
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(first, first + samples))
    call: dict[str, Any] = {**call_arguments(model), "num_inference_steps": steps}
    if hasattr(pipe, "labels"):
        call["class_labels"] = [s % len(pipe.labels) for s in seeds]
    else:
        call["prompt"] = [PROMPTS[s % len(PROMPTS)] for s in seeds]
    full = joined([run_once(pipe, *part, None) for part in split(call, seeds, batch)]).images
    rows = []
    for name, settings in track(SETTINGS.items(), description="settings"):
        made = generate(pipe, call, seeds, speca.SpecaConfig.build(**_base(settings)), batch=batch)
        assert made.report is not None
        spent = [s.full + s.rejected for s in made.report.samples]
        values = psnr(made.images, full).tolist()
        rows.append(
            dict(name=name, flops_speedup=made.report.flops_speedup, full_steps=spent, psnr=values)
            | {k: quantile(values, q) for k, q in (("median", 0.5), ("p5", 0.05), ("worst", 0.0))}
        )
    out.mkdir(parents=True, exist_ok=True)
    place = out / f"ablation-{Path(model).name}.json"
    place.write_text(json.dumps(dict(model=model, seeds=seeds, steps=steps, rows=rows)) + "\n")
    show(rows)


def _base(settings: dict[str, Any]) -> dict[str, Any]:
    rest = dict(settings)
    return {"base": rest.pop("preset", "balanced"), **rest}


def show(rows: list[dict[str, Any]]) -> None:
    """The table on the terminal."""
    table = Table("setting", "FLOPs", "full steps", "median dB", "P5", "worst")
    for r in rows:
        spent = r["full_steps"]
        share = f"{sum(spent) / len(spent):.1f} ({min(spent)} to {max(spent)})"
        quality = (f"{r[k]:.2f}" for k in ("median", "p5", "worst"))
        table.add_row(r["name"], f"{r['flops_speedup']:.2f}x", share, *quality)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
