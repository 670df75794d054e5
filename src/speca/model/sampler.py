"""What a scheduler does with the outputs it is given, found by trying it: a sum of them and the first sample, or not.

No table of any scheduler is copied. A copy of the scheduler is stepped through all its timesteps, twice with the same
noise: given nothing, and given one unit of the first sample or of one output. The difference is its response, a matrix;
from that follow how many outputs it remembers and what each step does (`Transition`). That takes as long as a few
forwards of a small model, so what was found is kept for schedulers that are equal in all they consist of.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.corrector import Transition, advance
from ..core.prior import Array
from .rows import content
from .stack import callers

SHAPE = (4, 2, 2)
TOLERANCE = 1e-4  # of what is left unexplained, relative; schedulers compute in fp32
RANK = 1e-6  # below, relative, the samples of a step say no more of the next one
MEMORY = 4  # outputs that one is mixed with at most, itself among them: UniPC of order 3, PNDM
# Where a scheduler stands and what it remembers, as it is before a run: not part of what it is.
STATE: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("_step_index", "_begin_index", "last_sample", "last_noise", "cur_sample"), lambda _: None),
    **dict.fromkeys(("this_order", "this_predictor_order", "this_corrector_order"), lambda _: None),
    **dict.fromkeys(("sample", "prev_derivative", "dt"), lambda _: None),  # of Heun's method
    **dict.fromkeys(("model_outputs", "timestep_list"), lambda value: [None] * len(value)),
    **dict.fromkeys(("ets", "derivatives"), lambda _: []),  # of Adams' methods
    **dict.fromkeys(("lower_order_nums", "counter", "cur_model_output"), lambda _: 0),
}
KEPT = 64

Found = tuple[tuple[Transition, ...], str]
_known: dict[Hashable, Found] = {}


def transitions(scheduler: Any, **given: Any) -> Found:
    """The linear step at each of the scheduler's timesteps, or none and the reason.

    Multistep and second-order schedulers keep outputs of earlier steps and mix them in, which is as linear. Clipping
    and thresholding are not, and are noticed by what sums do not explain.

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
    name, count = type(scheduler).__name__, len(scheduler.timesteps)
    mixed = torch.randn((1 + count, 1, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = torch.eye(1 + count, dtype=torch.float64).view(1 + count, 1 + count, *[1] * len(SHAPE))
    inputs = torch.cat([units.expand(*units.shape[:2], *SHAPE), mixed], dim=1)  # of each unit alone, and of a mixture
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            nothing = _played(scheduler, torch.zeros_like(inputs), given)
            samples = _played(scheduler, inputs, given) - nothing
    except Exception as problem:  # whatever schedulers raise at arguments they were not made for
        return (), f"{name} cannot be tried on its own ({type(problem).__name__})"
    response = samples[:, :-1, 0, 0, 0]  # (T + 1, 1 + T): what the first sample and each output are worth to a sample
    left = torch.einsum("ji,ixyz->jxyz", response, mixed[:, 0]) - samples[:, -1]
    if not _small(left.flatten(1), samples[:, -1].flatten(1)):
        return (), f"a step of {name} is not linear"
    for memory in range(1, MEMORY + 1):
        if found := _with_memory(response.numpy(), memory):
            found = _on_path(found, response[:memory, 0].tolist(), _path(scheduler, 0.0), _path(scheduler, 1.0))
            return tuple(step._replace(noisy=bool(nothing.any())) for step in found), ""
    return (), f"{name} remembers more than {MEMORY - 1} outputs"


def _small(left: Tensor, of: Tensor) -> bool:
    """Whether each row of `left` (n, m) is little, next to that `of` it is left."""
    return bool((left.norm(dim=1) <= TOLERANCE * of.norm(dim=1)).all())


def _with_memory(response: Array, memory: int) -> tuple[Transition, ...]:
    """The steps of a sampler that remembers `memory - 1` outputs; none if those do not explain its `response`."""
    steps = len(response) - 1
    whole = np.concatenate([response, np.zeros((memory, 1 + steps))])  # nothing comes after the end
    found = []
    for step in range(steps):
        past = whole[step : step + memory + 1, : 1 + step]  # (p + 1, inputs so far): of this sample and the next ones
        keep = np.linalg.lstsq(past[:-1].T, past[-1], rcond=RANK)[0]
        left = torch.from_numpy(past[-1] - keep @ past[:-1])
        if not _small(left[None], torch.from_numpy(past[-1:])):
            return ()
        move = whole[step + 1 : step + 1 + memory, 1 + step]
        # Rounded, so that what is found for a sampler, such as placements, is found once: threads sum in any order.
        found.append(Transition(tuple(keep.round(9).tolist()), tuple(move.round(9).tolist())))
    return tuple(found)


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


def _on_path(
    steps: Sequence[Transition], kept: Sequence[float], signals: Sequence[float], sizes: Sequence[float]
) -> tuple[Transition, ...]:
    """The steps with their places on the path `x = p x_0 + q noise`, what outputs are made of there, and their `pull`.

    The outputs are those that lead a sample along its path: `A noise` takes `q_0` from one `q` to the next, `B x_0`
    the same with `p`; a step that is still has those of the step before it. `pull`, that of their sum, is zero where a
    sampler, as LCM's, leaves the path.

    Args:
        kept: (p,) what one unit of the first sample is worth to the first p samples.
        signals, sizes: `p` and `p + q` at each timestep.
    """
    ends = [*signals, 1.0], [*(n - p for n, p in zip(sizes, signals, strict=True)), 0.0]
    states = [[k * end[0] for k in kept] for end in ends]
    made, found = (0.0, 0.0), []
    for i, step in enumerate(steps):
        if not step.still:
            lacking = [end[i + 1] - advance(state, step)[0] for end, state in zip(ends, states, strict=True)]
            made = round(lacking[1] / step.move[0], 5), round(lacking[0] / step.move[0], 5)
        states = [advance(state, step, out) for state, out in zip(states, reversed(made), strict=True)]
        pull = 0.0 if step.still else sum(made) / sizes[i]
        known = pull if pull * step.move[0] < 0 else 0.0
        found.append(step._replace(pull=round(known, 5), size=sizes[i], signal=signals[i], made=made))
    return tuple(found)


def _path(scheduler: Any, noise: float) -> list[float]:
    """`p + noise q` of the path `x = p x_0 + q noise` at each timestep; 1 if that is not known."""
    scheduler, one, sizes = _fresh(scheduler), torch.ones(1, *SHAPE), []
    for timestep in scheduler.timesteps:
        if hasattr(scheduler, "scale_noise"):  # of flows; the two methods take their arguments in another order
            mixed = scheduler.scale_noise(one, timestep[None], noise * one)
        else:
            mixed = scheduler.add_noise(one, noise * one, timestep[None]) if hasattr(scheduler, "add_noise") else one
        sizes.append(float(mixed[0, 0, 0, 0]))
    return sizes


def _fresh(scheduler: Any) -> Any:
    """A copy on the host that has not been stepped: one that has takes every timestep for the one it stands at.

    Schedulers of flows keep their sigmas where the pipeline runs; those of a GPU do not go with samples of the host.
    """
    trial = copy.deepcopy(scheduler)
    for name, value in vars(trial).items():
        if isinstance(value, Tensor):
            setattr(trial, name, value.cpu())
    for name, before in STATE.items():
        if name in vars(trial):
            setattr(trial, name, before(vars(trial)[name]))
    return trial


def _played(scheduler: Any, inputs: Tensor, given: dict[str, Any]) -> Tensor:
    """The samples (T + 1, ...) of a run of the scheduler; `inputs` (1 + T, ...) are the first sample and its outputs.

    The noise is the same in each run.
    """
    trial = _fresh(scheduler)
    parameters = inspect.signature(trial.step).parameters
    options = {n: v for n, v in given.items() if n in parameters}
    if "generator" in parameters:
        options["generator"] = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    samples = [inputs[0]]
    for timestep, out in zip(trial.timesteps, inputs[1:], strict=True):
        if hasattr(trial, "scale_model_input"):
            trial.scale_model_input(samples[-1], timestep)  # without it some schedulers warn
        samples.append(trial.step(out.clone(), timestep, samples[-1].clone(), return_dict=False, **options)[0])
    return torch.stack(samples).double()
