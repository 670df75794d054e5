"""Call bookkeeping: which step, branch and trajectory a call of the transformer belongs to.

Nothing is derived from counting calls alone. In order of preference the step comes from diffusers' `CacheContext`
(index and number of steps), from the pipeline's own scheduler, whose timesteps the given one is looked up in, and, for
a bare transformer told only the number of steps, from the changes of the timestep.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

TIME_ARGUMENTS = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class Position:
    """Where a step stands: index from 0, number of steps, and diffusion time (about 1 at pure noise, 0 at the end)."""

    index: int
    total: int
    noise: float


@dataclass(frozen=True)
class Call:
    """One call placed: its position, its branch, and whether it begins a new trajectory."""

    position: Position
    branch: str
    fresh: bool


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
        self._signature: object = None
        self._scale: tuple[float, float] | None = None
        self._ordinals: dict[str | None, int] = {}

    def host_index(self) -> int | None:
        """The step index the scheduler itself keeps on the host, None where it keeps none."""
        index = getattr(self._scheduler() if self._scheduler else None, "step_index", None)
        return index if isinstance(index, int) else None

    def place(self, given: Any, context: Any, signature: object) -> Call | None:
        """Place a call by the timestep given to the model, its CacheContext and a signature of its inputs.

        Returns None if the step cannot be told; the call is then to be run plainly.
        """
        replaced = self._refresh()
        index = self._without_reading(given, context)
        time = self._values[index] if index is not None and index < len(self._values) else self._read(given)
        position = self._locate(index, time, context)
        if position is None:
            return None
        last = self._last
        fresh = (
            replaced
            or last is None
            or position.index < last.index
            or position.total != last.total
            or signature != self._signature
        )
        if fresh or (last is not None and position.index != last.index):
            self._ordinals = {}
        name = getattr(context, "name", context)
        ordinal = self._ordinals.get(name, 0)
        self._ordinals[name] = ordinal + 1
        if fresh:
            self._start = time
        self._last, self._time, self._signature = position, time, signature
        return Call(position, f"{name or 'call'}" + (f"#{ordinal + 1}" if ordinal else ""), fresh)

    def _refresh(self) -> bool:
        """Take over the scheduler's timesteps; true if they were set anew, as each pipeline run does."""
        scheduler = self._scheduler() if self._scheduler else None
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or timesteps is self._timesteps:
            return False
        self._timesteps, self._scale = timesteps, None
        self._values = [float(v) for v in timesteps.tolist()]
        self._trained = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000)
        return True

    def _without_reading(self, given: Any, context: Any) -> int | None:
        """The step index where it is known on the host: from the context, or as `given` is a view of the timesteps."""
        index = getattr(context, "step_index", None)
        if index is not None:
            return int(index)
        if isinstance(given, Tensor) and isinstance(self._timesteps, Tensor):
            steps = self._timesteps
            same = given.untyped_storage().data_ptr() == steps.untyped_storage().data_ptr()
            if same and given.dtype == steps.dtype and not any(given.stride()):
                return int(given.storage_offset() - steps.storage_offset())
            if given.device.type != "cpu":
                return self.host_index()
        return None

    def _read(self, given: Any) -> float | None:
        """The timestep as a number; None where rows stand at different times, which one clock cannot place."""
        if not isinstance(given, Tensor):
            return None if given is None else float(given)
        self.device_reads += given.device.type != "cpu"
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
        slack, begin = 0.004 * self._trained, self._begin()
        if self._scale is None:
            best = min((self._nearest(time, scale, begin), scale) for scale in self._scales())
            self._scale = best[1] if best[0][0] <= slack else None
        if self._scale is None:
            return None
        hint = self.host_index()
        if hint is not None and hint < len(self._values) and self._miss(time, self._scale, hint) <= slack:
            return hint
        miss, _, index = self._nearest(time, self._scale, begin if self._last is None else self._last.index)
        return index if miss <= slack else None

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


def time_argument(model: nn.Module) -> str | None:
    """Name of the argument that carries the timestep, None if the model has none of the usual names."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in TIME_ARGUMENTS if name in parameters), None)
