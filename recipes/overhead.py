"""What a call costs beside the model: microseconds of a full step and of a draft, of a transformer that does nothing.

    python recipes/overhead.py

A FLUX-like module that returns a constant is stepped by a loop of 50 steps, with and without `speca` in between. The
difference, divided by the number of full steps or of drafts, is what the library adds to each. Rounds are interleaved;
medians are printed.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import diffusers
import torch
import typer
from torch import Tensor, nn

import speca

STEPS = 50


class Nothing(nn.Module):
    """A model that returns a kept tensor: what is timed is everything but it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity() for _ in range(2)])
        self.register_buffer("out", torch.randn(shape))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return torch.as_tensor(self.out)


def loop(model: nn.Module, scheduler: Any, x: Tensor) -> float:
    """Seconds of the model's calls of one run."""
    scheduler.set_timesteps(STEPS)
    spent = 0.0
    with torch.no_grad():
        for t in scheduler.timesteps:
            began = time.perf_counter()
            out = model(x, t.expand(len(x)))
            spent += time.perf_counter() - began
            x = scheduler.step(out, t, x, return_dict=False)[0]
    return spent


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds, 1 or more.")] = 15,
    rows: Annotated[int, typer.Option(help="Rows of a call, 1 or more.")] = 4,
) -> None:
    """Print microseconds a call, medians over the rounds."""
    torch.set_num_threads(1)
    shape = (rows, 64, 16)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    x = torch.randn(shape)
    settings: dict[str, dict[str, Any]] = {
        "every step in full": dict(schedule=tuple(range(STEPS)), prior="none"),
        "10 full steps, polynomials": dict(speedup=5, prior="none"),
        "10 full steps, a prior": dict(speedup=5, prior="generic"),
        "planned by a tolerance": dict(tolerance=1e-3, prior="none"),
    }
    models = {
        name: speca.enable(Nothing(shape).eval(), scheduler=scheduler, calibration=None, **s)
        for name, s in settings.items()
    }
    plain, times = Nothing(shape).eval(), {name: list[float]() for name in ("plain", *settings)}
    for _ in range(rounds + 1):
        times["plain"].append(loop(plain, scheduler, x))
        for name, model in models.items():
            times[name].append(loop(model, scheduler, x))
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}  # the first round warms up
    for name, model in models.items():
        full = speca.report(model).samples[0].full
        added = 1e6 * (medians[name] - medians["plain"])
        print(f"{name}: {full} full, {STEPS - full} drafts, {added / STEPS:.0f} us a call on average")


if __name__ == "__main__":
    typer.run(main)
