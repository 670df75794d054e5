"""What each part of the method is worth: one table, at about equal cost.

    python recipes/ablation.py fashion-dit --samples 32

PSNR of each sample to its own full run (median, 5th percentile, worst), full steps and FLOPs; no times. Rows
differ in one part each: the corrector, the planning, the order, the prior's weights, its placement, the last step; the
paper's rule and plain periods of forecast features stand beside.
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
from speca.calibration import Calibration
from speca.core.placement import place
from speca.reports.comparison import psnr, quantile
from speca.reports.measure import example_call, generate, joined, run_once, split
from speca.sampler.scheduler import scheduler_response
from speca.zoo import call_arguments, resolve

PERIOD = speca.VerifiedConfig(rule="interval", warmup=3, final=1)
VERIFIED = dict(preset="paper", forecaster="newton", order=1, threshold_decay=1.0, final=1)
BARE: dict[str, Any] = dict(prior="none")  # polynomials, and neither a measured prior nor the generic one
UNMEASURED: dict[str, Any] = dict(calibration=False, prior="generic")  # the generic prior in place of the measured one
PLACED = "placed"
"""Stands for the prior's placement of `steps / speedup` full steps, to be used in other ways."""

SETTINGS: dict[str, dict[str, Any]] = {
    "period of 4": dict(preset=PERIOD, max_draft=3),
    "period of 5": dict(preset=PERIOD, max_draft=4),
    "period of 6": dict(preset=PERIOD, max_draft=5),
    "period of 5, corrected": dict(period=5, **BARE),
    "period of 6, corrected": dict(period=6, **BARE),
    "paper": dict(preset="paper"),
    "verified, order 1, tau 0.03": dict(**VERIFIED, threshold=0.03, min_draft=1, max_draft=4),
    "planned, not corrected, 0.01": dict(tolerance=0.01, corrector=False, **BARE),
    "planned, 0.004": dict(tolerance=0.004, **BARE),
    "planned, 0.01": dict(tolerance=0.01, **BARE),
    "planned, 0.02": dict(tolerance=0.02, **BARE),
    "planned, 0.04": dict(tolerance=0.04, **BARE),
    "planned, 0.01, order 2": dict(tolerance=0.01, order=2, **BARE),
    "speedup 3, no prior": dict(speedup=3.0, **BARE),
    "speedup 5, no prior": dict(speedup=5.0, **BARE),
    "speedup 7, no prior": dict(speedup=7.0, **BARE),
    "planned, 0.01, generic prior": dict(tolerance=0.01, **UNMEASURED),
    "speedup 3, generic prior": dict(speedup=3.0, **UNMEASURED),
    "speedup 5, generic prior": dict(speedup=5.0, **UNMEASURED),
    "speedup 7, generic prior": dict(speedup=7.0, **UNMEASURED),
    "5x, even steps, polynomial": dict(speedup=5.0, schedule="even", **BARE),
    "5x, even steps, prior's weights": dict(speedup=5.0, schedule="even"),
    "5x, placed, polynomial": dict(speedup=5.0, schedule=PLACED, **BARE),
    "5x, placed, prior, last step full": dict(speedup=5.0, schedule=PLACED, last=True),
    "speedup 3": dict(speedup=3.0),
    "speedup 4": dict(speedup=4.0),
    "speedup 5": dict(speedup=5.0),
    "speedup 7": dict(speedup=7.0),
    "faithful": dict(preset="faithful"),
    "balanced": dict(preset="balanced"),
    "fast": dict(preset="fast"),
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
    call |= example_call(pipe, seeds)
    full = joined([run_once(pipe, *part, None) for part in split(call, seeds, batch)]).images
    rows = []
    for name, settings in track(SETTINGS.items(), description="settings"):
        made = generate(pipe, call, seeds, batch=batch, **_how(pipe, settings, steps))
        assert made.report is not None
        rows.append(row_of(name, made.report, psnr(made.images, full).tolist()))
    show(rows, out / f"ablation-{Path(model).name}.json", model=model, seeds=seeds, steps=steps)


def row_of(name: str, report: speca.Report, values: list[float]) -> dict[str, Any]:
    """What a setting cost, and the PSNR of each sample."""
    spent = [s.full + s.rejected for s in report.samples]
    quality = {k: quantile(values, q) for k, q in (("median", 0.5), ("p5", 0.05), ("worst", 0.0))}
    return dict(name=name, flops_speedup=report.flops_speedup, full_steps=spent, psnr=values) | quality


def _how(pipe: Any, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Settings of a row as arguments of `generate`."""
    rest = dict(settings)
    calibration, preset = rest.pop("calibration", None), rest.pop("preset", "balanced")
    if "period" in rest:
        rest["schedule"] = tuple(sorted({0, 1, *range(2, steps, rest.pop("period")), steps - 1}))
    elif "schedule" in rest:
        count = int(steps / rest.pop("speedup"))
        even = (0, 1, *(1 + round((steps - 2) * (k + 1) / (count - 2)) for k in range(count - 2)))
        chosen = _placed(pipe, count) if rest["schedule"] == PLACED else even
        if rest.pop("last", False):
            chosen = (*chosen[:-1], steps - 1)
        rest["schedule"] = chosen
    named = isinstance(preset, str) and not rest
    config = preset if named else speca.SpecaConfig.build(preset, **rest)
    return dict(config=config, calibration=calibration)


def _placed(pipe: Any, count: int) -> tuple[int, ...]:
    found = Calibration.beside(pipe)
    response = scheduler_response(pipe.scheduler)
    if found is None or not response.transitions:
        raise typer.BadParameter(f"this model brings no calibration that fits {response.reason}".strip())
    return place(found.prior.at(response.noise), response.transitions, count).steps


def show(rows: list[dict[str, Any]], place: Path, **about: Any) -> None:
    """The table on the terminal, and the rows as JSON in `place`."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(dict(**about, rows=rows)) + "\n")
    table = Table("setting", "FLOPs", "full steps", "median dB", "P5", "worst")
    for r in rows:
        spent = r["full_steps"]
        share = f"{sum(spent) / len(spent):.1f} ({min(spent)} to {max(spent)})"
        quality = (f"{r[k]:.2f}" for k in ("median", "p5", "worst"))
        table.add_row(r["name"], f"{r['flops_speedup']:.2f}x", share, *quality)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
