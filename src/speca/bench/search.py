"""Search a fixed schedule by running candidates on tuning seeds: local search from an even or annealed schedule."""

from __future__ import annotations

import contextlib
from typing import Any

from ..errors import InputError
from .measure import played, quality
from .methods import Prepare
from .recording import TuningData, anneal, random_schedule, uniform_schedule
from .setup import Apply


def search(apply: Apply, corrected: bool) -> Prepare:
    """Return a function that finds the best schedule with `full` full steps in `data.tries` runs over the tuning seeds.

    It starts with the better of the even and the annealed schedule and minimises the mean relative L2 to the full run.
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
        with contextlib.suppress(InputError):  # the sampler is not linear
            starts.append(anneal(data.recording(), full, corrected))
        best = min(starts, key=loss)
        for attempt in range(data.tries):
            # Alternate between a neighbouring step and a step of a new random schedule.
            movable = best[2:]
            moved = movable[attempt % len(movable)]
            spare = sorted(set(random_schedule(steps, full, seed=attempt)) - set(best))
            to = moved + (-1) ** (attempt // 2) if attempt % 2 == 0 or not spare else spare[attempt % len(spare)]
            if not 2 <= to < steps or to in best:
                continue
            best = min(best, sorted({*best, to} - {moved}), key=loss)
        return best

    return prepare
