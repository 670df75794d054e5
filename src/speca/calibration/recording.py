"""Full runs that are learnt from: the prior they show, and the samples they drew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config import SpecaConfig
from ..core.prior import Prior
from ..core.transition import Transition
from ..errors import InputError
from ..reports.measure import generate
from ..reports.report import Report
from ..sampler.response import Response
from ..sampler.scheduler import scheduler_response
from .knowledge import Learner

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Recording:
    """What full runs of some seeds showed.

    Attributes:
        prior: of the outputs.
        transitions: (T,) the steps of the sampler.
        images: (N, ...) the samples, of pipelines in [0, 1].
        branches: rows of a sample in each call of a step, see `Kind`.
    """

    prior: Prior
    transitions: tuple[Transition, ...]
    images: Tensor
    branches: tuple[int, ...] = ()


def record(pipe: DiffusionPipeline, call: dict[str, Any], seeds: Sequence[int], batch: int) -> Recording:
    """Run `seeds` in full, at most `batch` at a time; acceleration that is enabled is disabled.

    Raises:
        InputError: the scheduler's steps are not linear, or nothing could be learnt from the runs.
    """
    learner = Learner()
    made = generate(pipe, call, seeds, SpecaConfig(), batch=batch, calibration=learner)
    response = scheduler_response(pipe.scheduler, **{n: v for n, v in call.items() if n == "eta"})
    return recorded(learner, response, made.images, made.report)


def recorded(learner: Learner, response: Response, images: Tensor, report: Report | None) -> Recording:
    """Return the `Recording` of full runs, given what `learner` kept of them.

    Raises:
        InputError: the sampler is not linear, or no run was completed.
    """
    found = learner.mean(len(images))
    if not response.transitions:
        raise InputError(
            f"there is nothing to calibrate: {response.reason}. Use a linear sampler: flow Euler, DDIM, UniPC, ..."
        )
    if found is None:
        why = " ".join(report.notes) if report is not None else ""
        raise InputError(f"nothing could be learnt from a full run. {why or 'No step was taken.'}")
    kind, prior = found
    return Recording(prior, response.transitions, images, kind.branches)
