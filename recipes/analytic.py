"""What a budget gives models that nobody measured or tuned on: denoisers in closed form (`speca.bench.analytic`).

    python recipes/analytic.py                 # the reporting models
    python recipes/analytic.py --tuning        # those that settings may be chosen on

For each number of steps and of full steps: by how much `speedup` is nearer to the full run than as many plain steps, in
dB, at the median and at the 5th percentile of the samples of each model. About a minute.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from speca.bench.analytic import AnalyticModel, analytic, draw


def gains(model: AnalyticModel, seeds: list[int], steps: int, full: int) -> tuple[float, float]:
    """Gain over plain steps in dB, of the median sample and of the 5th percentile."""
    whole = draw(model, seeds, steps)
    ours, plain = (
        -10 * (found - whole).double().square().mean(1).clamp(min=1e-30).log10().numpy()
        for found in (draw(model, seeds, steps, speedup=steps / full), draw(model, seeds, full))
    )
    return float(np.median(ours) - np.median(plain)), float(np.quantile(ours, 0.05) - np.quantile(plain, 0.05))


def main(
    models: Annotated[int, typer.Option(help="Models drawn; those of flow and EDM paths are run.", min=2)] = 50,
    tuning: Annotated[bool, typer.Option(help="The models for tuning instead of those for reporting.")] = False,
    samples: Annotated[int, typer.Option(help="Samples of each model.", min=4)] = 16,
    steps: Annotated[list[int], typer.Option(help="Denoising steps.", min=10)] = [20, 28, 50],  # noqa: B006
    ratio: Annotated[list[int], typer.Option(help="Budgets: steps over full steps.", min=2)] = [3, 5, 7],  # noqa: B006
) -> None:
    """Run and print a table."""
    torch.set_num_threads(1)
    table = Table(
        "steps", "full", "models", "median: mean", "worst", "lose > 0.5 dB", "P5: mean", "worst", "lose > 1 dB"
    )
    drawn = [model for n in range(models) if (model := analytic(2 * n + (not tuning))).path != "vp"]
    for total in steps:
        for full in (total // r for r in ratio):
            median, p5 = np.array([gains(model, list(range(samples)), total, full) for model in drawn]).T
            row = [f"{v:.1f}" for v in (median.mean(), median.min(), p5.mean(), p5.min())]
            lost = [str(int((median < -0.5).sum())), str(int((p5 < -1).sum()))]
            table.add_row(str(total), str(full), str(len(drawn)), *row[:2], lost[0], *row[2:], lost[1])
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
