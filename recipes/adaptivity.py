"""Is it worth spending by what a sample's own corrections say? A trial, on seeds that chose nothing.

    python recipes/adaptivity.py fashion-dit --samples 128 --common 3

All samples begin with the first few of ten placed full steps (`--common`). How large their corrections have been by
then, and how rough, is set against how wrong they will be at the end, and the rest is placed for fewer or more full
steps. Corrections are those of the guided output where guidance is stacked; the *roughness* of one is the root mean
square of its differences between neighbours. A *policy* sends the easier share of samples to one number, the others to
another. The policy that keeps a 5th percentile with the fewest full steps is chosen on tuning seeds, with a regression
fitted there, and is judged on others. Beside it stand fixed placements, a policy that draws lots (any mix of two
placements lies between them), and one that goes by the true error of ten full steps, which none can know.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import speca
from speca.bench.signals import spearman
from speca.calibration import Calibration
from speca.core.correction import Corrector
from speca.core.placement import expected, place
from speca.core.prior import Array, Prior
from speca.core.transition import Transition
from speca.reports.comparison import psnr
from speca.reports.measure import example_call, generate, joined, run_once, split
from speca.sampler.scheduler import scheduler_response
from speca.zoo import call_arguments, resolve

BASE = 10
FIXED = (7, 8, 9, 10, 11, 12, 14)
SHARES = (0.3, 0.5, 0.7, 0.8, 0.9)  # of the samples that a policy takes for the easy ones
RIDGE = 10.0
TUNING = 700000

Policy = tuple[float, int, int]
"""The share that is taken for easy, and the full steps of the easy and of the others."""


def main(
    model: Annotated[str, typer.Argument(help="A bundled model.")] = "fashion-dit",
    samples: Annotated[int, typer.Option(help="Samples to tune on, and as many to report on.", min=8)] = 48,
    batch: Annotated[int, typer.Option(help="Samples in one call.", min=1)] = 16,
    common: Annotated[int, typer.Option(help="Full steps before samples part.", min=3, max=6)] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Run all placements and continuations on both sets of seeds, and print what policies would have spent."""
    if samples % batch:
        raise typer.BadParameter(f"--samples {samples} is no multiple of --batch {batch}.")
    torch.set_num_threads(threads)
    pipe = resolve(model)
    pipe.set_progress_bar_config(disable=True)
    calibration = Calibration.beside(pipe)
    if calibration is None:
        raise typer.BadParameter(f"{model} brings no calibration; name a bundled model.")
    call = {**call_arguments(model), **example_call(pipe, [TUNING]), "num_inference_steps": calibration.steps}
    run_once(pipe, call, [TUNING], None)  # sets the timesteps
    response = scheduler_response(pipe.scheduler)
    assert len(response.transitions) == calibration.steps, "the placements are for a run of another number of steps"
    prior, path = calibration.prior.at(response.noise), response.transitions
    start = place(prior, path, BASE).steps[:common]
    plans = {("fixed", k): place(prior, path, k).steps for k in FIXED}
    plans |= {("split", k): continued(prior, path, start, k) for k in FIXED}
    sets = [Trial(pipe, model, range(first, first + samples), batch, calibration, plans) for first in (TUNING, 0)]
    show(model, *sets, common - 2)


def continued(prior: Prior, path: Sequence[Transition], common: Sequence[int], count: int) -> tuple[int, ...]:
    """The best `count` full steps found that begin with those in `common`, by exchange as in `core/placement.py`."""
    total, last, more = len(path), max(common), count - len(common)
    best = {*common, *(last + round((total - last) * (k + 1) / (more + 0.5)) for k in range(more))}
    least, before = expected(prior, path, best), float("inf")
    while least < 0.999 * before:
        before = least
        for step in sorted(best - set(common)):
            for other in (step + move for move in (-1, 1, -2, 2, -4, 4)):
                if last < other < total and other not in best and step in best:
                    trial = best - {step} | {other}
                    if (error := expected(prior, path, trial)) < least:
                        best, least = trial, error
    return tuple(sorted(best))


class Trial:
    """What every plan gives for each sample of `seeds`: `decibels` by plan, and the `corrections` of ten full steps, in
    dB: (samples, 8, 2) sizes and roughness."""

    def __init__(
        self, pipe: Any, model: str, seeds: Sequence[int], batch: int, calibration: Calibration,
        plans: dict[tuple[str, int], tuple[int, ...]],
    ) -> None:  # fmt: skip
        call: dict[str, Any] = {**call_arguments(model), "num_inference_steps": calibration.steps}
        call |= example_call(pipe, seeds)
        full = joined([run_once(pipe, *part, None) for part in split(call, list(seeds), batch)]).images
        self.decibels: dict[tuple[str, int], Array] = {}
        guidance = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
        for (kind, count), steps in track(plans.items(), description=f"seeds from {seeds[0]}"):
            placed = replace(calibration.prior, placed={count: steps})
            config = speca.SpecaConfig.build("balanced", speedup=calibration.steps / count)
            with recorded(batch, guidance) as moves:
                made = generate(
                    pipe, call, list(seeds), batch=batch, config=config, calibration=replace(calibration, prior=placed)
                )
            assert made.report is not None and all(s.full + s.rejected == count for s in made.report.samples)
            self.decibels[kind, count] = psnr(made.images, full).double().numpy()
            if (kind, count) == ("fixed", BASE):
                each, calls = BASE - 2, len(moves) // (BASE - 2)  # the first two full steps correct nothing
                parts = [torch.stack(moves[i * each : (i + 1) * each], 1) for i in range(calls)]
                self.corrections = torch.cat(parts).double().numpy()


