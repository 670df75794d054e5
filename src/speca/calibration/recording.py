"""Full runs of a pipeline, recorded through its scheduler: the outputs it was given, as second moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.prior import Prior
from ..core.transition import Transition
from ..diffusers.enable import disable
from ..errors import InputError
from ..reports.measure import run_once, split
from ..sampler.scheduler import scheduler_response

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Recording:
    """What full runs of some seeds showed: the prior, the sampler's steps, and the images (N, ...) in [0, 1]."""

    prior: Prior
    transitions: tuple[Transition, ...]
    images: Tensor


def record(pipe: DiffusionPipeline, call: dict[str, Any], seeds: Sequence[int], batch: int) -> Recording:
    """Run `seeds` in full, at most `batch` at a time; acceleration that is enabled is disabled first.

    The scheduler is given what guidance has made of the branches, and as guidance is linear, weights that are best for
    that are applied to each branch alike.

    Raises:
        InputError: the scheduler's steps are not linear, or it was stepped in another way than once a timestep.
    """
    disable(pipe)
    total, images = torch.zeros(()), []
    for part, part_seeds in split(call, seeds, batch):
        with _outputs(pipe.scheduler) as outputs:
            images.append(run_once(pipe, part, part_seeds, None).images)
        if len(outputs) != len(pipe.scheduler.timesteps):
            raise InputError(
                f"{type(pipe.scheduler).__name__} took {len(outputs)} steps for {len(pipe.scheduler.timesteps)} "
                "timesteps; use a sampler with one model output a step, such as flow Euler or DDIM."
            )
        samples = torch.stack([out.flatten(1) for out in outputs], 1)  # (B, T, size)
        share = len(part_seeds) / len(seeds) / samples.shape[0] / samples.shape[2]
        total = total + share * torch.einsum("bid,bjd->ij", samples, samples)
    response = scheduler_response(pipe.scheduler, **{n: v for n, v in call.items() if n == "eta"})
    linear = response.transitions
    if not linear:
        raise InputError(
            f"there is nothing to calibrate: {response.reason}. Use a linear sampler: flow Euler, DDIM, UniPC, ..."
        )
    moments = (total + total.T).numpy() / 2
    return Recording(Prior(response.noise, moments, noisy=linear[0].noisy), linear, torch.cat(images))


@contextmanager
def _outputs(scheduler: Any) -> Iterator[list[Tensor]]:
    """The model outputs that the scheduler is given inside, in double precision on the CPU."""
    found: list[Tensor] = []
    step = scheduler.step

    def watched(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(model_output.detach().to("cpu", torch.float64))
        return step(model_output, *args, **kwargs)

    scheduler.step = watched
    try:
        yield found
    finally:
        del scheduler.step
