"""One's own sampling loop over a bare transformer: a budget of `speca` beside TaylorSeer where it does best.

    python recipes/own_loop.py --samples 32

The transformer of `emoji-video` (12 blocks, rectified flow) is stepped by hand with FlowMatchEulerDiscreteScheduler, as
by somebody who has nothing else: no pipeline, no calibration. At the same number of full steps stand first-order Taylor
forecasts on even steps, on the schedule annealed on a recording of tuning seeds, and on the best one found from there
by running the model; and the same budget with the calibration that the model brings. PSNR of decoded clips to the
loop's own without acceleration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from ablation import row_of, show
from torch import Tensor

import speca
from speca.bench.methods import scheduled
from speca.bench.recording import TuningData, anneal, uniform_schedule
from speca.bench.search import search
from speca.calibration import Calibration
from speca.reports.comparison import psnr
from speca.reports.measure import example_call
from speca.zoo import call_arguments, load

MODEL, TUNING, GUIDANCE = "emoji-video", 600_000, 6.0
TAYLOR: dict[str, Any] = dict(preset="paper", rule="schedule", order=1, warmup=2)


class Loop:
    """The sampling loop of a text-to-video flow, written out; clips (N, frames, 3, H, W) in [0, 1]."""

    def __init__(self, pipe: Any, call: dict[str, Any], seeds: list[int], steps: int) -> None:
        self.pipe, self.steps = pipe, steps
        words, pooled, mask = pipe.encode_prompt(call["prompt"], max_sequence_length=call["max_sequence_length"])
        self.conditions = dict(encoder_hidden_states=words, encoder_attention_mask=mask, pooled_projections=pooled)
        self.noise = torch.cat([self._noise(seed, call) for seed in seeds])

    def _noise(self, seed: int, call: dict[str, Any]) -> Tensor:
        channels, generator = self.pipe.transformer.config.in_channels, torch.Generator().manual_seed(seed)
        size = (call["height"], call["width"], call["num_frames"])
        noise: Tensor = self.pipe.prepare_latents(
            1, channels, *size, torch.float32, torch.device("cpu"), generator, None
        )
        return noise

    @torch.no_grad()
    def __call__(self) -> Tensor:
        scheduler, x = self.pipe.scheduler, self.noise
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, self.steps + 1)[:-1])
        guidance = torch.full((len(x),), 1000 * GUIDANCE)
        for t in scheduler.timesteps:
            velocity = self.pipe.transformer(
                hidden_states=x, timestep=t.expand(len(x)), guidance=guidance, **self.conditions, return_dict=False
            )[0]
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        vae = self.pipe.vae
        clips = torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in x.split(4)])
        return (clips.transpose(1, 2) / 2 + 0.5).clamp(0, 1)


def schedules(pipe: Any, steps: int, full: int, tuning: int, tries: int) -> dict[str, list[int]]:
    """Where first-order forecasts are computed in full: even, annealed and searched on `tuning` seeds."""
    seeds = list(range(TUNING, TUNING + tuning))
    call = {**call_arguments(MODEL), **example_call(pipe, seeds), "num_inference_steps": steps}
    data = TuningData(pipe, call, seeds, call, seeds, batch=8, tries=tries)
    return {
        "even": uniform_schedule(steps, full),
        "annealed": anneal(data.recording(), full),
        "searched": search(scheduled(False), False)(data, full),
    }


def main(
    samples: Annotated[int, typer.Option(help="Samples, on seeds from 0.", min=2)] = 32,
    tuning: Annotated[int, typer.Option(help="Tuning samples of the schedules.", min=1)] = 8,
    tries: Annotated[int, typer.Option(help="Runs of the search.", min=1)] = 40,
    speedup: Annotated[float, typer.Option(help="Budget.", min=2)] = 5.0,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=8)] = 50,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("docs/results"),
) -> None:
    """Run every row and print the table."""
    torch.set_num_threads(threads)
    pipe = load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(samples))
    call = {**call_arguments(MODEL), **example_call(pipe, seeds)}
    loop, full = Loop(pipe, call, seeds, steps), int(steps / speedup)
    settings: dict[str, dict[str, Any]] = {
        "speca.enable(transformer, scheduler=..., speedup=...)": dict(speedup=speedup, calibration=None),
        "the same, calibrated": dict(speedup=speedup, calibration=Calibration.beside(pipe)),
        "the same, prior='generic'": dict(speedup=speedup, prior="generic"),
    }
    for name, chosen in schedules(pipe, steps, full, tuning, tries).items():
        settings[f"Taylor-1, {name} steps"] = dict(TAYLOR, schedule=tuple(chosen))
    plain, rows = loop(), []
    for name, how in settings.items():
        speca.enable(pipe.transformer, scheduler=pipe.scheduler, num_inference_steps=steps, **how)
        values, report = psnr(loop(), plain).tolist(), speca.report(pipe.transformer)
        speca.disable(pipe.transformer)
        rows.append(row_of(name, report, values))
    show(rows, out / f"own-loop-{MODEL}.json", seeds=seeds, steps=steps)


if __name__ == "__main__":
    typer.run(main)
