"""Measure what skipping a stack of blocks costs in Python: the time a draft of preset "paper" spends in stand-ins.

    python recipes/skip_overhead.py

A tiny FLUX with all of its 57 blocks (19 double, 38 single) is accelerated and called once, for its gate to learn. Then
the loop over its blocks is timed as in an unchecked draft: 56 stand-ins hand their inputs through, the verify block's
gives the forecast. Measured in turn: this loop, the same over functions that return their inputs, which is Python's own
share, and the look, once a call, whether blocks were replaced. The limit for the first is 30 microseconds a step.
"""

from __future__ import annotations

import itertools
from statistics import median
from timeit import timeit
from typing import Any

import diffusers
import torch
import typer

import speca
from speca.diffusers.accelerator import ATTRIBUTE
from speca.verified.gate import Features, Mode

LIMIT = 30.0  # microseconds a step
IMAGE, TEXT, TIME = torch.zeros(1, 16, 32), torch.zeros(1, 6, 32), torch.zeros(1, 32)


def accelerated() -> Any:
    torch.manual_seed(0)
    model: Any = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=19, num_single_layers=38, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    ).eval().requires_grad_(False)  # fmt: skip
    speca.enable(model, "paper", num_inference_steps=50)
    model(
        hidden_states=torch.randn(1, 16, 16), encoder_hidden_states=torch.randn(1, 6, 12), timestep=torch.ones(1),
        pooled_projections=torch.randn(1, 10), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(6, 3),
    )  # fmt: skip
    return model


def loop(*stacks: Any) -> None:
    """FLUX's loop over its blocks, with the arguments it gives them."""
    x, t = IMAGE, TEXT
    for stack in stacks:
        for block in stack:
            t, x = block(
                hidden_states=x, encoder_hidden_states=t, temb=TIME, image_rotary_emb=None, joint_attention_kwargs=None
            )


def pair(hidden_states: Any, encoder_hidden_states: Any, **_: Any) -> Any:
    return encoder_hidden_states, hidden_states


def main(repeats: int = 5000) -> None:
    """Print medians of so many repeats, interleaved; exit code 1 above the limit."""
    drafts = (model := accelerated()).__dict__[ATTRIBUTE].drafts
    gate, (finding,) = drafts.gate, drafts.findings.values()
    gate.arm(finding.learnt)
    gate.mode, gate.forecast = Mode.UNCHECKED, Features([], [TEXT, IMAGE])
    measured = {
        "stand-ins": lambda: loop(model.transformer_blocks, model.single_transformer_blocks),
        "bare functions": lambda: loop([pair] * finding.depth),
        "look for replaced blocks": gate.refresh,
    }
    taken: dict[str, list[float]] = {name: [] for name in measured}
    for _, (name, run) in itertools.product(range(repeats), measured.items()):
        taken[name].append(timeit(run, number=1) * 1e6)
    print(f"{finding.depth} blocks, medians of {repeats}; limit of the stand-ins: {LIMIT:.0f} microseconds a step")
    for name, times in taken.items():
        print(f"{name:<25} {median(times):6.1f} microseconds a step")
    raise typer.Exit(int(median(taken["stand-ins"]) > LIMIT))


if __name__ == "__main__":
    typer.run(main)
