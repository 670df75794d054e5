"""A preview of a request at each of its steps: the finished sample as its scheduler predicts it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


def watch(scheduler: Any, tell: Callable[[Tensor], None]) -> None:
    """Call `tell` with the predicted finished sample after each step of this scheduler, from now on.

    It is what the scheduler returns beside the next sample (DDIM, DDPM, Euler, LCM) or, for a flow, `x - sigma * v`.
    Other schedulers tell nothing. Nothing is computed that a step would wait for, and copies are not watched.
    """
    plain, itself = type(scheduler), weakref.ref(scheduler)

    @functools.wraps(plain.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = plain.step(self, model_output, timestep, sample, *args, **kwargs)
        if self is itself():
            clean = _clean(self, out, model_output, sample)
            if clean is not None:
                tell(clean)
        return out

    scheduler.__class__ = type(plain.__name__, (plain,), {"step": step, "__module__": plain.__module__})


def _clean(scheduler: Any, out: Any, velocity: Tensor, sample: Tensor) -> Tensor | None:
    found = out[1] if isinstance(out, tuple) and len(out) > 1 else getattr(out, "pred_original_sample", None)
    if isinstance(found, Tensor):
        return found
    index = getattr(scheduler, "step_index", None)  # of the next step
    if not hasattr(scheduler, "scale_noise") or not isinstance(index, int) or index < 1:
        return None
    clean: Tensor = sample - scheduler.sigmas[index - 1].to(sample.device) * velocity
    return clean.to(sample.dtype)
