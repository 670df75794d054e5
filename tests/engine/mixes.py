"""Pipelines, requests of every kind for them, and what each gives alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

import speca
import tiny
from pipelines.cases import RECIPES
from speca import zoo
from speca.engine import Engine, Result

CLOSE = 1e-4  # relative to the largest number of an output, in fp32: another batch size may choose another kernel
PRESETS: list[dict[str, Any]] = [
    dict(),
    dict(preset="fast"),
    dict(preset="paper"),
    dict(preset=tiny.VERIFYING, settings=dict(threshold=0.2, max_draft=3)),
    dict(speedup=3.0),
    dict(preset=tiny.VERIFYING, threshold=0.0),
    dict(preset=speca.VerifiedConfig(rule="interval", max_draft=2)),
    dict(preset=tiny.VERIFYING, settings=dict(threshold=0.08, axis="noise", order=2)),
]
PLANNED: list[dict[str, Any]] = [dict(), dict(preset="fast"), dict(speedup=3.0)]
"""For U-Nets: their drafts cannot be verified, so with the other presets they run plainly, each request alone."""
STEPS = [8, 11, 14, 9]
SCHEDULERS: dict[str, list[Any]] = {
    "tiny-dit": [None, diffusers.DPMSolverMultistepScheduler(), diffusers.DDPMScheduler(clip_sample=False)],
    "flux": [None, diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)],
}
GUIDANCE: dict[str, list[float]] = {
    "tiny-dit": [1.0, 4.0], "fashion-dit": [4.0, 2.0], "flux": [3.5, 1.5], "hunyuan-video-cfg": [6.0, 2.0],
    "wan-2.1": [5.0, 2.0], "sd3": [7.0, 3.0], "emoji-flux": [3.0, 5.0], "emoji-unet": [4.0, 2.0],
    "emoji-video": [3.0, 5.0],
}  # fmt: skip
BUNDLED = [card.name for card in zoo.models()]
TINY = ["hunyuan-video-cfg", "wan-2.1", "sd3", "qwen-image"]


@dataclass
class Mix:
    """A pipeline with a pool of requests, and what each of them gives alone."""

    name: str
    pipe: Any
    pool: list[dict[str, Any]]
    alone: dict[int, Result] = field(default_factory=dict)

    def oracle(self, number: int) -> Result:
        """The request by a plain loop over the pipeline."""
        if number not in self.alone:
            with Engine(self.pipe, mode="one-at-a-time") as engine:
                (self.alone[number],) = engine.generate([self.pool[number]])
        return self.alone[number]

    def demand_same(self, numbers: list[int], **how: Any) -> dict[str, Any]:
        """Run these requests together: each decides as it does alone, and gives the same. Returns statistics."""
        with Engine(self.pipe, **how) as engine:
            results = {r.index: r for r in engine.generate(self.pool[n] for n in numbers)}
            statistics = engine.statistics
        assert sorted(results) == list(range(len(numbers)))
        for index, number in enumerate(numbers):
            together, alone = results[index], self.oracle(number)
            assert decisions(together) == decisions(alone), f"request {number} of {numbers} decided otherwise, {how}"
            assert distance(together, alone) < CLOSE
        return statistics


def decisions(result: Result) -> list[str]:
    """Of each sample, a letter a step."""
    if result.error is not None:
        raise result.error
    assert result.report is not None
    return [sample.decisions for sample in result.report.samples]


def pixels(result: Result) -> Tensor:
    """What the pipeline returned, as numbers."""
    first = result.output[0]
    return first.float() if isinstance(first, Tensor) else torch.as_tensor(np.asarray(first)).float()


def distance(one: Result, other: Result) -> float:
    """The largest difference, relative to the largest number."""
    a, b = pixels(one), pixels(other)
    return float((a - b).abs().max() / b.abs().max())


@functools.lru_cache(maxsize=1)
def mix(name: str, size: int = 8) -> Mix:
    """A pipeline and `size` requests that differ in seed, condition, steps, guidance, settings and scheduler."""
    if name in BUNDLED:
        pipe = zoo.resolve(name)
        base, conditions = zoo.call_arguments(name) | dict(output_type="np"), _bundled(pipe)
    else:
        case = tiny.dit() if name == "tiny-dit" else RECIPES[name].build()
        pipe, base, conditions = case.pipe, case.arguments, case.conditions
    pool, presets = [], PLANNED if hasattr(pipe, "unet") else PRESETS
    for n in range(size):
        asked = {**base, **conditions([n]), **presets[n % len(presets)]}
        if name in GUIDANCE:
            asked["guidance_scale"] = GUIDANCE[name][n % len(GUIDANCE[name])]
        schedulers = SCHEDULERS.get(name, [None])
        scheduler = schedulers[n % len(schedulers)]
        steps = STEPS[n % len(STEPS)]
        pool.append({**asked, "num_inference_steps": steps, "generator_seed": 40 + n, "scheduler": scheduler})
    return Mix(name, pipe, pool)


def _bundled(pipe: Any) -> Any:
    if hasattr(pipe, "labels"):
        return lambda seeds: dict(class_labels=[s % 10 for s in seeds])
    words = ["a red apple", "two cats", "a sailing boat at night", "the sun"]
    return lambda seeds: dict(prompt=[words[s % len(words)] for s in seeds])
