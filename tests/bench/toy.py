"""A small suite, and the calls of tiny pipelines as the bench makes them."""

from __future__ import annotations

from typing import Any

import tiny
from speca.bench import suites

PLAN = suites.Suite(samples=3, tuning=2, tries=2, batch=2, steps=12, timings=(suites.Timing(2, 1),))


def arguments(case: tiny.Case) -> Any:
    """Calls of a tiny pipeline: the conditions of its case, by seed."""

    def make(pipe: Any, seeds: Any, steps: int) -> dict[str, Any]:
        call = {**case.arguments, **case.conditions(list(seeds)), "num_inference_steps": steps}
        return {name: value for name, value in call.items() if name != "output_type"}

    return make
