"""The gate on models the library has never seen: discovered, or found hostile and run plainly."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import speca
import tiny
from speca.diffusers.accelerator import ATTRIBUTE


class Joint(nn.Module):
    """A block with two streams, the text first in its outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, picture: torch.Tensor, words: torch.Tensor, shift: torch.Tensor) -> Any:
        new = words + 0.3 * torch.tanh(self.text(words) + picture.mean(1, keepdim=True))
        return new, picture + 0.3 * torch.tanh(self.image(picture) + shift[:, None] + words.mean(1, keepdim=True))


class Single(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return tokens + 0.3 * torch.tanh(self.mix(tokens) + shift[:, None])


class Unheard(nn.Module):
    """Two block lists with glue between them; nothing the library could know by name."""

    def __init__(self, hostile: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hostile, self.memo = hostile, torch.zeros(())
        self.front = nn.ModuleList(Joint(8) for _ in range(3))
        self.back = nn.ModuleList(Single(8) for _ in range(4))
        self.time, self.head = nn.Linear(1, 8), nn.Linear(8, 8)
        self.eval().requires_grad_(False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, words: torch.Tensor) -> Any:
        shift = torch.sin(self.time(timestep[:, None].float() / 100))
        x, text = sample, words
        for block in self.front:
            text, x = block(x, text, shift)
        middle = x
        x = torch.cat([text, x], 1)
        for i, block in enumerate(self.back):
            x = block(x, shift=shift)
            if self.hostile == "memo" and i == 1 and getattr(block, "mix", None) is not None:
                self.memo = x
        x = x[:, words.shape[1] :]
        if self.hostile == "added after":
            x = x + middle
        if self.hostile == "memo":
            x = x + self.memo[:, words.shape[1] :]
        return (self.head(x),)


class Writes(Single):
    """Leaves something behind that the model's tail reads."""

    store: ClassVar[list[torch.Tensor]] = []

    def forward(self, tokens: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        out = super().forward(tokens, shift)
        Writes.store[:] = [out.mean()]
        return out


class WritesGlobal(Unheard):
    def __init__(self) -> None:
        super().__init__()
        self.back[0] = Writes(8).eval().requires_grad_(False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, words: torch.Tensor) -> Any:
        return (super().forward(sample, timestep, words)[0] + Writes.store[0],)


def loop(model: nn.Module, rows: int = 3, steps: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, words = torch.randn(4, 5, 8, generator=generator)[:rows], torch.randn(4, 2, 8, generator=generator)[:rows]
    for i in range(steps):
        t = torch.full((rows,), 1000.0 * (1 - i / steps))
        x = x - 0.05 * model(x, t, words=words)[0]
    return x


@pytest.mark.parametrize("rows", [1, 3])
def test_an_unknown_model_is_discovered_and_accelerated(rows: int) -> None:
    model = Unheard()
    plain = loop(model, rows)
    speca.enable(model, tiny.VERIFYING, num_inference_steps=12, threshold=0.0, min_draft=0)
    assert torch.equal(loop(model, rows), plain)
    speca.enable(model, tiny.VERIFYING, num_inference_steps=12, threshold=1e9, min_draft=0, max_draft=2)
    close = loop(model, rows)
    report = speca.report(model)
    assert "runs plainly" not in " ".join(report.notes) and report.samples[0].accepted == 6
    assert 0 < (close - plain).norm() / plain.norm() < 0.05
    finding = next(iter(model.__dict__[ATTRIBUTE].drafts.findings.values()))
    assert finding.verify_block == "back.3" and finding.state == ("tokens",)
    assert finding.blocks == (("front", 3), ("back", 4))


class InPlace(Single):
    """Adds to its input in place, as some blocks do to save memory."""

    def forward(self, tokens: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        tokens += 0.3 * torch.tanh(self.mix(tokens) + shift[:, None])
        return tokens


def test_a_verify_block_that_writes_into_its_input_is_recorded_as_it_was_given() -> None:
    results = []
    for kind in (Single, InPlace):
        model = Unheard()
        last = kind(8).eval().requires_grad_(False)
        last.load_state_dict(model.back[3].state_dict())
        model.back[3] = last
        speca.enable(model, tiny.VERIFYING, num_inference_steps=12, threshold=1e9, min_draft=0, max_draft=2)
        results.append(loop(model))
        assert speca.report(model).samples[0].accepted == 6
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("make", [WritesGlobal, lambda: Unheard("added after"), lambda: Unheard("memo")])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_hostile_model_runs_plainly_and_correctly(make: Any, rows: int) -> None:
    model = make()
    plain = loop(model, rows)
    speca.enable(model, tiny.VERIFYING, num_inference_steps=12, threshold=1e9)
    with pytest.warns(UserWarning, match="runs plainly"):
        assert torch.equal(loop(model, rows), plain)
    report = speca.report(model)
    assert report.evaluations == report.evaluations_full == 12 * rows and report.flops_speedup == 1.0


def test_a_gated_list_looks_as_it_did() -> None:
    model = Unheard()
    keys = list(model.state_dict())
    speca.enable(model, tiny.VERIFYING, num_inference_steps=12)
    assert type(model.back) is not nn.ModuleList
    assert len(model.back) == 4 and model.back[-1].mix.weight.shape == (8, 8)
    assert all(isinstance(block, Single) for block in model.back)
    assert isinstance(model.back[1:3], nn.ModuleList) and list(model.state_dict()) == keys
    twin = copy.deepcopy(Unheard())
    twin.load_state_dict(model.state_dict())
    speca.disable(model)
    assert type(model.back) is nn.ModuleList