@contextmanager
def recorded(rows: int, guidance: float) -> Iterator[list[torch.Tensor]]:
    """Sizes and roughness of corrections of runs within, in dB: (rows, 2) for each full step of calls of `rows`
    samples."""
    found: list[torch.Tensor] = []
    original = Corrector.correction

    def correction(self: Corrector, index: Any, out: Any, omega: Any, here: Transition) -> Any:
        moves, size = original(self, index, out, omega, here)
        known = gap = moves[0]
        if len(gap) == 2 * rows:  # cond and uncond in halves of one call
            cond, uncond = gap.chunk(2)
            known = uncond + guidance * (cond - uncond)
        across = known.diff(dim=1 if known.dim() == 3 else -1)  # along a row of a picture, or of its tokens
        each = [part.flatten(1).square().mean(1).sqrt() / here.size for part in (known, across)]
        found.append(20 * torch.stack(each, 1).log10())
        return moves, size

    Corrector.correction = correction  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Corrector.correction = original  # type: ignore[method-assign]


def predicted(known: Trial, trials: Sequence[Trial], seen: int, kinds: Sequence[int]) -> list[Array]:
    """The error of ten full steps of each trial, by a ridge regression on the first `seen` corrections of `known`."""
    x, error = known.corrections[:, :seen, kinds].reshape(len(known.corrections), -1), -known.decibels["fixed", BASE]
    mean, spread = x.mean(0), x.std(0)
    a = (x - mean) / spread
    weights = np.linalg.solve(a.T @ a + RIDGE * np.eye(a.shape[1]), a.T @ (error - error.mean()))
    each = [t.corrections[:, :seen, kinds].reshape(len(t.corrections), -1) for t in trials]
    return [(values - mean) / spread @ weights for values in each]


def played(trial: Trial, policy: Policy, cut: float, difficulty: Array) -> tuple[float, float]:
    """Mean full steps and the 5th percentile in dB."""
    _, easy, hard = policy
    count = np.where(difficulty <= cut, easy, hard)
    table = {k: trial.decibels["split", k] for k in {easy, hard}}
    made = [table[int(k)][i] for i, k in enumerate(count)]
    return float(count.mean()), float(np.quantile(made, 0.05))


def show(model: str, tuning: Trial, fresh: Trial, seen: int) -> None:
    """Rank correlations; then for fixed placements, policies that keep their 5th percentile of the tuning seeds."""
    error, both = torch.from_numpy(-fresh.decibels["fixed", BASE]), (tuning, fresh)
    print(f"{model}: rank correlation of each correction with the error of {BASE} full steps, fresh seeds:")
    for name, kind in (("size", 0), ("roughness", 1)):
        each = [spearman(torch.from_numpy(fresh.corrections[:, k, kind].copy()), error) for k in range(BASE - 2)]
        print(f"  {name:<10}" + ", ".join(f"{value:.2f}" for value in each))
    print("of a regression on all corrections up to each:")
    for name, kinds in (("size", [0]), ("both", [0, 1])):
        known = [torch.from_numpy(predicted(tuning, [fresh], k + 1, kinds)[0]) for k in range(BASE - 2)]
        print(f"  {name:<10}" + ", ".join(f"{spearman(value, error):.2f}" for value in known))
    chance = np.random.default_rng(0)
    scores = {
        "by lots": [chance.random(len(t.corrections)) for t in both],
        "by size": predicted(tuning, both, seen, [0]),
        "by size and roughness": predicted(tuning, both, seen, [0, 1]),
        "by the true error": [-t.decibels["fixed", BASE] for t in both],
    }
    table = Table("P5 wanted", "policy", "full steps, tuning", "full steps, fresh", "P5 fresh")
    for wanted in (8, 9, 10, 12):
        target = float(np.quantile(tuning.decibels["fixed", wanted], 0.05))
        least = next(k for k in FIXED if np.quantile(tuning.decibels["fixed", k], 0.05) >= target)
        kept = float(np.quantile(fresh.decibels["fixed", least], 0.05))
        table.add_row(f"{target:.1f} dB", "fixed", f"{least:.1f}", f"{least:.1f}", f"{kept:.1f}")
        for name, (known, unknown) in scores.items():
            found = []
            for policy in ((q, a, b) for q in SHARES for a in FIXED for b in FIXED if a <= b):
                cut = float(np.quantile(known, policy[0]))
                spent, quality = played(tuning, policy, cut, known)
                if quality >= target:
                    found.append((spent, *played(fresh, policy, cut, unknown)))
            row = [f"{v:.1f}" for v in min(found)] if found else ["none keeps it", "", ""]
            table.add_row("", name, *row)
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
