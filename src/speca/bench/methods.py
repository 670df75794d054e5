"""Every method behind one interface: a name, the knob that is swept, and how one setting is put on a pipeline."""

from __future__ import annotations

import copy
import functools
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..config import PRESETS, SpecaConfig
from ..errors import InputError, nearest
from ..pipeline import Session, enabled

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Call = dict[str, Any]


@dataclass
class Setup:
    """What a setting made of a pipeline and its arguments; `session` is there where `speca` itself runs."""

    pipe: DiffusionPipeline
    call: Call
    session: Session | None = None


Apply = Callable[[Any, Call, Any], AbstractContextManager[Setup]]
"""From a plain pipeline, the arguments of a call and a value of the knob to the set-up; undone on exit."""


@dataclass(frozen=True)
class Method:
    """One competitor, swept over `values` of `knob`.

    A method that cannot run on a model raises from `apply` or from the run; the bench keeps the message as its row.
    Where `searched`, a value is a number of full steps and the schedule is found on tuning seeds first.
    """

    name: str
    knob: str
    values: tuple[Any, ...]
    apply: Apply = field(repr=False)
    package: str = "speca"
    searched: bool = False


# ------------------------------------------------------------------------------------------------ solvers
@contextmanager
def plain(pipe: Any, call: Call, value: Any) -> Iterator[Setup]:
    """No acceleration."""
    yield Setup(pipe, call)


@contextmanager
def fewer_steps(pipe: Any, call: Call, steps: int) -> Iterator[Setup]:
    """The pipeline's own solver with fewer steps."""
    yield Setup(pipe, {**call, "num_inference_steps": steps})


def solver(name: str) -> Apply:
    """Another scheduler of diffusers, called `name`, at fewer steps; of a flow it keeps the flow's own sigmas."""

    @contextmanager
    def apply(pipe: Any, call: Call, steps: int) -> Iterator[Setup]:
        import diffusers

        own = pipe.scheduler
        cls: Any = getattr(diffusers, name)
        extra: dict[str, Any] = {}
        if _is_flow(own):
            extra = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=own.config.shift)
            if not own.config.get("use_dynamic_shifting"):
                cls = _without_mu(cls)
        pipe.scheduler = cls.from_config(own.config, **extra)
        try:
            yield Setup(pipe, {**call, "num_inference_steps": steps})
        finally:
            pipe.scheduler = own

    return apply


def _without_mu(cls: Any) -> Any:
    """The scheduler class, deaf to the shift `mu` of the image size, which pipelines hand over to any scheduler."""

    class Deaf(cls):
        @functools.wraps(cls.set_timesteps)  # pipelines look at its signature
        def set_timesteps(self, *args: Any, mu: float | None = None, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)

    return type(cls.__name__, (Deaf,), {})


