"""Requests of other pipelines that share the engine's models: pictures that begin with a picture beside new ones."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

import speca
from speca import zoo
from speca.engine import Engine, Result

STEPS = 12


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = zoo.load("emoji-flux")
    found.set_progress_bar_config(disable=True)
    return found


def mixed(pipe: Any) -> list[dict[str, Any]]:
    """New pictures and edits in turn, which differ in seed, strength and prompt."""
    edits = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    base = {**zoo.call_arguments("emoji-flux"), "num_inference_steps": STEPS, "output_type": "np", "speedup": 3.0}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    new = [{**base, "prompt": "red apple", "generator_seed": n} for n in range(3)]
    edited = [
        {**base, "prompt": "moon", "generator_seed": n, "image": picture, "strength": 0.5 + 0.2 * n, "pipe": edits}
        for n in range(3)
    ]
    return [request for both in zip(new, edited, strict=True) for request in both]


def run(pipe: Any, mode: Any) -> tuple[list[Result], dict[str, Any]]:
    with Engine(pipe, mode=mode) as engine:
        found = sorted(engine.generate(mixed(pipe)), key=lambda result: result.index)
        return found, engine.statistics


def test_each_is_what_it_is_alone_and_they_share_batches(pipe: Any) -> None:
    together, counted = run(pipe, "continuous")
    alone, _ = run(pipe, "one-at-a-time")
    for one, other in zip(together, alone, strict=True):
        assert one.report is not None and other.report is not None
        assert one.report.samples[0].decisions == other.report.samples[0].decisions
        assert np.abs(one.output[0] - other.output[0]).max() < 1e-3
    lengths = [len(r.report.samples[0].decisions) for r in together if r.report is not None]
    assert lengths[::2] == [STEPS] * 3 and max(lengths[1::2]) < STEPS  # edits begin on the way
    assert counted["lanes"]["full"]["rows_a_batch"] > 3  # of at most six; each kind has three


def test_a_pipeline_of_another_model_is_refused(pipe: Any) -> None:
    other = diffusers.FluxImg2ImgPipeline.from_pipe(zoo.load("emoji-flux"))
    with Engine(pipe) as engine:
        with pytest.raises(speca.InputError, match="has another model than the engine's FluxPipeline"):
            engine.post(prompt="x", image=Image.new("RGB", (64, 64)), pipe=other)
        with pytest.raises(speca.InputError, match="has another model"):
            engine.post(prompt="x", pipe=3)
        with pytest.raises(speca.InputError, match="takes no argument 'strength'"):
            engine.post(prompt="x", strength=0.5)
