"""Measure one setting against the full run of the same seeds: quality of each sample, FLOPs, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..diffusers.components import denoisers_of
from ..reports.comparison import psnr
from ..reports.measure import Run, joined, run_once, split, ticking
from .setup import Apply, Setup

WARM_STEPS = 8
IDENTICAL = 150.0  # dB recorded for an identical sample, so that medians and differences stay finite


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count FLOPs with the formulas of PyTorch's counter; a multiply-add counts as two.

    `FlopCounterMode` gives the same sums, but it also tracks modules, which takes twice as long as a small model.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.all, self.total = 0, 0  # FLOPs in total, and inside transformers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.all += formula(*args, **(kwargs or {}), out_val=out)
        return out


@contextmanager
def counted(pipe: Any) -> Iterator[Flops]:
    """Count FLOPs inside the transformers, with overheads and rejected drafts, without VAE and text encoder."""
    began = 0
    with Flops() as flops:

        def start(*_: object) -> None:
            nonlocal began
            began = flops.all

        def stop(*_: object) -> None:
            flops.total += flops.all - began

        with inside(pipe, start, stop):
            yield flops


@dataclass(frozen=True)
class Cost:
    """Cost of a setting over all samples: FLOPs of the transformers, and bytes of memory.

    `peak` is the rise in bytes of the memory of the process (on a GPU: of the device) during the run, None if unknown.
    `kept` is the bytes per sample that the method reports to keep between steps, None if it reports none.
    """

    flops: int
    peak: int | None
    kept: int | None


def played(apply: Apply, pipe: Any, call: dict[str, Any], given: Any, seeds: Sequence[int], batch: int) -> Run:
    """Run all samples of one setting."""
    return timed(apply, pipe, call, given, seeds, batch)[0]


def timed(
    apply: Apply, pipe: Any, call: dict[str, Any], given: Any, seeds: Sequence[int], batch: int
) -> tuple[Run, float]:
    """Run all samples of one setting; return the timed run and the processor seconds spent in the transformers.

    Where `speca` runs, a short run comes first, so work done once per model and input size is not timed. For verified
    drafts this includes the self-test of the gate.
    """
    with apply(pipe, call, given) as setup, ticking(setup.pipe, None, 0):
        parts = split(setup.call, seeds, batch)
        if setup.session:
            first, some = parts[0]
            run_once(setup.pipe, {**first, "num_inference_steps": WARM_STEPS}, some, None)
        spent, began = 0.0, 0.0

        def start(*_: object) -> None:
            nonlocal began
            began = time.process_time()

        def stop(*_: object) -> None:
            nonlocal spent
            spent += time.process_time() - began

        with inside(setup.pipe, start, stop):
            made = _made(setup, parts)
    return made, spent


@contextmanager
def inside(pipe: Any, start: Callable[..., None], stop: Callable[..., None]) -> Iterator[None]:
    """Call `start` before and `stop` after each call of a transformer of the pipeline."""
    hooks = []
    for model in denoisers_of(pipe):
        hooks += [model.register_forward_pre_hook(start, prepend=True), model.register_forward_hook(stop)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def weighed(
    apply: Apply, pipe: Any, call: dict[str, Any], given: Any, seeds: Sequence[int], batch: int
) -> tuple[Run, Cost]:
    """Run all samples; count FLOPs and memory, with the gate's self-test. The seconds include the cost of counting."""
    with apply(pipe, call, given) as setup, ticking(setup.pipe, None, 0), counted(setup.pipe) as flops:
        peak = Peak(setup.pipe)
        made = _made(setup, split(setup.call, seeds, batch))
        kept = setup.bytes() // min(batch, len(seeds)) if setup.bytes else None
    if made.report:
        kept = made.report.bytes_per_sample
    return made, Cost(flops.total, peak.bytes(), kept)


def _made(setup: Setup, parts: Sequence[tuple[dict[str, Any], list[int]]]) -> Run:
    runs, done = [], 0
    for call, seeds in parts:
        if setup.begin:
            setup.begin(done)
        runs.append(run_once(setup.pipe, call, seeds, setup.session))
        done += len(seeds)
    return joined(runs)


class Peak:
    """Measure the rise of memory since creation: of the allocator on a GPU, else of the process (Linux only)."""

    def __init__(self, pipe: Any) -> None:
        self.device = torch.device(pipe._execution_device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before: int | None = torch.cuda.memory_allocated(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or not allowed
            self.before = None
        else:
            self.before = _status("VmRSS")

    def bytes(self) -> int | None:
        """Return the peak in bytes above the memory in use at the beginning; None if unknown."""
        if self.before is None:
            return None
        now = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return max(0, now - self.before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def quality(images: Tensor, references: Tensor) -> dict[str, list[float]]:
    """Return PSNR (dB), SSIM and relative L2 of each sample from floats (N, ..., height, width, channels) in [0, 1]."""
    gap = (images.double() - references.double()).flatten(1).norm(dim=1)
    similar = ssim(images, references)
    return {
        "psnr": [IDENTICAL if math.isinf(value) else round(value, 3) for value in psnr(images, references).tolist()],
        "ssim": [round(value, 5) for value in similar],
        "relative_l2": [float(f"{v:.5g}") for v in gap / references.double().flatten(1).norm(dim=1).clamp_min(1e-12)],
    }


def ssim(images: Tensor, references: Tensor) -> list[float]:
    """Return the SSIM of each sample (for a video the mean over frames); empty without torchmetrics."""
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
    """Return the number of full steps of each sample; without a report, estimate one number for all from the FLOPs."""
    if made.report:
        return [float(sample.full + sample.rejected) for sample in made.report.samples]
    return [steps * flops / flops_full] * len(made.images)