@contextmanager
def adams_bashforth(pipe: Any, call: Call, steps: int) -> Iterator[Setup]:
    """Two-step Adams-Bashforth on the own time grid of a flow: the last two velocities, weighted by the step sizes."""
    own = pipe.scheduler
    if not _is_flow(own):
        raise InputError(f"Adams-Bashforth integrates a velocity, and {type(own).__name__} belongs to no flow.")
    from diffusers import FlowMatchEulerDiscreteScheduler

    class AdamsBashforth(FlowMatchEulerDiscreteScheduler):
        past: Any = None  # (velocity, step size) of the step before

        @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)  # pipelines look at its signature
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            self.past = None
            super().set_timesteps(*args, **kwargs)

        def step(self, velocity: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            if self.step_index is None:
                self._init_step_index(timestep)
            size, used = self.sigmas[self.step_index + 1] - self.sigmas[self.step_index], velocity
            if self.past is not None:
                before, width = self.past
                used = velocity + (velocity - before) * (size / (2 * width))
            self.past = (velocity, size)
            return super().step(used, timestep, *args, **kwargs)

    pipe.scheduler = AdamsBashforth.from_config(own.config)
    try:
        yield Setup(pipe, {**call, "num_inference_steps": steps})
    finally:
        pipe.scheduler = own


def _is_flow(scheduler: Any) -> bool:
    return "FlowMatch" in type(scheduler).__name__


# ------------------------------------------------------------------------------------------------ speca's engine
VERIFYING = SpecaConfig(threshold_decay=1.0, min_draft=1, max_draft=8)
"""The paper's rule with order-1 drafts, which beat its own settings on the bundled models (docs/LOG.md)."""


def speca_with(knob: str, base: str | SpecaConfig = VERIFYING, **fixed: Any) -> Apply:
    """`speca` with the field `knob` set to the value; knob "preset" takes the name of one."""

    @contextmanager
    def apply(pipe: Any, call: Call, value: Any) -> Iterator[Setup]:
        chosen = SpecaConfig.build(value) if knob == "preset" else SpecaConfig.build(base, **{**fixed, knob: value})
        with enabled(pipe, chosen) as session:
            yield Setup(pipe, call, session)

    return apply


def scheduled(corrector: bool) -> Apply:
    """Full at the steps of a schedule, order-1 forecasts between, with or without the corrector."""

    @contextmanager
    def apply(pipe: Any, call: Call, schedule: frozenset[int]) -> Iterator[Setup]:
        settings = dict(controller="schedule", schedule=tuple(sorted(schedule)), warmup=2, final=0, corrector=corrector)
        with enabled(pipe, VERIFYING, **settings) as session:
            yield Setup(pipe, call, session)

    return apply


def uniform_schedule(steps: int, full: int) -> frozenset[int]:
    """`full` steps, 3 or more, of 0..steps-1 spread evenly, the first two and the last among them."""
    return frozenset({0, 1} | {1 + round((steps - 2) * (k + 1) / (full - 2)) for k in range(full - 2)})


def random_schedule(steps: int, full: int, seed: int) -> frozenset[int]:
    """The first two steps and `full - 2` others drawn at random."""
    return frozenset({0, 1, *random.Random(seed).sample(range(2, steps), full - 2)})


@contextmanager
def random_steps(pipe: Any, call: Call, full: int) -> Iterator[Setup]:
    """A random schedule; its seed is the number of full steps, so that it can be drawn again."""
    with scheduled(False)(pipe, call, random_schedule(call["num_inference_steps"], full, seed=full)) as setup:
        yield setup


# ------------------------------------------------------------------------------------------------ rivals
def diffusers_cache(build: Callable[[Any, Call, Any], Any]) -> Apply:
    """A cache of diffusers, from the configuration that `build(pipe, call, value)` makes."""

    @contextmanager
    def apply(pipe: Any, call: Call, value: Any) -> Iterator[Setup]:
        model = pipe.transformer
        if not hasattr(model, "enable_cache"):
            raise InputError(f"{type(model).__name__} is no CacheMixin, so diffusers has no enable_cache for it.")
        model.enable_cache(build(pipe, call, value))
        try:
            yield Setup(pipe, call)
        finally:
            model.disable_cache()

    return apply


def _first_block(pipe: Any, call: Call, threshold: float) -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=threshold)


def _taylorseer(pipe: Any, call: Call, interval: int) -> Any:
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(cache_interval=interval, max_order=1, taylor_factors_dtype=torch.float32)


def _broadcast(pipe: Any, call: Call, skip: int) -> Any:
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(0, 1001),
        current_timestep_callback=lambda: pipe._current_timestep,
    )


def cache_dit(order: int) -> Apply:
    """DBCache of cache-dit with its residual threshold as the knob; `order` 0 reuses, else TaylorSeer forecasts.

    It patches classes for good, so it gets a copy of the pipeline under a class of its own.
    """

    @contextmanager
    def apply(pipe: Any, call: Call, threshold: float) -> Iterator[Setup]:
        try:
            import cache_dit as library
        except ImportError as error:
            raise InputError("cache-dit is not installed; pip install 'speca-diffusers[bench]'.") from error
        own = copy.deepcopy(pipe)
        for thing in (own, own.transformer):
            cls = type(thing)
            thing.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__})
        config = library.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=3
        )
        calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)  # a dozen lines for each setting
        library.enable_cache(own, cache_config=config, calibrator_config=calibrator)
        try:
            yield Setup(own, call)
        finally:
            library.disable_cache(own)

    return apply


