"""What a forward takes while it runs: counted on operations whose sizes are known, and used to admit requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import speca
import tiny
from engine.mixes import CLOSE, decisions, distance
from speca.engine import Event
from speca.engine.activations import Peak
from speca.engine.request import Request
from speca.engine.scheduler import Scheduler

KIB = 1024


def test_what_is_made_and_let_go_is_counted() -> None:
    x = torch.zeros(256)  # 1 KiB, made outside
    with Peak() as peak:
        y = x + 1
        z = y.view(16, 16).t()  # a view holds nothing of its own
        z.add_(1)
        assert peak.now == KIB
        w = torch.cat([y, y, y])
        assert peak.now == 4 * KIB
        del w
        assert peak.now == KIB
        del y, z
    assert (peak.now, peak.most) == (0, 4 * KIB)


def test_a_chain_of_layers_holds_two_at_a_time() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(6)]).requires_grad_(False)
    with Peak() as one:
        model(torch.zeros(16, 64))
    with Peak() as four:
        model(torch.zeros(64, 64))
    layer = 16 * 64 * 4
    assert one.most in (2 * layer, 3 * layer)  # its input, made inside, its output, and the one before
    assert four.most == 4 * one.most


def test_room_for_a_full_batch_is_kept_free() -> None:
    scheduler = Scheduler(max_batch=4, memory=100, forward=10)
    scheduler.known[None] = 15
    for request in range(6):
        scheduler.submit(request)
    assert scheduler.admit() == [0, 1, 2, 3]  # four of 15 bytes, and four rows of 10
    scheduler.end(0)
    assert scheduler.admit() == [4]


def test_an_engine_learns_it_from_the_model() -> None:
    case = tiny.dit()
    requests = [dict(class_labels=[k], num_inference_steps=6, generator_seed=k, output_type="np") for k in range(3)]
    with speca.Engine(case.pipe, max_batch=2, memory="64MiB") as engine:
        results = list(engine.generate(requests))
        learnt = engine._loop.scheduler.forward
    assert all(result.error is None for result in results)
    sample, zeros = torch.zeros(2, 4, 4, 4), torch.zeros(2, dtype=torch.long)
    with Peak() as peak:
        case.transformer(sample, timestep=zeros, class_labels=zeros)
    assert learnt == peak.most // 2 > 0


WAYS: dict[str, dict[str, Any]] = {
    "tolerance": dict(),
    "budget": dict(speedup=2.5),
    "one full step": dict(speedup=8.0),
    "verified": dict(preset=tiny.VERIFYING),
}


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_learnt_from_the_first_request_and_then_kept_to(way: str) -> None:
    """From the first full forward of the first request on, which runs alone until then; later ones start by it."""
    case = tiny.dit()
    requests = [
        dict(class_labels=[n], num_inference_steps=8, generator_seed=n, output_type="np", **WAYS[way]) for n in range(7)
    ]
    seen: list[tuple[int, int, int]] = []  # of each event: the request, those that are live, and bytes of a forward

    def listen(event: Event) -> None:
        if event.kind in ("started", "step"):
            seen.append((event.index, engine._loop.scheduler.live, engine._loop.scheduler.forward))

    with speca.Engine(case.pipe, max_batch=4, component_batch=1, memory="1GiB", on_event=listen) as engine:
        roomy = {r.index: r for r in engine.generate(requests)}
        (size,), forward = engine._loop.scheduler.known.values(), engine._loop.scheduler.forward
    first = [(live, known) for index, live, known in seen if index == 0]
    assert first[0] == (1, 0) and seen[len([s for s in seen if s[1] == 1])][1] > 1
    assert all(known == forward > 0 for index, _, known in seen if index > 0), "measured before any other started"
    assert max(live for _, live, _ in seen) >= 6
    held = roomy[0].report.bytes_per_sample * len(roomy[0].report.samples)
    assert held < size < 2 * held
    seen.clear()
    tight = forward * 4 + 3 * size
    with speca.Engine(case.pipe, max_batch=4, component_batch=1, memory=tight, on_event=listen) as engine:
        results = {r.index: r for r in engine.generate(requests)}
        found = engine.statistics
    assert max(live for _, live, _ in seen) == 3
    assert found["bytes"] == 0 and found["done"] == 7
    for n, result in results.items():
        assert decisions(result) == decisions(roomy[n]) and distance(result, roomy[n]) < CLOSE


def size(**asked: Any) -> object:
    names = ["num_inference_steps", "prompt", "guidance_scale", "height", "image", "fps", "num_frames", "strength"]
    return Request.build({"num_inference_steps": 8, "prompt": "a", **asked}, names, speca.SpecaConfig()).size


def test_memory_is_learnt_by_rows_pixels_and_frames_and_not_by_every_number() -> None:
    assert size() == size(prompt="b", tolerance=0.02, threshold=0.5) == size(num_inference_steps=9)
    assert size(fps=8) == size(fps=24) and size(strength=0.4) == size(strength=0.9)
    assert size(guidance_scale=4.0) == size(guidance_scale=2) != size(guidance_scale=1.0)
    small, large = Image.new("RGB", (16, 16)), Image.new("RGB", (64, 16))
    assert size(image=small) == size(image=small.copy()) != size(image=large)
    assert size(image=[small]) != size(image=[large]) != size(image=[large, large])
    others = [
        size(speedup=4.0), size(settings=dict(order=2)), size(settings=dict(prior="none")), size(height=512),
        size(preset="paper"), size(preset=speca.VerifiedConfig(order=2, history_dtype="float16")), size(num_frames=9),
        size(prompt=["a", "b"]), size(image=torch.zeros(1, 3, 8, 8)), size(image=torch.zeros(1, 3, 8, 16)),
    ]  # fmt: skip
    assert len({size(), *others}) == len(others) + 1
    assert size(speedup=4.0) == size(speedup=3.0)
