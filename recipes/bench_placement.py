"""How long a search for placements takes, and what it finds, beside a plain exchange search.

    make bench-placement                                      # or: OMP_NUM_THREADS=1 python recipes/bench_placement.py
    python recipes/bench_placement.py --steps 250 --full 25 --alone

The exchange search moves one full step or two neighbours at a time and scores each placement by `expected`, from six
starts: it is what the library did before. Both are run alternately, in one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from rich.console import Console
from rich.table import Table

from speca.calibration import Calibration
from speca.core import placement, search
from speca.core.generic import generic
from speca.core.placement import Placement, cheapest, expected, place
from speca.core.prior import Prior
from speca.core.starts import spread
from speca.core.transition import Transition
from speca.sampler.scheduler import scheduler_response
from speca.zoo import names

Steps = tuple[Transition, ...]
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SAMPLERS: dict[str, Callable[[], Any]] = {
    "flow Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow DPM++": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "flow UniPC": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "DPM++": diffusers.DPMSolverMultistepScheduler,
}


def exchanged(prior: Prior, steps: Steps, count: int) -> Placement:
    """The best of the placements that exchange leads to from six starts."""
    found = []
    for kept in (1, 2)[:count]:
        for density in (0.9, 1.2, 1.6):
            rest = (step + kept - 1 for step in spread(len(steps) - kept + 1, count - kept + 1, density))
            found.append(_exchanged(prior, steps, {*range(kept - 1), *rest}, kept))
    return min(found, key=lambda placement: placement.error)


def _exchanged(prior: Prior, steps: Steps, best: set[int], kept: int) -> Placement:
    """The placement that exchange leads to from `best`, whose first `kept` steps stay."""
    least = expected(prior, steps, best)
    for _ in range(12):
        before = least
        for index in range(kept, len(best)):
            trials = _moved(sorted(best), index, len(steps))
            errors = [expected(prior, steps, trial) for trial in trials]
            if errors and min(errors) < least:
                least = min(errors)
                best = trials[errors.index(least)]
        if least > 0.999 * before:
            break
    return Placement(tuple(sorted(best)), least)


def _moved(steps: list[int], index: int, total: int) -> list[set[int]]:
    """The `steps` with the one at `index` moved, alone or together with the next one."""
    found = []
    for count, moves in ((1, search.MOVES), (2, search.MOVES_OF_TWO)):
        part = steps[index : index + count]
        rest = set(steps).difference(part)
        for move in moves if len(part) == count else ():
            there = {step + move for step in part}
            if all(0 < step < total for step in there) and not there & rest:
                found.append(rest | there)
    return found


def problems(total: int) -> list[tuple[str, Prior, Steps]]:
    """The priors of the bundled models, and the generic one, each with samplers of its kind, for `total` steps."""
    folder = Path(str(resources.files("speca.zoo"))) / "weights"
    files = {name: folder / name / "speca.json" for name in names()}
    measured = {name: Calibration.load(file) for name, file in files.items() if file.is_file()}
    found = []
    for name, make in SAMPLERS.items():
        scheduler = make()
        scheduler.set_timesteps(total)
        response = scheduler_response(scheduler)
        steps, flow = tuple(response.transitions), "low" in name
        guess = generic(tuple(response.noise), steps)
        found += [] if guess is None else [(f"{name}, generic", guess, steps)]
        for model, calibration in measured.items():
            if flow == calibration.scheduler.startswith("Flow"):
                found.append((f"{name}, {model}", calibration.prior.at(response.noise), steps))
    return found


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of one call, with nothing found in a cache, and what it returns."""
    for cached in (search._tables, search._starts, placement._shortlist):
        cached.cache_clear()
    began = time.perf_counter()
    found = call()
    return 1e3 * (time.perf_counter() - began), found


def main(
    steps: Annotated[list[int], typer.Option(help="Numbers of steps.", min=8)] = [28, 50],  # noqa: B006
    full: Annotated[list[int], typer.Option(help="Full steps; by default a tenth, a fifth and half.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Interleaved runs of each search.", min=1)] = 1,
    alone: Annotated[
        bool, typer.Option(help="Without the exchange search, which takes minutes of many steps.")
    ] = False,
) -> None:
    """Print a table: median milliseconds of both searches, and the expected error, this one's over the other's."""
    torch.set_num_threads(1)
    table = Table("steps", "full", "sampler, prior", "search, ms", "exchange, ms", "error ratio", "cheapest, ms")
    for total in steps:
        for (name, prior, run), count in product(problems(total), full or [total // 10, total // 5, total // 2]):
            prior = replace(prior, placed={})
            new, old = list[float](), list[float]()
            ratio = "-"
            for _ in range(rounds):
                spent, found = timed(lambda p=prior, r=run, c=count: place(p, r, c))
                new.append(spent)
                if not alone:
                    spent, other = timed(lambda p=prior, r=run, c=count: exchanged(p, r, c))
                    old.append(spent)
                    ratio = f"{found.error / other.error:.4f}"
            whole, _ = timed(lambda p=prior, r=run, e=found.error: cheapest(p, r, e))
            before = f"{statistics.median(old):.0f}" if old else "-"
            table.add_row(str(total), str(count), name, f"{statistics.median(new):.0f}", before, ratio, f"{whole:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
