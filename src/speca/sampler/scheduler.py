"""The response of a scheduler object, found by stepping a copy of it. No table of any scheduler is copied.

What a scheduler must offer to be tried:

- `timesteps`: one entry for each call of the model, after `set_timesteps` or however it is made;
- `step(output, timestep, sample)`, which returns the next sample, a tuple whose first entry it is, or an object with
  `prev_sample`. Its arguments are also recognised by name, such as `index` or `i` in place of the timestep;
- optionally `add_noise(x_0, noise, timesteps)` or `scale_noise(x_0, timesteps, noise)`, by which the path is known,
  and `scale_model_input(sample, timestep)`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .path import fits, noise_axis, path_of_scheduler
from .response import SHAPE, Probe, Response, transitions_of

# Where a scheduler stands and what it remembers, as it is before a run: not part of what it is.
STATE: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("_step_index", "_begin_index", "last_sample", "last_noise", "cur_sample"), lambda _: None),
    **dict.fromkeys(("this_order", "this_predictor_order", "this_corrector_order"), lambda _: None),
    **dict.fromkeys(("sample", "prev_derivative", "dt"), lambda _: None),  # of Heun's method
    **dict.fromkeys(("model_outputs", "timestep_list"), lambda value: [None] * len(value)),
    **dict.fromkeys(("ets", "derivatives"), lambda _: []),  # of Adams' methods
    **dict.fromkeys(("lower_order_nums", "counter", "cur_model_output"), lambda _: 0),
}
ROLES = {
    "output": ("model_output", "output", "noise_pred", "velocity", "pred", "eps", "v"),
    "timestep": ("timestep", "t", "time", "sigma"),
    "index": ("index", "i", "idx", "step_index", "step"),
    "sample": ("sample", "x", "latents", "x_t", "xt"),
}
"""Names by which the arguments of a scheduler's `step` are recognised."""


def scheduler_response(scheduler: Any, begin: int = 0, **options: Any) -> Response:
    """Return what a scheduler does from the step of index `begin` on.

    Found once for schedulers of equal content and kept (the last 64). The scheduler is left as it was, and no random
    generator is touched: a fresh object of the same class with the same data is stepped, without what may have been
    put in the place of its methods.

    Args:
        scheduler: after `set_timesteps`.
        begin: index of the first step, above 0 where a run starts from an image.
        **options: further arguments of its `step`, such as `eta`.
    """
    name = type(scheduler).__name__
    if getattr(scheduler, "timesteps", None) is None:
        return Response(reason=f"{name} has no timesteps yet")
    try:
        trial = fresh(scheduler)
    except Exception as problem:  # whatever copying a foreign object raises
        return Response(reason=f"{name} cannot be copied to be tried ({type(problem).__name__}: {problem})")
    try:
        step = getattr(type(scheduler), "step", None)  # which may have been replaced since
        parts = {n: v for n, v in vars(trial).items() if n not in STATE}  # some appear with the first step only
        key = type(scheduler), step, _content(parts), begin, _content(options)
    except TypeError:  # it holds something that cannot be compared
        return _tried(_Trial(None, trial, begin, options))
    return _found(_Trial(key, trial, begin, options))


@dataclass(frozen=True)
class _Trial:
    """A scheduler to be tried; equal where the `key` is."""

    key: Hashable
    scheduler: Any = field(compare=False)
    begin: int = field(compare=False)
    options: dict[str, Any] = field(compare=False)


@lru_cache(maxsize=64)
def _found(trial: _Trial) -> Response:
    return _tried(trial)


