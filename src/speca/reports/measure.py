"""Timed runs of a pipeline over many seeds: batches, seconds inside the transformer, progress by step."""

from __future__ import annotations

import inspect
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..config import Config, SpecaConfig
from ..diffusers.components import denoisers_of
from ..diffusers.enable import Session, enabled
from ..errors import InputError, SpecaError
from .report import Report

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Ticker = Callable[[int, int], None]
"""Called after every denoising step with (steps done, steps in all)."""

_SCHEDULES = ("timesteps", "sigmas")  # lists with one entry a step, never one a sample


@dataclass(frozen=True)
class Run:
    """Samples of all seeds. Images are (N, height, width, channels) in [0, 1]; a video has frames after N."""

    images: Tensor
    seconds: float  # inside the transformer, with the work of `speca`
    seconds_total: float  # in the pipeline, text encoder and VAE included
    report: Report | None  # None without acceleration
    hardware: dict[str, Any]


def generate(
    pipe: DiffusionPipeline,
    call_kwargs: dict[str, Any],
    seeds: Sequence[int],
    config: Config | str = "balanced",
    *,
    batch: int = 16,
    progress: Ticker | None = None,
    **how: Any,
) -> Run:
    """Make one sample a seed with acceleration, at most `batch` at a time.

    `call_kwargs` goes to the pipeline. A list or tensor in it that is as long as `seeds` (labels, prompts,
    embeddings) has one entry a sample; every other value is shared. Sample k depends on its own seed and entries
    only, not on `batch`. Further arguments are those of `enable`, but nothing is learnt unless `calibration="auto"`.
    """
    settings, how = SpecaConfig.build(config), {"calibration": None, **how}
    chunks = split(call_kwargs, seeds, batch)
    with ticking(pipe, progress, len(chunks) * steps_of(pipe, call_kwargs)), enabled(pipe, settings, **how) as session:
        return joined([run_once(pipe, *chunk, session) for chunk in chunks])


def split(call_kwargs: dict[str, Any], seeds: Sequence[int], batch: int) -> list[tuple[dict[str, Any], list[int]]]:
    """Return the arguments and seeds of each call."""
    if not seeds or batch < 1:
        raise InputError(f"there is nothing to make with {len(seeds)} seeds in batches of {batch}; give at least 1.")
    chunks = []
    for begin in range(0, len(seeds), batch):
        part = slice(begin, begin + batch)
        call = {
            name: value[part] if _per_sample(name, value, len(seeds)) else value for name, value in call_kwargs.items()
        }
        chunks.append((call, list(seeds[part])))
    return chunks


def _per_sample(name: str, value: Any, count: int) -> bool:
    batched = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
    return batched and len(value) == count and name not in _SCHEDULES


def steps_of(pipe: DiffusionPipeline, call_kwargs: dict[str, Any]) -> int:
    default = inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    return int(call_kwargs.get("num_inference_steps", default))


PROMPTS = ("a red apple", "a smiling face", "a small house", "a blue car", "a cat", "a tree", "a star", "a boat")

OBJECTS, WAYS = (
    ("red apple", "sailboat", "dog face", "soccer ball", "airplane", "banana", "penguin", "automobile", "butterfly",
     "rocket", "cat face"),
    ("left", "right", "up", "down"),
)  # fmt: skip
"""Words of the prompts for video models; 11 objects and 4 directions are coprime, so all pairs occur."""


def makes_clips(pipe: Any) -> bool:
    """Return whether the pipeline makes videos."""
    return hasattr(getattr(getattr(pipe, "vae", None), "config", None), "temporal_compression_ratio")


def moving_prompt(seed: int) -> str:
    """Return a prompt such as "a red apple moving left", a function of the seed alone."""
    return f"a {OBJECTS[seed % len(OBJECTS)]} moving {WAYS[seed % len(WAYS)]}"


