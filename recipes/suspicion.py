"""When is the verify block worth what it costs? Planned drafts, checked always, on suspicion, or never.

    python recipes/suspicion.py fashion-dit --samples 32

Without a prior, drafts are as long as the corrections before them allow. Here they may also be checked: always, or *on
suspicion*, when the last correction said that the draft before it had been too long. A check costs the verify block; a
rejected draft is computed in full. Each row is set against drafts that are never checked at the same cost, read off
between tolerances: what a check is worth is the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

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
from speca.zoo import call_arguments, resolve

TOLERANCES = (0.003, 0.005, 0.01, 0.02, 0.04, 0.08)
CHECKED = (0.01, 0.02, 0.04)
TAUS = (0.03, 0.1, 0.3)
BARE: dict[str, Any] = dict(prior="none", threshold_decay=1.0)


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
    rows: list[tuple[str, float, float, float, float, float, float]] = []
    for when, tolerance, tau in track(plans, description=model):
        config = SpecaConfig.build("balanced", tolerance=tolerance, threshold=tau, **BARE)
        with checking(when):
            made = generate(pipe, call, seeds, batch=batch, config=config)
        assert made.report is not None
        checked = float(np.mean([len(s.checked) for s in made.report.samples]))
        rejected = float(np.mean([s.rejected for s in made.report.samples]))
        median, low = (float(np.quantile(psnr(made.images, full), q)) for q in (0.5, 0.05))
        rows.append((f"{when}, {tolerance}, tau {tau}", made.report.flops_speedup, checked, rejected, median, low, 0))
    never = sorted(rows[: len(TOLERANCES)], key=lambda row: row[1])
    table = Table(
        "drafts checked, tolerance", "FLOPs", "checked", "rejected", "PSNR", "P5", "over never, at equal cost"
    )
    for name, speed, checked, rejected, median, low, _ in rows:
        gains = [
            value - float(np.interp(speed, [row[1] for row in never], [row[at] for row in never]))
            for at, value in ((4, median), (5, low))
        ]
        within = never[0][1] <= speed <= never[-1][1]
        gain = " / ".join(f"{g:+.1f}" for g in gains) if within and not name.startswith("never") else ""
        table.add_row(name, f"{speed:.2f}x", f"{checked:.1f}", f"{rejected:.1f}", f"{median:.1f}", f"{low:.1f}", gain)
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
