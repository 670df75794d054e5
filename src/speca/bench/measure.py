"""One setting measured against the full run of the same seeds: quality of each sample, FLOPs, seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..compare import psnr
from ..measure import Run, joined, run_once, split, ticking
from ..pipeline import transformers_of
from .methods import Method, random_schedule, uniform_schedule

IDENTICAL = 150.0  # dB recorded for an identical sample, so that medians and differences stay finite


class Flops:
    """FLOPs of the transformers, by PyTorch's counter: a multiply-add is two."""

    total = 0


@contextmanager
def counted(pipe: Any) -> Iterator[Flops]:
    """Count what runs inside the transformers, overheads and rejected drafts included, but not VAE or text encoder."""
    flops, hooks, began = Flops(), [], 0
    with FlopCounterMode(display=False) as counter:

        def start(*_: object) -> None:
            nonlocal began
            began = counter.get_total_flops()

        def stop(*_: object) -> None:
            flops.total += counter.get_total_flops() - began

        for model in transformers_of(pipe):
            hooks += [model.register_forward_pre_hook(start, prepend=True), model.register_forward_hook(stop)]
        try:
            yield flops
        finally:
            for hook in hooks:
                hook.remove()


def run(method: Method, pipe: Any, call: dict[str, Any], value: Any, seeds: Sequence[int], batch: int) -> Run:
    """All samples of one setting, timed as in `speca generate --compare`."""
    with method.apply(pipe, call, value) as setup, ticking(setup.pipe, None, 0):
        return joined([run_once(setup.pipe, *part, setup.session) for part in split(setup.call, seeds, batch)])


def run_counted(
    method: Method, pipe: Any, call: dict[str, Any], value: Any, seeds: Sequence[int], batch: int
) -> tuple[Run, int]:
    """The same with FLOPs; counting slows a run, so its seconds mean nothing."""
    with method.apply(pipe, call, value) as setup, ticking(setup.pipe, None, 0), counted(setup.pipe) as flops:
        made = joined([run_once(setup.pipe, *part, setup.session) for part in split(setup.call, seeds, batch)])
    return made, flops.total


def quality(images: Tensor, references: Tensor) -> dict[str, list[float]]:
    """PSNR in dB, SSIM and relative L2 of each sample; both are (N, ..., height, width, channels) floats in [0, 1]."""
    gap = (images.double() - references.double()).flatten(1).norm(dim=1)
    return {
        "psnr": [IDENTICAL if math.isinf(value) else value for value in psnr(images, references).tolist()],
        "ssim": ssim(images, references),
        "relative_l2": (gap / references.double().flatten(1).norm(dim=1).clamp_min(1e-12)).tolist(),
    }


def ssim(images: Tensor, references: Tensor) -> list[float]:
    """Structural similarity of each sample, of a video the mean over frames; empty without torchmetrics."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as measure
    except ImportError:
        return []
    count, shape = len(images), images.shape[-3:]
    one, other = (x.reshape(-1, *shape).movedim(-1, 1) for x in (images, references))
    if min(one.shape[-2:]) < 11:  # its window
        return []
    values = torch.as_tensor(measure(one, other, data_range=1.0, reduction="none"))
    return [float(v) for v in values.reshape(count, -1).mean(1)]


def full_steps(made: Run, steps: int, flops: int, flops_full: int) -> list[float]:
    """Steps that each sample computed in full; where nothing was recorded, the equivalent of the FLOPs, for all."""
    if made.report:
        return [float(sample.full + sample.rejected) for sample in made.report.samples]
    return [steps * flops / flops_full] * len(made.images)


def search(
    method: Method, pipe: Any, call: dict[str, Any], full: int, seeds: Sequence[int], batch: int, tries: int
) -> frozenset[int]:
    """The best schedule of `full` steps found in `tries` runs over tuning seeds: local search from an even one.

    Best is the lowest mean relative L2 to the full run.
    """
    steps = call["num_inference_steps"]
    reference = torch.cat([run_once(pipe, *part, None).images for part in split(call, seeds, batch)])

    def loss(schedule: frozenset[int]) -> float:
        values = quality(run(method, pipe, call, schedule, seeds, batch).images, reference)["relative_l2"]
        return sum(values) / len(values)

    best = uniform_schedule(steps, full)
    least = loss(best)
    for attempt in range(tries):
        # Swap one full step for one that a fresh random schedule has; the first two are anchors and stay.
        spare = sorted(random_schedule(steps, full, seed=attempt) - best)
        movable = sorted(best - {0, 1})
        if not spare or not movable:
            continue
        proposal = best - {movable[attempt % len(movable)]} | {spare[attempt % len(spare)]}
        if (now := loss(proposal)) < least:
            best, least = proposal, now
    return best