def example_call(pipe: Any, seeds: Sequence[int]) -> dict[str, Any]:
    """Return arguments with one class or prompt per seed, a function of the seed alone.

    Raises InputError if the pipeline takes neither.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    if "class_labels" in accepted:
        named = sorted(set(getattr(pipe, "labels", {}).values()))
        classes = named or list(range(pipe.transformer.config.num_embeds_ada_norm))
        return {"class_labels": [classes[seed % len(classes)] for seed in seeds]}
    if "prompt" in accepted:
        clips = makes_clips(pipe)
        return {"prompt": [moving_prompt(s) if clips else PROMPTS[s % len(PROMPTS)] for s in seeds]}
    raise InputError(f"{type(pipe).__name__} takes neither class_labels nor prompt; say what it is to be called with.")


def run_once(pipe: DiffusionPipeline, call: dict[str, Any], seeds: list[int], session: Session | None) -> Run:
    """One timed call of the pipeline, with the report of `session` if it is accelerated."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with _clocked(pipe) as clock:
        begin = _now()
        output = pipe(**call, generator=generators, output_type="np")[0]
        total = _now() - begin
    report = session.report() if session else None
    if report and len(report.samples) != len(seeds):
        why = "; ".join(report.notes) or f"it recorded {len(report.samples)} samples instead of {len(seeds)}"
        raise SpecaError(
            f"{report.model} was not accelerated sample by sample: {why.rstrip('.')}; run it without speca."
        )
    images = torch.as_tensor(np.asarray(output), dtype=torch.float32)
    if len(images) != len(seeds):
        raise InputError(f"{len(seeds)} seeds gave {len(images)} samples; ask for one sample a label or prompt.")
    if not images.isfinite().all():
        raise SpecaError("the pipeline made pixels that are no numbers; use a wider dtype, float32 or bfloat16.")
    return Run(images, clock.seconds, total, report, hardware(pipe))


def joined(runs: list[Run]) -> Run:
    """Merge the runs of several calls; samples are numbered in order."""
    reports = [run.report for run in runs if run.report]
    return Run(
        images=torch.cat([run.images for run in runs]),
        seconds=sum(run.seconds for run in runs),
        seconds_total=sum(run.seconds_total for run in runs),
        report=_join_reports(reports) if reports else None,
        hardware=runs[0].hardware,
    )


def _join_reports(reports: list[Report]) -> Report:
    samples = [sample for report in reports for sample in report.samples]
    estimates = [report.seconds_full for report in reports if report.seconds_full is not None]
    return replace(
        reports[0],
        samples=tuple(replace(sample, index=index) for index, sample in enumerate(samples)),
        evaluations=sum(report.evaluations for report in reports),
        evaluations_full=sum(report.evaluations_full for report in reports),
        flops=_sum([report.flops for report in reports]),
        flops_full=_sum([report.flops_full for report in reports]),
        seconds=sum(report.seconds for report in reports),
        seconds_full=sum(estimates) if len(estimates) == len(reports) else None,
        host_reads=sum(report.host_reads for report in reports),
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
    )


def _sum(values: list[float | None]) -> float | None:
    """Return the sum, None if any value is None."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


class _Clock:
    """Seconds spent inside a transformer."""

    def __init__(self) -> None:
        self.seconds = self._began = 0.0

    def start(self, *_: object) -> None:
        self._began = _now()

    def stop(self, *_: object) -> None:
        self.seconds += _now() - self._began


def _now() -> float:
    """Seconds, after all work given to an accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@contextmanager
def _clocked(pipe: DiffusionPipeline) -> Iterator[_Clock]:
    """Measure the time inside the calls of the transformers, accelerated or plain."""
    clock, hooks = _Clock(), []
    for transformer in denoisers_of(pipe):
        hooks.append(transformer.register_forward_pre_hook(clock.start, prepend=True))
        hooks.append(transformer.register_forward_hook(clock.stop))
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


class _Steps:
    """Stands in for the progress bar of a pipeline: an iterator, or a context with `update`."""

    def __init__(self, steps: Iterable[Any], tick: Callable[[], None]) -> None:
        self._steps, self._tick = steps, tick

    def __iter__(self) -> Iterator[Any]:
        for step in self._steps:
            yield step
            self._tick()

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, count: int = 1) -> None:
        for _ in range(count):
            self._tick()


@contextmanager
def ticking(pipe: DiffusionPipeline, progress: Ticker | None, total: int) -> Iterator[None]:
    """Send the progress of the pipeline's calls, `total` steps in all, to `progress`, and nowhere else."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    own = vars(pipe).get("progress_bar")  # normally the class has it alone
    pipe.progress_bar = lambda iterable=(), total=None: _Steps(iterable, tick)
    try:
        yield
    finally:
        del pipe.progress_bar
        if own:
            pipe.progress_bar = own


def hardware(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return a description of the device and the number of threads."""
    import diffusers

    device = torch.device(pipe._execution_device)  # an offloaded pipeline's `device` is the CPU
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "dtype": str(denoisers_of(pipe)[0].dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def _processor() -> str:
    """Return the model name of the CPU, or the nearest that the system reports."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
