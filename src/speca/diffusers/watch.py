"""What a scheduler is given during a run that is learnt from: the outputs that guidance has made of the branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..denoiser.run import Run


def watch(scheduler: Any, run: Run) -> Callable[[], None]:
    """Let a run record what `scheduler.step` is given from now on, in place of the outputs of its single branches.

    Moments of what guidance makes of the branches say best how a guided run goes, and as guidance is linear, weights
    that are best for that are applied to each branch alike. Returns a function that ends this.
    """
    step, own, count = scheduler.step, vars(scheduler).get("step"), 0

    def watched(model_output: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if run.recorder is not None and isinstance(model_output, Tensor):
            run.recorder.add(count, model_output, guided=True)
            run.learn()
        count += 1
        return step(model_output, *args, **kwargs)

    def end() -> None:
        if vars(scheduler).get("step") is watched:
            if own is None:
                del scheduler.step
            else:
                scheduler.step = own

    scheduler.step = watched
    return end
