"""The numbers of the generic prior, and how far it is from measured ones.

    python recipes/generic_fit.py                                              # judge the numbers in use
    python recipes/generic_fit.py --tries 400 --on emoji-flux --on fashion-dit # and look for better ones

For each model and number of full steps: the error expected of a placement and weights found without knowing the model,
judged by the second moments that were measured of it, in decibels (latents of unit range, to first order, see
`core/placement.py`); beside it those of the measured prior, and of polynomials on the same and on even steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from speca import zoo
from speca.calibration import Calibration
from speca.calibration.file import BESIDE
from speca.core.correction import polynomial
from speca.core.generic import PROCESS, VARIANCES, moments
from speca.core.placement import expected, place
from speca.core.prior import Prior
from speca.core.transition import Transition
from speca.reports.measure import example_call
from speca.sampler.scheduler import scheduler_response

COUNTS = (7, 10, 14)
Numbers = tuple[float, float, float, float, float, float]
"""Least and largest variance; variance and length of the slow part, of the fast part."""
USED: Numbers = (float(VARIANCES[0]), float(VARIANCES[-1]), *PROCESS[0], *PROCESS[1])


class Polynomial(Prior):
    """Weights of polynomials: order 1 for a draft, through all nodes for the corrector."""

    def weights(self, nodes: Sequence[int], targets: Sequence[int]) -> Any:
        kept = list(nodes[:2]) if len(targets) == 1 else list(nodes)
        found = np.zeros((len(targets), len(nodes)))
        found[:, : len(kept)] = polynomial([float(n) for n in kept], [float(t) for t in targets])
        return found


class Model:
    """What was measured of a bundled model, and what its sampler does."""

    def __init__(self, name: str) -> None:
        self.name, self.prior = name, Calibration.load(zoo.WEIGHTS / name / BESIDE).prior
        pipe: Any = zoo.load(name)
        pipe.set_progress_bar_config(disable=True)
        call = {**zoo.call_arguments(name), **example_call(pipe, [0])}
        pipe(**call, num_inference_steps=len(self.prior.noise), output_type="latent")  # as it sets its own timesteps
        self.steps: tuple[Transition, ...] = scheduler_response(pipe.scheduler).transitions

    def decibels(self, prior: Prior, full: Sequence[int]) -> float:
        """By the measured moments."""
        return -20 * math.log10(expected(prior, self.steps, set(full), self.prior.moments))


def generic_of(model: Model, numbers: Numbers) -> Prior:
    low, high, slow, long, fast, short = numbers
    found = moments(model.steps, np.geomspace(low, high, len(VARIANCES)), ((slow, long), (fast, short)))
    return Prior(model.prior.noise, found)


def judged(model: Model, prior: Callable[[], Prior]) -> list[float]:
    found = prior()
    return [model.decibels(found, place(found, model.steps, count).steps) for count in COUNTS]


def even(total: int, count: int) -> list[int]:
    return [0, 1, *(1 + round((total - 2) * (k + 0.5) / (count - 1.5)) for k in range(1, count - 1))]


def search(models: list[Model], tries: int, seed: int = 0) -> Numbers:
    """Random search around the best known, on the mean over models and numbers of full steps."""
    draw, best = random.Random(seed), USED

    def mean(numbers: Numbers) -> float:
        return float(np.mean([judged(m, lambda m=m: generic_of(m, numbers)) for m in models]))  # type: ignore[misc]

    most = mean(best)
    for _ in track(range(tries), description="numbers"):
        chosen = draw.randrange(len(best))
        trial: Any = tuple(v * math.exp(draw.gauss(0, 0.4)) if i == chosen else v for i, v in enumerate(best))
        if (value := mean(trial)) > most:
            best, most = trial, value
    return best


def main(
    on: Annotated[list[str] | None, typer.Option(help="Models to fit to; all are judged.")] = None,
    tries: Annotated[int, typer.Option(help="Numbers to try; 0 judges those in use.", min=0)] = 0,
) -> None:
    """Print the table."""
    models = [Model(name) for name in zoo.names() if (Path(zoo.WEIGHTS) / name / BESIDE).is_file()]
    numbers = search([m for m in models if not on or m.name in on], tries) if tries else USED
    table = Table("model", "full steps", "measured prior", "generic prior", "polynomial, placed by it", "even steps")
    for model in models:
        own, other = judged(model, lambda m=model: m.prior), judged(model, lambda m=model: generic_of(m, numbers))  # type: ignore[misc]
        plain = Polynomial(model.prior.noise, model.prior.moments)
        for count, a, b in zip(COUNTS, own, other, strict=True):
            placed = place(generic_of(model, numbers), model.steps, count).steps
            c, d = model.decibels(plain, placed), model.decibels(plain, even(len(model.steps), count))
            table.add_row(model.name, str(count), *(f"{v:.1f}" for v in (a, b, c, d)))
    console = Console(width=120)
    console.print(table)
    console.print("numbers: " + ", ".join(f"{v:.4g}" for v in numbers))


if __name__ == "__main__":
    typer.run(main)
