"""What a scheduler does to a sample at each step, found by trying it: `x' = keep * x + move * out`, or nothing such.

No table of any scheduler is copied. A copy of the scheduler is stepped through all its timesteps, twice with the same
noise and different numbers; the difference of the two shows the coefficients, and whether that is all there is to it.
That takes as long as a few forwards of a small model, so what was found is kept for schedulers that are equal in all
they consist of.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.corrector import Transition
from .rows import content
from .stack import callers

SHAPE = (1, 4, 8, 8)
STILL = 1e-6  # a step that moves a sample by less per unit of output, as the last of some schedules, only keeps it
TOLERANCE = 1e-4  # of what is left unexplained, relative; schedulers compute in fp32
STATE = ("_step_index", "_begin_index")  # where a scheduler stands: not part of what it is
KEPT = 64

Found = tuple[tuple[Transition, ...], str]
_known: dict[Hashable, Found] = {}


def transitions(scheduler: Any, **given: Any) -> Found:
    """The linear step at each of the scheduler's timesteps, or none and the reason.

    Multistep and second-order schedulers keep outputs of earlier steps and mix them in, so what a step does is more
    than a function of its own sample and output; clipping is not linear. Both are noticed by what is left unexplained.

    Args:
        scheduler: after `set_timesteps`. It is left as it was, as is the global random state.
        **given: further arguments of its `step`, such as `eta`.
    """
    if getattr(scheduler, "timesteps", None) is None:
        return (), f"{type(scheduler).__name__} has no timesteps yet"
    try:
        parts = {n: v for n, v in vars(scheduler).items() if n not in STATE}
        key = type(scheduler), getattr(type(scheduler), "step", None), _content(parts), _content(given)
    except TypeError:  # it holds something that cannot be compared
        return _tried(scheduler, given)
    found = _known.get(key)
    if found is None:
        found = _tried(scheduler, given)
        if len(_known) >= KEPT:
            _known.clear()
        _known[key] = found
    return found


def _content(value: Any) -> Hashable:
    """Equal for values of equal content. Raises TypeError for anything but plain values, arrays and containers."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), content(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return type(value), tuple((name, _content(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_content(part) for part in value)
    raise TypeError(f"{type(value).__name__} has no content that could be compared")


def _tried(scheduler: Any, given: dict[str, Any]) -> Found:
    name, numbers = type(scheduler).__name__, torch.Generator().manual_seed(0)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            one, other = (_trace(scheduler, numbers, given) for _ in range(2))
    except Exception as problem:  # whatever schedulers raise at arguments they were not made for
        return (), f"{name} cannot be tried on its own ({type(problem).__name__})"
    found = []
    for (x, out, after), (y, out_y, after_y) in zip(one, other, strict=True):
        columns = torch.stack([(x - y).flatten(), (out - out_y).flatten()], dim=1).double()
        target = (after - after_y).flatten().double()
        solution = torch.linalg.lstsq(columns, target.unsqueeze(1)).solution
        left = (columns @ solution).squeeze(1) - target
        if not torch.isfinite(solution).all() or left.norm() > TOLERANCE * target.norm():
            return (), f"a step of {name} is not linear in its own sample and output alone"
        # Rounded, so that what is found for a sampler, such as placements, is found once: threads sum in any order.
        found.append(Transition(*(round(v, 9) for v in solution.flatten().tolist())))
    signals, sizes = _path(scheduler, 0.0), _path(scheduler, 1.0)
    path = zip(found, signals, sizes, [*sizes[1:], 1.0], strict=True)
    return tuple(_on_path(step, signal, size, after) for step, signal, size, after in path), ""


def step_arguments() -> dict[str, Any]:
    """What the pipeline that is calling gives its scheduler's `step` besides, such as `eta`; empty if that is unknown.

    Pipelines of diffusers keep it in a local called `extra_step_kwargs`.
    """
    found = (f.f_locals.get("extra_step_kwargs") for f in callers() if "extra_step_kwargs" in f.f_code.co_varnames)
    given = next(found, None)
    return {n: v for n, v in given.items() if n != "generator"} if isinstance(given, dict) else {}


def noise_axis(scheduler: Any) -> tuple[float, ...]:
    """Diffusion time at each of the scheduler's timesteps: about 1 at pure noise, falling."""
    trained = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000)
    return tuple(t / trained for t in torch.as_tensor(scheduler.timesteps).tolist())


def _on_path(step: Transition, signal: float, size: float, after: float) -> Transition:
    """The transition with its place on the path and its `pull`: none where a sampler, as LCM's, leaves the path."""
    pull = (after / size - step.keep) / step.move if abs(step.move) > STILL else 0.0
    return step._replace(pull=round(pull, 6) if pull * step.move < 0 else 0.0, size=size, signal=signal)


def _path(scheduler: Any, noise: float) -> list[float]:
    """`p + noise q` of the path `x = p x_0 + q noise` at each timestep; 1 if that is not known."""
    scheduler, one, sizes = _fresh(scheduler), torch.ones(SHAPE), []
    for timestep in scheduler.timesteps:
        if hasattr(scheduler, "scale_noise"):  # of flows; the two methods take their arguments in another order
            mixed = scheduler.scale_noise(one, timestep[None], noise * one)
        else:
            mixed = scheduler.add_noise(one, noise * one, timestep[None]) if hasattr(scheduler, "add_noise") else one
        sizes.append(float(mixed[0, 0, 0, 0]))
    return sizes


def _fresh(scheduler: Any) -> Any:
    """A copy that has not been stepped: one that has takes every timestep for the one it stands at."""
    trial = copy.deepcopy(scheduler)
    for index in STATE:
        if hasattr(trial, index):
            setattr(trial, index, None)
    return trial


def _trace(scheduler: Any, numbers: torch.Generator, given: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sample, output and next sample at each timestep; samples are drawn anew, the noise is the same in each trace."""
    trial = _fresh(scheduler)
    parameters = inspect.signature(trial.step).parameters
    options = {n: v for n, v in given.items() if n in parameters}
    if "generator" in parameters:
        options["generator"] = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    trace = []
    for timestep in trial.timesteps:
        x, out = (torch.randn(SHAPE, generator=numbers) for _ in range(2))
        if hasattr(trial, "scale_model_input"):
            trial.scale_model_input(x, timestep)  # without it some schedulers warn
        after = trial.step(out.clone(), timestep, x.clone(), return_dict=False, **options)[0]
        trace.append((x, out, after))
    return trace
