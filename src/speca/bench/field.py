"""The methods of the bench and the settings of each sweep."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..config import PRESETS, VerifiedConfig
from ..errors import InputError, nearest
from . import rivals
from .methods import (
    Method,
    adams_bashforth,
    after_one_run,
    fewer_steps,
    plain,
    scheduled,
    solver,
    speca_with,
)
from .modules import per_module
from .oracle import own_errors, own_schedules, own_search
from .recording import TuningData, anneal, random_schedule
from .search import search
from .setup import Apply, Call, Setup

STEPS = (25, 17, 13, 10, 8, 7, 5)
INTERVALS = (1, 2, 3, 4, 5, 7, 9)  # drafts between full steps
FULL_STEPS = (26, 17, 13, 10, 8, 7, 6)
RESIDUALS = (0.05, 0.1, 0.2, 0.4, 0.8)  # thresholds of the first-block caches of other packages
TOLERANCES = (0.0005, 0.002, 0.005, 0.01, 0.02, 0.04, 0.1, 0.4)
TAUS = (0.01, 0.02, 0.04, 0.08, 0.2, 1.0)
SPEEDUPS = (2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
RATIOS = (0.1, 0.3, 1.0, 3.0, 1e6)  # thresholds of the released code's element-wise error
RELEASED = VerifiedConfig(
    **{**PRESETS["paper"].to_dict(), "rule": "released", "error": "elementwise_l1", "min_draft": 2}
)
"""Settings of the authors' released rule, with the `min_draft` of their DiT demo and of FLUX."""


def _interval(**fixed: Any) -> Apply:
    return speca_with("max_draft", rule="interval", final=0, **fixed)


@contextmanager
def random_steps(pipe: Any, call: Call, full: int) -> Iterator[Setup]:
    """Run full steps at a random schedule; its seed is the number of full steps, so it is reproducible."""
    with scheduled(False)(pipe, call, random_schedule(call["num_inference_steps"], full, seed=full)) as setup:
        yield setup


def _annealed(corrected: bool) -> Any:
    def prepare(data: TuningData, full: int) -> list[int]:
        return anneal(data.recording(), full, corrected)

    return prepare


def _every(drafts: int) -> VerifiedConfig:
    return VerifiedConfig(rule="interval", max_draft=drafts, warmup=3, final=0, order=1)


def _ours() -> list[Method]:
    made: dict[str, tuple[str, tuple[Any, ...], Apply]] = {
        "speca": ("tolerance", TOLERANCES, speca_with("tolerance", "balanced")),
        "speca-budget": ("speedup", SPEEDUPS, speca_with("speedup", "balanced")),
        "speca-one-run": ("speedup", SPEEDUPS, after_one_run("speedup")),
        "speca-unmeasured": ("speedup", SPEEDUPS, speca_with("speedup", "balanced", measured=False)),
        "speca-unprepared": ("tolerance", TOLERANCES, speca_with("tolerance", "balanced", prior="none")),
        "speca-generic": (
            "tolerance",
            TOLERANCES,
            speca_with("tolerance", "balanced", measured=False, prior="generic"),
        ),
        "speca-generic-budget": (
            "speedup",
            SPEEDUPS,
            speca_with("speedup", "balanced", measured=False, prior="generic"),
        ),
        "speca-uncorrected": ("tolerance", TOLERANCES, speca_with("tolerance", "balanced", corrector=False)),
        "speca-verified": ("threshold", TAUS, speca_with("threshold")),
        "speca-paper": ("threshold", (0.05, 0.1, 0.3, 0.6, 2.0), speca_with("threshold", "paper")),
        "speca-released": ("threshold", RATIOS, speca_with("threshold", RELEASED)),
        "released-modules": ("threshold", RATIOS, per_module(lambda value: replace(RELEASED, threshold=value))),
        "presets": ("preset", tuple(PRESETS), speca_with("preset")),
    }
    return [Method(name, *rest, family="speca") for name, rest in made.items()]


