"""Call bookkeeping: which step, branch and trajectory a call of the transformer belongs to.

Nothing is derived from counting calls alone. In order of preference the step comes from diffusers' `CacheContext`
(index and number of steps), from the scheduler of the pipeline that is calling, whose timesteps the given one is looked
up in, and, for a bare transformer told only the number of steps, from the changes of the timestep.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .overrides import TIME_ARGUMENTS
from .stack import callers

CONDITION_WORDS = ("encoder", "text", "cap", "pooled", "label", "prompt")
"""What the names of arguments contain that hold a condition, which tells a branch from its siblings."""

MAX_BRANCHES = 8
"""Branches of one name and shape that are told apart by their conditions; beyond it they are told apart by order."""


@dataclass(frozen=True)
class Position:
    """Where a step stands: index from 0, number of steps, and diffusion time (about 1 at pure noise, 0 at the end)."""

    index: int
    total: int
    noise: float


@dataclass(frozen=True)
class Call:
    """One call placed: its position, whether it begins a new trajectory, and whether steps before it were left out."""

    position: Position
    fresh: bool
    jumped: bool = False


class Clock:
    """Places calls on the time axis of one trajectory after another."""

    def __init__(self, scheduler: Callable[[], Any] | None, num_inference_steps: int | None) -> None:
        """`scheduler` returns the scheduler in use at the moment of the call (pipelines let users swap it)."""
        self._scheduler, self._steps = scheduler, num_inference_steps
        self._timesteps: Any = None
        self._values: list[float] = []
        self._trained = 1000.0
        self.device_reads = 0
        self.reset()

    def reset(self) -> None:
        """Forget the running trajectory; the next call begins a new one."""
        self._last: Position | None = None
        self._time: float | None = None
        self._start: float | None = None
        self._scale: tuple[float, float] | None = None
        self._calls, self._usual = 0, 0  # at this step so far, and at the step before

    def host_index(self) -> int | None:
        """The step index the scheduler itself keeps on the host, or will begin with; None where it keeps none."""
        scheduler = self._scheduler() if self._scheduler else None
        kept = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
        return next((index for index in kept if isinstance(index, int)), None)

    def place(self, given: Any, context: Any = None) -> Call | None:
        """Place a call by the timestep given to the model and its CacheContext.

        Returns None if the step cannot be told; the call is then to be run plainly.
        """
        replaced = self._refresh()
        index = self._without_reading(given, context)
        time = self._values[index] if index is not None and index < len(self._values) else self._read(given)
        position = self._locate(index, time, context)
        if position is None:
            return None
        last = self._last
        fresh = replaced or last is None or position.index < last.index or position.total != last.total
        if fresh:
            self._start = time
        if fresh or last is None or position.index != last.index:
            self._calls, self._usual = 0, 0 if fresh else self._calls
        self._calls += 1
        self._last, self._time = position, time
        return Call(position, fresh, not fresh and last is not None and position.index > last.index + 1)

    def _refresh(self) -> bool:
        """Take over the scheduler's timesteps; true if they were set anew, as each pipeline run does."""
        scheduler = self._scheduler() if self._scheduler else None
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or timesteps is self._timesteps:
            return False
        self._timesteps, self._scale = timesteps, None
        self._values = _steps_of(scheduler, [float(v) for v in timesteps.tolist()])
        self._trained = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000)
        return True

    def _without_reading(self, given: Any, context: Any) -> int | None:
        """The step index where it is known on the host.

        From the context; as `given` is a view of the timesteps; or, where it is on a device, from the scheduler's own
        index or what a pipeline's loop runs over.
        """
        index = getattr(context, "step_index", None)
        if index is not None:
            return int(index)
        index = self._element(given)
        known = isinstance(given, Tensor) and isinstance(self._timesteps, Tensor)
        if index is None and known and given.device.type != "cpu":
            index = self.host_index()
            return self._of_loop() if index is None else index
        return index

    def _element(self, given: Any) -> int | None:
        """Which one of the timesteps it is, where it is a view of one of them."""
        steps = self._timesteps
        if not isinstance(given, Tensor) or not isinstance(steps, Tensor) or given.dtype != steps.dtype:
            return None
        same = given.untyped_storage().data_ptr() == steps.untyped_storage().data_ptr()
        return int(given.storage_offset() - steps.storage_offset()) if same and not any(given.stride()) else None

    def _of_loop(self) -> int | None:
        """The one timestep that the innermost caller with any holds in its variables: its loop's, as in `DiTPipeline`,
        whose scheduler keeps no index, and which copies the timestep to the device at each step."""
        for frame in callers():
            numbers = [v for v in list(frame.f_locals.values()) if isinstance(v, Tensor) and not v.dim()]
            held = {self._element(number) for number in numbers} - {None}
            if held:
                return held.pop() if len(held) == 1 else None
        return None

    def _read(self, given: Any) -> float | None:
        """The timestep as a number; None where rows stand at different times, which one clock cannot place."""
        if not isinstance(given, Tensor):
            return None if given is None else float(given)
        self.device_reads += given.device.type != "cpu"
        if given.dim() > 1:  # one time per token or frame: given ones stand at 0, the noisy ones at the step's time
            given = given.flatten(1).amax(1)
        values = set(given.flatten().tolist())
        return float(values.pop()) if len(values) == 1 else None

    def _locate(self, index: int | None, time: float | None, context: Any) -> Position | None:
        total = getattr(context, "num_inference_steps", None) or len(self._values)
        if index is not None and total:
            return Position(index, int(total), self._noise(index, time))
        if time is None:
            return None
        if self._values:
            found = self._look_up(time)
            found = self._by_scheduler(time) if found is None else found
            return None if found is None else Position(found, len(self._values), self._noise(found, time))
        return self._count(time)

    def _noise(self, index: int, time: float | None) -> float:
        if index < len(self._values):
            return self._values[index] / self._trained
        return -float(index) if time is None else time

    def _look_up(self, time: float) -> int | None:
        """Index of the timestep a model was given, in whichever scale it is given it.

        The scale is settled at the first call of a trajectory, by the step nearest to where the scheduler begins. The
        scheduler's own index decides where it fits, as second-order schedulers repeat timesteps; otherwise the nearest
        timestep, and among equals the one nearest to the last call. Half precision rounds timesteps by 0.4 %.
        """
        slack, begin = 0.004 * max(map(abs, self._values)), self._begin()
        if self._scale is None:
            best = min((self._nearest(time, scale, begin), scale) for scale in self._scales())
            self._scale = best[1] if best[0][0] <= slack else None
        if self._scale is None:
            return None
        hint = self.host_index()
        if hint is not None and hint < len(self._values) and self._miss(time, self._scale, hint) <= slack:
            return hint
        last = begin if self._last is None else self._last.index
        miss, _, index = self._nearest(time, self._scale, last)
        if (
            index == last
            and 0 < self._usual <= self._calls
            and self._values[index : index + 2] == [self._values[index]] * 2
        ):
            index += 1  # PNDM repeats timesteps and keeps no index; each step takes as many calls as the one before
        return index if miss <= slack else None

    def _by_scheduler(self, time: float) -> int | None:
        """The scheduler's own index, for models that are given a time of their own making (Sana-Sprint, Cosmos).

        Where time goes on but the index does not, another scheduler is in use.
        """
        if not hasattr(self._scheduler() if self._scheduler else None, "step_index"):
            return None
        kept = self.host_index()
        index = self._begin() if kept is None else min(kept, len(self._values) - 1)
        stands = self._last is not None and self._last.index == index and self._time != time
        return None if stands else index

    def _scales(self) -> tuple[tuple[float, float], ...]:
        """Factor and shift of the scales in use: t, t / T, 1 - t / T."""
        return (1.0, 0.0), (1 / self._trained, 0.0), (-1 / self._trained, 1.0)

    def _miss(self, time: float, scale: tuple[float, float], index: int) -> float:
        return round(abs(self._values[index] * scale[0] + scale[1] - time) / abs(scale[0]), 6)

    def _nearest(self, time: float, scale: tuple[float, float], near: int) -> tuple[float, int, int]:
        """Miss, distance from step `near`, and index of the timestep that fits best."""
        return min((self._miss(time, scale, i), abs(i - near), i) for i in range(len(self._values)))

    def _begin(self) -> int:
        begin = getattr(self._scheduler() if self._scheduler else None, "begin_index", None)
        return begin if isinstance(begin, int) else 0

    def _count(self, time: float) -> Position | None:
        if self._steps is None:
            return None
        index = 0
        if self._last is not None and self._time is not None and time == self._time:
            index = self._last.index
        elif self._last is not None and self._last.index + 1 < self._steps and not self._turned(time):
            index = self._last.index + 1
        return Position(index, self._steps, time)

    def _turned(self, time: float) -> bool:
        """Whether time moves against the direction of the trajectory so far."""
        return self._time is not None and self._direction * (time - self._time) < 0

    @property
    def _direction(self) -> float:
        """Sign of the trajectory's movement: -1 where time counts down, 0 before the second step."""
        if self._time is None or self._start is None:
            return 0.0
        return float((self._time > self._start) - (self._time < self._start))


