"""What only the calls that have led here can tell: which pipeline is calling, and what it knows of the call.

A model's call carries neither its pipeline, nor the number of prompts, nor the arguments that the pipeline will give to
its scheduler. They are read from the frames of the callers, as a debugger would. Each function returns None (or
nothing) where it finds no answer, and its docstring says what is done then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import Tensor

MAX_FRAMES = 40
"""More frames than lie between a model and the code that calls its pipeline."""

PIPELINE_CLASSES = frozenset({"DiffusionPipeline", "ModularPipeline"})
SAMPLES = ("latents", "image_latents_noisy", "sample", "latent")
"""Local variables in which pipelines keep the samples of a step, before guidance stacks copies of them."""


def callers() -> Iterator[FrameType]:
    """Yield the frames of whoever asks and of its callers, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(MAX_FRAMES):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def calling_pipeline() -> Any:
    """Return the pipeline whose method is calling the model.

    None where there is none, as in one's own sampling loop: then the call is placed by what was given to `enable`.
    """
    found = _pipeline_frame()
    return None if found is None else found[1]


def samples_of_call(rows: int) -> int | None:
    """Return how many samples a call of `rows` rows is about: those that the calling pipeline keeps as latents.

    None where that cannot be found; each row is then taken for a sample of its own.
    """
    found = _pipeline_frame()
    if found is None:
        return None
    for frame in _within_pipeline(found[0]):
        for name in SAMPLES:
            holder = frame.f_locals.get("block_state")  # of modular pipelines
            value = frame.f_locals.get(name, getattr(holder, name, None))
            count = len(value) if isinstance(value, (Tensor, list)) and len(value) else 0
            if count and rows % count == 0:
                return count
    return None


def step_arguments() -> dict[str, Any]:
    """Return what the calling pipeline gives its scheduler's `step` besides, such as `eta`.

    Pipelines of diffusers keep it in a variable called `extra_step_kwargs`. Empty where there is none.
    """
    found = (f.f_locals.get("extra_step_kwargs") for f in callers() if "extra_step_kwargs" in f.f_code.co_varnames)
    given = next(found, None)
    return {n: v for n, v in given.items() if n != "generator"} if isinstance(given, dict) else {}


def index_of_loop(element: Callable[[Any], int | None]) -> int | None:
    """Return the step index of the one timestep that the innermost caller with any holds in a variable: its loop's.

    `DiTPipeline` and `HunyuanDiTPipeline` copy the timestep to the device at each step and have schedulers without an
    index. None where no caller, or none unambiguously, holds one: the timestep is then read from the device.

    Args:
        element: from a tensor to its index if it is a view of one of the timesteps.
    """
    for frame in callers():
        numbers = [v for v in list(frame.f_locals.values()) if isinstance(v, Tensor) and not v.dim()]
        held = {element(number) for number in numbers} - {None}
        if held:
            return held.pop() if len(held) == 1 else None
    return None


def _pipeline_frame() -> tuple[FrameType, Any] | None:
    for frame in callers():
        # Frames of torch are passed over: they hold modules as `self`, and there are many of them.
        if not str(frame.f_globals.get("__name__")).startswith("torch."):
            for name in ("self", "components"):  # blocks of modular pipelines are handed their pipeline
                if name in frame.f_code.co_varnames[: frame.f_code.co_argcount]:
                    value = frame.f_locals.get(name)
                    if PIPELINE_CLASSES & {c.__name__ for c in type(value).__mro__}:
                        return frame, value
    return None


def _within_pipeline(frame: FrameType) -> Iterator[FrameType]:
    """The frame of the pipeline's method, and those of its callers that belong to the same pipeline."""
    owner = frame.f_locals.get("self", frame.f_locals.get("components"))
    current: FrameType | None = frame
    while current is not None:
        if owner is not None and any(current.f_locals.get(n) is owner for n in ("self", "components")):
            yield current
        current = current.f_back
