"""When is the verify block worth what it costs? Planned drafts, checked always, on suspicion, or never.

    python recipes/suspicion.py fashion-dit --samples 32

Without a prior, drafts are as long as the corrections before them allow. Here they may also be checked: always, or *on
suspicion*, when the last correction said that the draft before it had been too long. A check costs the verify block; a
rejected draft is computed in full. Each row is set against drafts that are never checked, read off between tolerances
at the same cost, and at the same number of full steps, as if checks cost nothing, which is how a very deep model would
have it: what checking is worth is the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from speca import SpecaConfig
from speca.compare import psnr
from speca.core.controller import Plan, PlannedController, Trajectory
from speca.measure import example_call, generate, joined, run_once, split
from speca.report import SampleReport
from speca.zoo import call_arguments, resolve

TOLERANCES = (0.003, 0.005, 0.01, 0.02, 0.04, 0.08)
CHECKED = (0.01, 0.02, 0.04)
TAUS = (0.03, 0.1)
BARE: dict[str, Any] = dict(prior="none", threshold_decay=1.0)
OVER = ("over never, equal FLOPs", "equal full steps")


class Row(NamedTuple):
    """Speed-up in FLOPs; computed, checked and rejected steps of a sample; median and 5th percentile of PSNR."""

    speed: float
    full: float
    checked: float
    rejected: float
    median: float
    low: float


def over(row: Row, never: list[Row], axis: str) -> str:
    """By how many dB median and 5th percentile are above those of `never`, at an equal value of `axis`."""
    known = sorted(never, key=lambda r: float(getattr(r, axis)))
    at, places = getattr(row, axis), [getattr(r, axis) for r in known]
    if not places[0] <= at <= places[-1]:
        return ""
    gains = [getattr(row, q) - float(np.interp(at, places, [getattr(r, q) for r in known])) for q in ("median", "low")]
    return " / ".join(f"{gain:+.1f}" for gain in gains)


def _computed(sample: SampleReport) -> int:
    return sample.full + sample.rejected


def _checked(sample: SampleReport) -> int:
    return len(sample.checked)


def _rejected(sample: SampleReport) -> int:
    return sample.rejected


@contextmanager
def checking(when: str) -> Iterator[None]:
    """Planned drafts inside are checked "always", "on suspicion" or "never"."""
    original = PlannedController.plan

    def plan(self: PlannedController, t: Trajectory) -> Plan:
        found = original(self, t)
        wanted = when == "always" or (when == "on suspicion" and t.planned < t.period)
        return Plan.CHECKED if found is Plan.UNCHECKED and wanted else found

    PlannedController.plan = plan  # type: ignore[method-assign]
    try:
        yield
    finally:
        PlannedController.plan = original  # type: ignore[method-assign]


def main(
    model: Annotated[str, typer.Argument(help="A bundled model.")] = "fashion-dit",
    samples: Annotated[int, typer.Option(help="Samples, of seeds from 0.", min=4)] = 32,
    batch: Annotated[int, typer.Option(help="Samples in one call.", min=1)] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Run and print a table."""
    torch.set_num_threads(threads)
    pipe = resolve(model)
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(samples))
    call: dict[str, Any] = {**call_arguments(model), "num_inference_steps": 50, **example_call(pipe, seeds)}
    full = joined([run_once(pipe, *part, None) for part in split(call, seeds, batch)]).images
    plans = [("never", t, 0.1) for t in TOLERANCES]
    plans += [(when, t, tau) for when in ("on suspicion", "always") for t in CHECKED for tau in TAUS]
    rows: list[tuple[str, Row]] = []
    for when, tolerance, tau in track(plans, description=model):
        config = SpecaConfig.build("balanced", tolerance=tolerance, threshold=tau, **BARE)
        with checking(when):
            made = generate(pipe, call, seeds, batch=batch, config=config)
        assert made.report is not None
        each = made.report.samples
        counts = [float(np.mean([number(s) for s in each])) for number in (_computed, _checked, _rejected)]
        median, low = (float(np.quantile(psnr(made.images, full), q)) for q in (0.5, 0.05))
        rows.append((f"{when}, {tolerance}, {tau}", Row(made.report.flops_speedup, *counts, median, low)))
    never = [row for name, row in rows if name.startswith("never")]
    table = Table("checked, tolerance, tau", "FLOPs", "full steps", "checked", "rejected", "PSNR", "P5", *OVER)
    for name, row in rows:
        gains = ["", ""] if row in never else [over(row, never, "speed"), over(row, never, "full")]
        table.add_row(name, f"{row.speed:.2f}x", *(f"{value:.1f}" for value in row[1:]), *gains)
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
