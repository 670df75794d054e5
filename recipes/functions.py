"""Sampler functions: k-diffusion's samplers on `emoji-flux`'s transformer, with a budget beside fewer steps.

    pip install --no-deps k-diffusion && pip install torchsde torchdiffeq
    python recipes/functions.py --samples 16 --steps 30

Nothing but the transformer of the pipeline is used in the loop: it is the denoiser of a sampler function, its velocity
taken as `denoised = x - sigma v`. Each sampler runs in full, with `speca.Denoiser` at budgets of 3x and 5x, without and
with the calibration that the model brings (which was measured in diffusers' own loop), and with as many calls of the
model by fewer steps of itself. PSNR of the decoded pictures to the sampler's own full run, median / 5th percentile in
dB. Samplers that add noise draw the same noise in each run of equal steps, but not in one of fewer steps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import speca
from speca.reports.comparison import psnr, quantile
from speca.reports.measure import example_call
from speca.zoo import call_arguments, load

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from sampler.kdiffusion import MEMORY, NOISY, SAMPLERS

MODEL = "emoji-flux"


class Pictures:
    """`emoji-flux` without its loop: noise, the transformer as a denoiser, and decoding."""

    def __init__(self, seeds: list[int]) -> None:
        self.pipe = pipe = load(MODEL)
        call = {**call_arguments(MODEL), **example_call(pipe, seeds)}
        text, pooled, text_ids = pipe.encode_prompt(
            call["prompt"], call["prompt"], max_sequence_length=call["max_sequence_length"]
        )
        self.size = call["height"], call["width"]
        parts = [
            pipe.prepare_latents(
                1, pipe.transformer.config.in_channels // 4, *self.size, torch.float32, torch.device("cpu"),
                torch.Generator().manual_seed(seed),
            )
            for seed in seeds
        ]  # fmt: skip
        self.noise = torch.cat([latents for latents, _ in parts])
        self.arguments = dict(
            encoder_hidden_states=text, pooled_projections=pooled, txt_ids=text_ids, img_ids=parts[0][1],
            guidance=torch.full((len(seeds),), 3.5), return_dict=False,
        )  # fmt: skip

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean sample that the model predicts for x (B, S, C) at the noise level sigma (B,)."""
        velocity: Tensor = self.pipe.transformer(hidden_states=x, timestep=sigma, **self.arguments)[0]
        return x - sigma.view(-1, 1, 1) * velocity

    def decoded(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]."""
        pipe = self.pipe
        latents = pipe._unpack_latents(x, *self.size, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        pictures: Tensor = pipe.vae.decode(latents, return_dict=False)[0]
        return (pictures / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def drawn(name: str, model: Any, pictures: Pictures, sigmas: Tensor) -> Tensor:
    """Decoded pictures of one run of a sampler."""
    torch.manual_seed(0)
    return pictures.decoded(SAMPLERS[name](model, pictures.noise.clone(), sigmas, disable=True))


def main(
    samples: Annotated[int, typer.Option(help="Samples, 1 or more.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps of the full runs, 8 or more.")] = 30,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Print one row for each sampler and budget."""
    torch.set_num_threads(threads)
    pictures = Pictures(list(range(samples)))
    known = speca.Calibration.beside(pictures.pipe)
    print("| sampler | calls | budget | full | fewer steps | no calibration | calibrated |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in (n for n in SAMPLERS if MEMORY[n] and n != "dpm_fast"):
        sigmas = torch.linspace(1, 0, steps + 1)
        sigmas[0] = 0.999  # samplers that compute in log sigma / (1 - sigma) need it below 1
        full = drawn(name, pictures.denoised, pictures, sigmas)
        for speedup in (3, 5):
            cells, calls, spent = [], 0, 0
            for calibration in (None, known):
                denoise = speca.Denoiser(
                    pictures.denoised, sampler=SAMPLERS[name], sigmas=sigmas, speedup=speedup, calibration=calibration
                )
                values = psnr(drawn(name, denoise, pictures, sigmas), full).tolist()
                cells.append(f"{quantile(values, 0.5):.1f} / {quantile(values, 0.05):.1f}")
                calls, spent = len(denoise.response.times), denoise.report().samples[0].full
            few = torch.linspace(1, 0, max(2, round(steps / speedup)) + 1)
            few[0] = 0.999
            values = psnr(drawn(name, pictures.denoised, pictures, few), full).tolist()
            less = "other noise" if name in NOISY else f"{quantile(values, 0.5):.1f} / {quantile(values, 0.05):.1f}"
            print(f"| {name} | {calls} | {speedup}x | {spent} | {less} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
