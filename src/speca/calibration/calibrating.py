"""calibrating: learn from the runs of one's own loop, or of a pipeline's calls, inside a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config import SpecaConfig
from ..denoiser.denoiser import Denoiser
from ..diffusers.companions import bare
from ..diffusers.components import denoisers_of
from ..diffusers.enable import accelerators_of, disable, enable
from .file import PendingCalibration
from .knowledge import Learner


@contextmanager
def calibrating(target: Any, *, scheduler: Any = None, **settings: Any) -> Iterator[PendingCalibration]:
    """Learn from every run inside, each computed in full; what is yielded serves as `calibration=` afterwards.

        with speca.calibrating(transformer, scheduler=scheduler) as calibration:
            loop()
        speca.enable(transformer, scheduler=scheduler, speedup=5, calibration=calibration)

    Args:
        target: what `speca.enable` takes, whose settings are gone afterwards, or a `speca.Denoiser`.
        scheduler: of a single model, see `speca.enable`.
        **settings: `num_inference_steps`, `time` and `branches` of `speca.enable`.

    Raises:
        InputError: when the calibration is asked for, and nothing could be learnt.
    """
    learner, pending = Learner(), PendingCalibration()
    if isinstance(target, Denoiser):
        before = target.knowledge, target.config
        target.reset()
        target.knowledge, target.config = learner, SpecaConfig()
        try:
            yield pending
        finally:
            target.reset()
            target.knowledge, target.config = before
        pending.finish(learner.mean(), target.name, target.sampler_name)
        return
    enable(target, SpecaConfig(), scheduler=scheduler, calibration=learner, **settings)
    try:
        yield pending
    finally:
        for accelerator in accelerators_of(target):
            accelerator.end()
        disable(target)
    stepped = scheduler if scheduler is not None else getattr(target, "scheduler", None)
    pending.finish(learner.mean(), type(bare(denoisers_of(target)[0])).__name__, type(stepped).__name__)
