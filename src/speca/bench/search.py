"""The search for a fixed schedule by running it: local search on tuning seeds from the best schedule known before."""

from __future__ import annotations

import contextlib
from typing import Any

from ..errors import InputError
from .measure import played, quality
from .methods import Prepare
from .recording import TuningData, anneal, random_schedule, uniform_schedule
from .setup import Apply


def search(apply: Apply, corrected: bool) -> Prepare:
    """To the best schedule of so many full steps found in `data.tries` runs over the tuning seeds.

    It begins with the even schedule or, if that is better, with the annealed one. Best is the lowest mean relative L2
    to the full run.
    """

    def prepare(data: TuningData, full: int) -> list[int]:
        call, seeds = data.tuning_call, data.tuning_seeds
        steps = call["num_inference_steps"]
        known: dict[tuple[int, ...], float] = {}

        def loss(schedule: list[int]) -> float:
            key = tuple(schedule)
            if key not in known:
                made = played(apply, data.pipe, call, schedule, seeds, data.batch)
                values: Any = quality(made.images, data.reference())["relative_l2"]
                known[key] = sum(values) / len(values)
            return known[key]

        starts = [uniform_schedule(steps, full)]
        with contextlib.suppress(InputError):  # no linear sampler
            starts.append(anneal(data.recording(), full, corrected))
        best = min(starts, key=loss)
        for attempt in range(data.tries):
            # Every other proposal takes a step's neighbour, else one that a fresh random schedule has.
            movable = best[2:]
            moved = movable[attempt % len(movable)]
            spare = sorted(set(random_schedule(steps, full, seed=attempt)) - set(best))
            to = moved + (-1) ** (attempt // 2) if attempt % 2 == 0 or not spare else spare[attempt % len(spare)]
            if not 2 <= to < steps or to in best:
                continue
            best = min(best, sorted({*best, to} - {moved}), key=loss)
        return best

    return prepare