# ------------------------------------------------------------------------------------------------ the field
STEPS = (25, 16, 12, 10, 8, 7, 6)
INTERVALS = (1, 2, 3, 4, 5, 7, 9)  # drafts between full steps
FULL_STEPS = (26, 17, 11, 8, 7)
RESIDUALS = (0.05, 0.1, 0.2, 0.4, 0.8)  # of the rivals' first-block gates
TOLERANCES = (0.0005, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
TAUS = (0.01, 0.02, 0.04, 0.08, 0.2, 1.0)


def _interval(**fixed: Any) -> Apply:
    return speca_with("max_draft", controller="interval", final=0, **fixed)


def methods(steps: int = 50) -> dict[str, Method]:
    """All methods by name; sweeps are for runs of `steps` and shrink with them."""
    fewer = tuple(dict.fromkeys(max(2, round(s * steps / 50)) for s in STEPS))
    full = tuple(dict.fromkeys(max(3, round(s * steps / 50)) for s in FULL_STEPS))
    field_of = [
        Method("none", "-", (0,), plain),
        Method("fewer-steps", "steps", fewer, fewer_steps, "diffusers"),
        Method("dpm-solver", "steps", fewer, solver("DPMSolverMultistepScheduler"), "diffusers"),
        Method("unipc", "steps", fewer, solver("UniPCMultistepScheduler"), "diffusers"),
        Method("adams-bashforth", "steps", fewer, adams_bashforth),
        Method("reuse", "max_draft", INTERVALS, _interval(forecaster="reuse", warmup=1)),
        *(
            Method(f"taylor-{k}", "max_draft", INTERVALS, _interval(forecaster="taylor", order=k, warmup=k + 1))
            for k in (1, 2, 3)
        ),
        Method("speca", "tolerance", TOLERANCES, speca_with("tolerance", "balanced")),
        Method("speca-budget", "speedup", (2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0), speca_with("speedup", "balanced")),
        Method("speca-uncorrected", "tolerance", TOLERANCES, speca_with("tolerance", "balanced", corrector=False)),
        Method("speca-verified", "threshold", TAUS, speca_with("threshold")),
        Method("speca-paper", "threshold", (0.05, 0.1, 0.3, 0.6, 2.0), speca_with("threshold", "paper")),
        Method(
            "speca-released", "threshold", (0.1, 0.3, 1.0, 3.0, 1e6),
            speca_with("threshold", "paper", controller="released", error="elementwise_l1"),
        ),
        Method("presets", "preset", tuple(PRESETS), speca_with("preset")),
        Method("random-schedule", "full steps", full, random_steps),
        Method("searched-schedule", "full steps", full, scheduled(False), searched=True),
        Method("searched-corrected", "full steps", full, scheduled(True), searched=True),
        Method("first-block-cache", "threshold", RESIDUALS, diffusers_cache(_first_block), "diffusers"),
        Method("taylorseer-cache", "interval", (2, 3, 5, 7, 9), diffusers_cache(_taylorseer), "diffusers"),
        Method("attention-broadcast", "skip range", (2, 4, 8), diffusers_cache(_broadcast), "diffusers"),
        Method("cache-dit", "threshold", RESIDUALS, cache_dit(0), "cache-dit"),
        Method("cache-dit-taylor", "threshold", RESIDUALS, cache_dit(1), "cache-dit"),
    ]  # fmt: skip
    return {method.name: method for method in field_of}


def chosen(names: list[str], steps: int) -> list[Method]:
    """The methods called `names` (all if empty), "none" first: it is what the others are measured against.

    Raises InputError, with the nearest name, for one that does not exist.
    """
    known = methods(steps)
    for name in names:
        if name not in known:
            raise InputError(f"there is no method {name!r}; {nearest(name, known)}")
    return [method for name, method in known.items() if not names or name in names or name == "none"]
