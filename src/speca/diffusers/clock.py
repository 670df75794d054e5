"""Which step of which run a call of the model belongs to.

Nothing is derived from counting calls alone. In order of preference the step comes from diffusers' `CacheContext`
(index and number of steps), from the scheduler of the pipeline that is calling, whose timesteps the given one is looked
up in, and, for a bare model with only a number of steps, from the changes of the timestep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .stack import index_of_loop


@dataclass(frozen=True)
class Position:
    """Where a call stands.

    Attributes:
        index, total: index of the step, from 0, and number of steps.
        noise: diffusion time, about 1 at pure noise and 0 at the end.
        fresh: whether it begins a new run.
        jumped: whether steps before it were left out.
    """

    index: int
    total: int
    noise: float
    fresh: bool = False
    jumped: bool = False


class Clock:
    """Places calls on the time axis of one run after another.

    Attributes:
        problem: why the last call could not be placed.
        device_reads: times that a timestep was read from the device.
    """

    def __init__(self, scheduler: Callable[[], Any], num_inference_steps: int | None) -> None:
        """
        Args:
            scheduler: returns the scheduler in use at the moment of a call, as pipelines let users swap it, or None.
            num_inference_steps: number of steps, where no scheduler is known.
        """
        self.scheduler, self._steps = scheduler, num_inference_steps
        self._timesteps: Any = None
        self._values: list[float] = []
        self._trained = 1000.0
        self.device_reads = 0
        self.problem = ""
        self.reset()

    def reset(self) -> None:
        """Forget the run under way; the next call begins a new one."""
        self._last: Position | None = None
        self._time: float | None = None
        self._start: float | None = None
        self._scale: tuple[float, float] | None = None
        self._calls, self._usual = 0, 0  # at this step so far, and at the step before

    def host_index(self) -> int | None:
        """Return the step index that the scheduler keeps on the host, or will begin with; None where it keeps none."""
        scheduler = self.scheduler()
        kept = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
        return next((index for index in kept if isinstance(index, int)), None)

    def place(self, given: Any, context: Any = None) -> Position | None:
        """Place a call by the timestep given to the model and its CacheContext.

        Returns None if its step cannot be found, and `problem` says why; the call is then to be run plainly.
        """
        self.problem = "its step is not on the scheduler's time axis, or its rows differ in time"
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
        jumped = not fresh and last is not None and position.index > last.index + 1
        return replace(position, fresh=fresh, jumped=jumped)

    def peek(self, given: Any) -> int | None:
        """Return the step index of a call of another model at the time `given`, without placing it; None if unknown."""
        self._refresh()
        index = self._without_reading(given, None)
        if index is not None or not self._values:
            return index
        time = self._read(given)
        return None if time is None else self._look_up(time)

    def _refresh(self) -> bool:
        """Take over the scheduler's timesteps; true if they were set anew, as each pipeline run does."""
        scheduler = self.scheduler()
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
            return index_of_loop(self._element) if index is None else index
        return index

    def _element(self, given: Any) -> int | None:
        """Which one of the timesteps it is, where it is a view of one of them."""
        steps = self._timesteps
        if not isinstance(given, Tensor) or not isinstance(steps, Tensor) or given.dtype != steps.dtype:
            return None
        same = given.untyped_storage().data_ptr() == steps.untyped_storage().data_ptr()
        return int(given.storage_offset() - steps.storage_offset()) if same and not any(given.stride()) else None

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

        The scale is settled at the first call of a run, by the step nearest to where the scheduler begins. The
        scheduler's own index decides where it fits, as second-order schedulers repeat timesteps; otherwise the nearest
        timestep, and among equals the one nearest to the last call. Half precision rounds timesteps by 0.4 %.
        """
        slack, begin = 0.004 * max(map(abs, self._values)), self._begin()
        if self._scale is None:
            scales = (1.0, 0.0), (1 / self._trained, 0.0), (-1 / self._trained, 1.0)  # t, t / T, 1 - t / T
            best = min((self._nearest(time, scale, begin), scale) for scale in scales)
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
        if not hasattr(self.scheduler(), "step_index"):
            return None
        kept = self.host_index()
        index = self._begin() if kept is None else min(kept, len(self._values) - 1)
        stands = self._last is not None and self._last.index == index and self._time != time
        return None if stands else index

    def _miss(self, time: float, scale: tuple[float, float], index: int) -> float:
        """How far `time` is from a timestep in a scale: a factor and a shift."""
        return round(abs(self._values[index] * scale[0] + scale[1] - time) / abs(scale[0]), 6)

    def _nearest(self, time: float, scale: tuple[float, float], near: int) -> tuple[float, int, int]:
        """Miss, distance from step `near`, and index of the timestep that fits best."""
        return min((self._miss(time, scale, i), abs(i - near), i) for i in range(len(self._values)))

    def _begin(self) -> int:
        begin = getattr(self.scheduler(), "begin_index", None)
        return begin if isinstance(begin, int) else 0

    def _count(self, time: float) -> Position | None:
        if self._steps is None:
            return None
        index = 0
        if self._last is not None and self._time is not None and time == self._time:
            index = self._last.index
        elif self._last is not None and not self._turned(time):
            index = self._last.index + 1
            if index >= self._steps:  # time goes on, so this is no new run
                self.problem = (
                    f"it was called at more times than num_inference_steps={self._steps} says; give the number of "
                    "calls of one run, or wrap the model with speca.Denoiser(model, sampler=..., sigmas=...)"
                )
                return None
        return Position(index, self._steps, time)

    def _turned(self, time: float) -> bool:
        """Whether time moves against the direction of the run so far; never before the second step."""
        if self._time is None or self._start is None:
            return False
        return (self._time - self._start) * (time - self._time) < 0


def _steps_of(scheduler: Any, values: list[float]) -> list[float]:
    """The timesteps the model is called at: the list of SCM has one more, the end point."""
    steps = getattr(scheduler, "num_inference_steps", None)
    return values[:-1] if isinstance(steps, int) and len(values) == len(set(values)) == steps + 1 else values