def _schedules(full: tuple[int, ...]) -> list[Method]:
    plain, moved = scheduled(False), scheduled(True)
    made: dict[str, tuple[Apply, Any]] = {
        "random-schedule": (random_steps, None),
        "annealed-schedule": (plain, _annealed(False)),
        "annealed-corrected": (moved, _annealed(True)),
        "searched-schedule": (plain, search(plain, False)),
        "searched-corrected": (moved, search(moved, True)),
    }
    corrected = functools.partial(own_schedules, corrector=True)
    errors = (0.0003, 0.001, 0.002, 0.004, 0.008, 0.02)
    return [
        *(Method(n, "full steps", full, apply, family="schedule", prepare=p) for n, (apply, p) in made.items()),
        Method("oracle-schedule", "full steps", full[1:], own_schedules, family="oracle", prepare=own_search(False)),
        Method("oracle-corrected", "full steps", full[1:], corrected, family="oracle", prepare=own_search(True)),
        Method("oracle-error", "tolerance", errors, own_schedules, family="oracle", prepare=own_errors),
    ]


def _rivals() -> list[Method]:
    cache = rivals.diffusers_cache
    ranges, every = (2, 4, 8), (2, 3, 5, 7, 9)
    made: dict[str, tuple[str, tuple[Any, ...], Apply]] = {
        "first-block-cache": ("threshold", RESIDUALS, cache(rivals.first_block)),
        "taylorseer-cache": ("interval", every, cache(rivals.taylorseer(False))),
        "taylorseer-lite": ("interval", every, cache(rivals.taylorseer(True))),
        "mag-cache": ("threshold", (0.03, 0.1, 0.3, 0.6, 1.2), cache(rivals.magnitude)),
        "sea-cache": ("threshold", (0.05, 0.15, 0.3, 0.6, 1.2), cache(rivals.spectral, with_step=True)),
        "faster-cache": ("skip range", ranges, cache(rivals.faster, with_step=True)),
        "attention-broadcast": ("skip range", ranges, cache(rivals.broadcast)),
    }
    return [
        *(Method(name, *rest, "diffusers") for name, rest in made.items()),
        Method("cache-dit", "setting", rivals.SETTINGS, rivals.cache_dit(0), "cache-dit"),
        Method("cache-dit-taylor", "setting", rivals.SETTINGS, rivals.cache_dit(1), "cache-dit"),
    ]


def methods(steps: int = 50) -> dict[str, Method]:
    """Return all methods by name, with sweeps that fit runs of `steps` steps."""
    fewer = tuple(dict.fromkeys(max(2, round(s * steps / 50)) for s in STEPS))
    full = tuple(dict.fromkeys(max(4, round(s * steps / 50)) for s in FULL_STEPS))
    multistep, unipc = solver("DPMSolverMultistepScheduler"), solver("UniPCMultistepScheduler")
    field_of = [
        Method("none", "-", (0,), plain, family="steps"),
        Method("fewer-steps", "steps", fewer, fewer_steps, "diffusers", "steps"),
        Method("dpm-solver", "steps", fewer, multistep, "diffusers", "steps"),
        Method("unipc", "steps", fewer, unipc, "diffusers", "steps"),
        Method("adams-bashforth", "steps", fewer, adams_bashforth, family="steps"),
        Method("reuse", "max_draft", INTERVALS, _interval(forecaster="reuse", warmup=1), family="forecast"),
        *(
            Method(f"taylor-{k}", "max_draft", INTERVALS, _interval(forecaster="taylor", order=k, warmup=k + 1),
                   family="forecast")
            for k in (1, 2, 3)
        ),
        Method("taylor-modules", "max_draft", INTERVALS, per_module(_every), family="forecast"),
        *_ours(),
        *_schedules(full),
        *_rivals(),
    ]  # fmt: skip
    return {method.name: method for method in field_of}


def chosen(names: list[str], steps: int, sweep: int = 0) -> list[Method]:
    """Return the methods called `names` (all if empty), with the baseline "none" first.

    `sweep` above 0 reduces each sweep to that many settings and keeps the first and last. Raises InputError with the
    nearest name if a method does not exist.
    """
    known = methods(steps)
    for name in names:
        if name not in known:
            raise InputError(f"there is no method {name!r}; {nearest(name, known)}")
    picked = [method for name, method in known.items() if not names or name in names or name == "none"]
    return [replace(method, values=_thinned(method.values, sweep)) for method in picked]


def _thinned(values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if not count or len(values) <= count:
        return values
    if count == 1:
        return values[len(values) // 2 :][:1]
    return tuple(values[round(k * (len(values) - 1) / (count - 1))] for k in range(count))
