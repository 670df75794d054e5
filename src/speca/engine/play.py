"""One request of an engine from its beginning to its end: on a copy of the pipeline, which shares its models."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..denoiser.executor import Executor
from ..diffusers.accelerator import Accelerator
from ..diffusers.caller import Caller
from ..errors import NotEnabledError
from ..reports.report import Report
from .preview import watch
from .rendezvous import Chance
from .request import Future


def private(pipe: Any, scheduler: Any = None) -> Any:
    """A copy of the pipeline that shares its models but nothing that changes with a run.

    Schedulers and guiders keep the step they are at; so each copy has its own.
    """
    mine = copy.copy(pipe)
    mine.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module) and hasattr(part, "register_to_config"):
            given = scheduler if name == "scheduler" and scheduler is not None else part
            setattr(mine, name, copy.deepcopy(given))
    return mine


def play(
    pipe: Any,
    accelerators: Sequence[Accelerator],
    future: Future,
    executor: Executor,
    begun: Callable[[Any, Caller], None],
) -> Any:
    """Run one request from beginning to end; returns the pipeline's output and the report. `begun` is given its copy of
    the pipeline and its caller."""
    request = future.request
    mine = private(pipe, request.scheduler)
    if request.preview:
        watch(mine.scheduler, future.show)
    owner = weakref.ref(mine)
    known = accelerators[0].knowledge
    caller = Caller(lambda: getattr(owner(), "scheduler", None), None, request.config, known, executor)
    for accelerator in accelerators:
        accelerator.callers[mine] = caller
    begun(mine, caller)
    chance = Chance.here(kinds_of(accelerators))
    torch.manual_seed(request.global_seed)
    try:
        output = mine(**request.call())
    finally:
        chance.restore()
    return output, report_of(caller, accelerators)


def kinds_of(accelerators: Sequence[Accelerator]) -> tuple[str, ...]:
    """Return the kinds of the devices that the models are on, and "cpu"."""
    return tuple(sorted({p.device.type for a in accelerators for p in a.model.parameters()} | {"cpu"}))


def report_of(caller: Caller, accelerators: Sequence[Accelerator]) -> Report | None:
    """Return the report of a run; None where no step was taken."""
    try:
        return caller.report(type(accelerators[0].model).__name__)
    except NotEnabledError:
        return None