@dataclass
class _Track:
    """One branch: name of its context and shapes, its own name, the last step it was called at, its conditions."""

    key: object
    name: str
    step: int
    marks: dict[str, weakref.ref[Tensor]] = field(default_factory=dict)

    def knows(self, marks: dict[str, Tensor]) -> bool | None:
        """Whether these are the conditions of this branch; None where nothing of them is left to compare."""
        left = {n: kept for n, r in self.marks.items() if (kept := r()) is not None and n in marks}
        return all(marks[n] is kept for n, kept in left.items()) if left else None


class Branches:
    """Tells the branches of a run apart: by context and shapes, then by their conditions, then by order in a step.

    Guidance may start or stop in mid-run, so the order of calls alone would mistake one branch for another. A pipeline
    hands over the same condition tensors at every step; where it makes them anew, the order is what is left.
    """

    def __init__(self) -> None:
        self._tracks: list[_Track] = []

    def reset(self) -> None:
        """Forget all branches."""
        self._tracks = []

    def name(self, step: int, context: Any, signature: object, arguments: dict[str, Any]) -> str | None:
        """The branch of a call: "cond", or "call" where the pipeline sets no context; "call#2" for the next one.

        None for a call too many at one step, where the steps cannot be what they seem.

        Args:
            step: index of the step.
            context: diffusers' `CacheContext`, its name, or None.
            signature: what must be equal in all calls of a branch, such as the shapes of its inputs.
            arguments: the arguments of the call by name.
        """
        base = str(getattr(context, "name", context) or "call")
        marks = _marks(arguments)
        mine = [t for t in self._tracks if t.key == (base, signature)]
        free = [t for t in mine if t.step != step]
        known = [t.knows(marks) for t in free]
        track = next((t for t, k in zip(free, known, strict=True) if k), None)
        if track is None:
            any_will_do = len(mine) >= MAX_BRANCHES
            track = next((t for t, k in zip(free, known, strict=True) if k is None or any_will_do), None)
        if track is None and len(mine) >= MAX_BRANCHES:
            return None
        if track is None:
            same = sum(t.name.partition("#")[0] == base for t in self._tracks)
            track = _Track((base, signature), base + (f"#{same + 1}" if same else ""), step)
            self._tracks.append(track)
        track.step, track.marks = step, {n: weakref.ref(v) for n, v in marks.items()}
        return track.name


def _marks(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that hold a call's conditions; of a list with one a row, the first."""
    marks = {}
    for name, value in arguments.items():
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, Tensor) and any(word in name for word in CONDITION_WORDS):
            marks[name] = first
    return marks


def _steps_of(scheduler: Any, values: list[float]) -> list[float]:
    """The timesteps the model is called at: the list of SCM has one more, the end point."""
    steps = getattr(scheduler, "num_inference_steps", None)
    return values[:-1] if isinstance(steps, int) and len(values) == len(set(values)) == steps + 1 else values


def time_argument(model: nn.Module) -> str | None:
    """Name of the argument that carries the timestep, None if the model has none of the usual names."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in TIME_ARGUMENTS if name in parameters), None)