def _content(value: Any) -> Hashable:
    """Equal for values of equal content. Raises TypeError for anything but plain values, arrays and containers."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return type(value), tuple((name, _content(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_content(part) for part in value)
    raise TypeError(f"{type(value).__name__} has no content that could be compared")


def _tried(trial: _Trial) -> Response:
    scheduler, name = trial.scheduler, type(trial.scheduler).__name__
    noise = tuple(noise_axis(scheduler))[trial.begin :]
    times = tuple(float(t) for t in torch.as_tensor(scheduler.timesteps).tolist())[trial.begin :]
    probe = Probe(len(times))
    try:
        with torch.no_grad(), probe.noise():
            samples = _played(copy.deepcopy(scheduler), probe.inputs, trial.begin, trial.options)
    except Exception as problem:  # whatever schedulers raise at arguments they were not made for
        reason = f"{name} cannot be tried on its own ({type(problem).__name__}: {problem})"
        return Response((), noise, times, reason)
    found = probe.response(samples)
    if found is None:
        return Response((), noise, times, f"a step of {name} is not linear")
    try:
        signals, sizes, guess = _path(scheduler)
    except Exception:  # of an `add_noise` that wants something else
        signals, sizes, guess = path_of_scheduler(scheduler, len(scheduler.timesteps))
    signals, sizes = signals[trial.begin :], sizes[trial.begin :]
    steps = transitions_of(*found, signals, sizes)
    if not steps:
        return Response((), noise, times, f"{name} remembers more than 3 outputs")
    note = ""
    if guess and fits([t.parts for t in steps], signals, sizes):
        note = f"{name} has no add_noise; its path was taken to be {guess}"
    elif guess:
        steps = tuple(t._replace(jacobian=0.0, size=1.0, signal=1.0, parts=(0.0, 0.0)) for t in steps)
        note = (
            f"the path of {name} is not known, so forecasts and corrections are less accurate; give it a method "
            "add_noise(x_0, noise, timesteps)"
        )
    return Response(steps, noise, times, note=note)


def fresh(scheduler: Any) -> Any:
    """Return an object of the same class with the same data on the host, as it was before its first step.

    Functions that a user has put in the place of its methods (loggers, guidance tools) are left out: they may hold the
    real scheduler, which must not be stepped. Schedulers of flows keep their sigmas on the pipeline's device.
    """
    cls: Any = type(scheduler)
    made = cls.__new__(cls)
    for name, value in vars(scheduler).items():
        if callable(value) and not isinstance(value, nn.Module) and hasattr(cls, name):
            continue
        made.__dict__[name] = STATE[name](value) if name in STATE else _on_host(value)
    return made


def _on_host(value: Any) -> Any:
    """A copy of a value, with its tensors on the host; modules as they are."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if type(value) in (list, tuple):
        return type(value)(_on_host(part) for part in value)
    if type(value) is dict:
        return {name: _on_host(part) for name, part in value.items()}
    return value if isinstance(value, nn.Module) else copy.deepcopy(value)


def _path(scheduler: Any) -> tuple[list[float], list[float], str]:
    """`p` and `p + q` at each timestep, asked of the scheduler itself, or guessed; then in words what was guessed."""
    if not hasattr(scheduler, "scale_noise") and not hasattr(scheduler, "add_noise"):
        return path_of_scheduler(scheduler, len(scheduler.timesteps))
    found = []
    for noise in (0.0, 1.0):
        trial, one, sizes = copy.deepcopy(scheduler), torch.ones(1, *SHAPE), []
        for timestep in trial.timesteps:
            if hasattr(trial, "scale_noise"):  # of flows; the two methods take their arguments in another order
                mixed = trial.scale_noise(one, timestep[None], noise * one)
            else:
                mixed = trial.add_noise(one, noise * one, timestep[None])
            sizes.append(float(mixed[0, 0, 0, 0]))
        found.append(sizes)
    return found[0], found[1], ""


def _played(trial: Any, inputs: Tensor, begin: int, options: dict[str, Any]) -> list[Tensor]:
    """The samples (T + 1) of a run of the scheduler; `inputs` (1 + T, ...) are the first sample and its outputs."""
    parameters = inspect.signature(trial.step).parameters
    given = {n: v for n, v in options.items() if n in parameters}
    if "return_dict" in parameters:
        given["return_dict"] = False
    if begin and hasattr(trial, "set_begin_index"):
        trial.set_begin_index(begin)
    names, samples = list(parameters)[:3], [inputs[0]]
    for index, out in enumerate(inputs[1:], begin):
        timestep, sample = trial.timesteps[index], samples[-1].clone()
        if hasattr(trial, "scale_model_input"):
            trial.scale_model_input(sample, timestep)  # without it some schedulers warn
        values = {"output": out.clone(), "timestep": timestep, "index": index, "sample": sample}
        samples.append(next_sample(trial.step(*_in_order(names, values), **given)))
    return samples


def _in_order(names: list[str], values: dict[str, Any]) -> list[Any]:
    """The arguments of a `step` in the order of its parameters `names`, as far as the names tell."""
    roles = [next((role for role, known in ROLES.items() if name in known), None) for name in names]
    if None in roles or len(set(roles)) < len(roles):
        roles = ["output", "timestep", "sample"]
    return [values[str(role)] for role in roles]


def next_sample(stepped: Any) -> Tensor:
    """Return the next sample from what a scheduler's `step` has returned.

    Raises:
        TypeError: it is no tensor, tuple, or object with `prev_sample`.
    """
    if isinstance(stepped, (tuple, list)):
        stepped = stepped[0]
    elif not isinstance(stepped, Tensor):
        kept = stepped.get("prev_sample") if isinstance(stepped, dict) else getattr(stepped, "prev_sample", None)
        stepped = stepped if kept is None else kept
    if not isinstance(stepped, Tensor):
        raise TypeError(f"step returned {type(stepped).__name__}, which holds no next sample")
    return stepped
