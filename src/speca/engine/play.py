"""One request of an engine from its beginning to its end: on a copy of the pipeline, which shares its models."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser.executor import Executor
from ..diffusers.accelerator import Accelerator
from ..diffusers.caller import Caller
from ..errors import NotEnabledError
from ..reports.report import Report
from .finite import Finite
from .future import Future
from .preview import Told, watched
from .rendezvous import Chance


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
    the pipeline and its caller.

    Raises:
        CancelledError: after a step, when it was cancelled or is late.
        NonFiniteError: what it gives holds NaN or infinity.
    """
    request = future.request
    mine = private(pipe if request.pipe is None else request.pipe, request.scheduler)
    owner = weakref.ref(mine)
    known = accelerators[0].knowledge
    caller = Caller(lambda: getattr(owner(), "scheduler", None), None, request.config, known, executor)
    for accelerator in accelerators:
        accelerator.callers[mine] = caller
    begun(mine, caller)
    chance, finite = Chance.here(kinds_of(accelerators)), Finite()
    finite.watch(mine)
    torch.manual_seed(request.global_seed)
    try:
        with watched(getattr(mine, "scheduler", None), _follow(future, caller, finite)):
            output = mine(**request.call())
    finally:
        chance.restore()
    finite.demand(output)
    return output, report_of(caller, accelerators)


def _follow(future: Future, caller: Caller, finite: Finite) -> Told:
    """What is done after each step of a request's scheduler: tell how far it is, and whether it may go on."""
    done, due, preview = 0, 0, future.request.preview

    def tell(sample: Tensor | None, clean: Callable[[], Tensor | None]) -> None:
        nonlocal done, due
        done += 1
        finite.note("last sample", sample)
        total = caller.run.total if caller.run is not None else 0
        step = min(done, total) if total else done
        shown = clean() if preview == "latents" and future.heard else None
        if isinstance(preview, int) and step * (preview + 1) >= total * (due + 1) and due < preview:
            due += 1  # images are spread evenly over the steps
            if future.heard and (found := clean()) is not None:
                future.shown = step, found
        if shown is not None:
            future.tell("step", step, total, clean=shown)
        else:
            future.reach(step, total)
        if trouble := future.trouble:
            raise trouble

    return tell


def kinds_of(accelerators: Sequence[Accelerator]) -> tuple[str, ...]:
    """Return the kinds of the devices that the models are on, and "cpu"."""
    return tuple(sorted({p.device.type for a in accelerators for p in a.model.parameters()} | {"cpu"}))


def report_of(caller: Caller, accelerators: Sequence[Accelerator]) -> Report | None:
    """Return the report of a run; None where no step was taken."""
    try:
        return caller.report(type(accelerators[0].model).__name__)
    except NotEnabledError:
        return None
