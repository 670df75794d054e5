"""What a forward takes while it runs: counted on operations whose sizes are known, and used to admit requests."""

from __future__ import annotations

import torch
from torch import nn

import speca
import tiny
from speca.engine.activations import Peak
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
        learnt = engine._hub.scheduler.forward
    assert all(result.error is None for result in results)
    sample, zeros = torch.zeros(2, 4, 4, 4), torch.zeros(2, dtype=torch.long)
    with Peak() as peak:
        case.transformer(sample, timestep=zeros, class_labels=zeros)
    assert learnt == peak.most // 2 > 0
