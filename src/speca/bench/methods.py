"""Methods behind one interface: a name, the swept parameter, and a context that applies one setting to a pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from ..calibration.calibrating import calibrating
from ..calibration.file import Calibration
from ..config import Config, SpecaConfig, VerifiedConfig
from ..diffusers.enable import enabled
from ..errors import InputError
from ..reports.measure import run_once
from .recording import TuningData
from .setup import Apply, Call, Setup

Prepare = Callable[[TuningData, Any], Any]
"""Turn tuning data and a value of the knob into the value passed to `apply`, such as a schedule as a list."""

FAMILIES = ("steps", "forecast", "speca", "schedule", "rival", "oracle")


@dataclass(frozen=True)
class Method:
    """One method, swept over `values` of its parameter `knob`.

    If a method cannot run on a model, `prepare`, `apply` or the run raises, and the bench records the message.
    `prepare`, if given, converts a value first, for example a number of full steps into a schedule. `family` groups
    methods in reports; methods of the family "oracle" use the full run, which is unknown in practice.
    """

    name: str
    knob: str
    values: tuple[Any, ...]
    apply: Apply = field(repr=False)
    package: str = "speca"
    family: str = "rival"
    prepare: Prepare | None = field(default=None, repr=False)


# ------------------------------------------------------------------------------------------------ solvers
@contextmanager
def plain(pipe: Any, call: Call, value: Any) -> Iterator[Setup]:
    """Run the pipeline without acceleration."""
    yield Setup(pipe, call)


@contextmanager
def fewer_steps(pipe: Any, call: Call, steps: int) -> Iterator[Setup]:
    """Run the pipeline's own solver with fewer steps."""
    yield Setup(pipe, {**call, "num_inference_steps": steps})


def solver(name: str) -> Apply:
    """Run the diffusers scheduler called `name` with fewer steps; for a flow model, keep the sigmas of the pipeline."""

    @contextmanager
    def apply(pipe: Any, call: Call, steps: int) -> Iterator[Setup]:
        import diffusers

        own = pipe.scheduler
        cls: Any = getattr(diffusers, name)
        extra: dict[str, Any] = {}
        if _is_flow(own):
            extra = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=own.config.shift)
            cls = _own_grid(cls, bool(own.config.get("use_dynamic_shifting")))
        pipe.scheduler = cls.from_config(own.config, **extra)
        try:
            yield Setup(pipe, {**call, "num_inference_steps": steps})
        finally:
            pipe.scheduler = own

    return apply


def _own_grid(cls: Any, dynamic: bool) -> Any:
    """Return a subclass of the scheduler that always uses the flow's own time grid.

    Pipelines pass sigmas to `set_timesteps`; they equal this grid, and some solvers refuse them, so they are dropped.
    The shift `mu` of the image size is used only where the flow has dynamic shifting.
    """

    class OnOwnGrid(cls):
        def set_timesteps(
            self,
            num_inference_steps: int | None = None,
            device: Any = None,
            sigmas: Any = None,
            mu: float | None = None,
        ) -> None:
            extra = {"mu": mu} if dynamic and mu is not None else {}
            super().set_timesteps(num_inference_steps or len(sigmas), device=device, **extra)

    return type(cls.__name__, (OnOwnGrid,), {})


@contextmanager
def adams_bashforth(pipe: Any, call: Call, steps: int) -> Iterator[Setup]:
    """Run two-step Adams-Bashforth on the time grid of a flow, with weights for unequal step sizes."""
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
VERIFYING = VerifiedConfig(threshold_decay=1.0, min_draft=1, max_draft=8)
"""The paper's rule with order-1 drafts, better on the bundled models than the paper's own settings (docs/LOG.md)."""


def speca_with(knob: str, base: str | Config = VERIFYING, measured: bool = True, **fixed: Any) -> Apply:
    """Run `speca` with the configuration field `knob` set to the value; the knob "preset" takes the name of a preset.

    If `measured` is false, ignore the calibration bundled with the model.
    """

    @contextmanager
    def apply(pipe: Any, call: Call, value: Any) -> Iterator[Setup]:
        chosen = value if knob == "preset" else SpecaConfig.build(base, **{**fixed, knob: value})
        with enabled(pipe, chosen, calibration=None if measured else False) as session:
            yield Setup(pipe, call, session)

    return apply


LEARNT_FROM = 550_000
"""Seed of the full run that method "speca-one-run" learns from; neither a tuning nor a reporting seed."""

_learnt: WeakKeyDictionary[Any, dict[int, Calibration]] = WeakKeyDictionary()  # by pipeline and number of steps


def after_one_run(knob: str) -> Apply:
    """Run `speca` with a prior that was learnt from one full run of another seed."""

    @contextmanager
    def apply(pipe: Any, call: Call, value: Any) -> Iterator[Setup]:
        known, steps = _learnt.setdefault(pipe, {}), call["num_inference_steps"]
        if steps not in known:
            with calibrating(pipe) as pending:
                run_once(pipe, _of_one(call), [LEARNT_FROM], None)
            known[steps] = pending.calibration
        chosen = SpecaConfig.build("balanced", **{knob: value})
        with enabled(pipe, chosen, calibration=known[steps]) as session:
            yield Setup(pipe, call, session)

    return apply


def _of_one(call: Call) -> Call:
    """The arguments of the first sample of a call."""
    many = {name: value for name, value in call.items() if isinstance(value, list)}
    return {**call, **{name: value[:1] for name, value in many.items()}}


def scheduled(corrector: bool) -> Apply:
    """Run full steps at a schedule and order-1 drafts between: outputs with correction, or features without."""

    @contextmanager
    def apply(pipe: Any, call: Call, schedule: list[int]) -> Iterator[Setup]:
        steps = tuple(schedule)
        features = VerifiedConfig(rule="schedule", schedule=steps, warmup=2, final=0)
        chosen = SpecaConfig(schedule=steps, tolerance=0.0, prior="none") if corrector else features
        with enabled(pipe, chosen, calibration=False) as session:
            yield Setup(pipe, call, session)

    return apply
