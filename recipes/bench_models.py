"""The paper's models at full size with random weights, or toys in their shape, and a denoising loop around them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

STEPS = 10


@dataclass
class Subject:
    """A transformer under test: how it is built, and the inputs of a call of `batch` samples."""

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    batches: tuple[int, ...]


def subjects(tiny: bool, device: str, dtype: torch.dtype) -> list[Subject]:
    """The three models of the paper at full size, or toys in their shape."""
    import diffusers

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def whole(batch: int, value: float = 500.0) -> torch.Tensor:
        return torch.full((batch,), value, device=device)

    depth = (4, 2, 3, 2, 3) if tiny else (28, 19, 38, 20, 40)
    heads, width = (2, 16) if tiny else (16, 72)
    side = 8 if tiny else 32
    dit = dict(
        num_attention_heads=heads, attention_head_dim=width, in_channels=4, out_channels=8, num_layers=depth[0],
        sample_size=side, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", attention_bias=True,
    )  # fmt: skip
    text = 32 if tiny else 4096
    flux = dict(
        in_channels=64, num_layers=depth[1], num_single_layers=depth[2], guidance_embeds=True,
        attention_head_dim=16 if tiny else 128, num_attention_heads=2 if tiny else 24, joint_attention_dim=text,
        pooled_projection_dim=768, axes_dims_rope=(4, 6, 6) if tiny else (16, 56, 56),
    )  # fmt: skip
    video = dict(
        num_layers=depth[3], num_single_layers=depth[4], guidance_embeds=True,
        num_attention_heads=2 if tiny else 24, attention_head_dim=16 if tiny else 128, text_embed_dim=text,
        rope_axes_dim=(4, 6, 6) if tiny else (16, 56, 56),
    )  # fmt: skip
    tokens, words = (64, 16) if tiny else (4096, 512)
    grid = (2, 4, 4) if tiny else (17, 60, 80)  # latents of 65 frames of 480 x 640
    edge = int(tokens**0.5)
    places = torch.stack(
        torch.meshgrid(torch.zeros(1), torch.arange(1.0 * edge), torch.arange(1.0 * edge), indexing="ij"), -1
    )

    def of_dit(batch: int) -> dict[str, torch.Tensor]:
        labels = torch.arange(2 * batch, device=device) % 1000
        return dict(hidden_states=draw(2 * batch, 4, side, side), timestep=whole(2 * batch).long(), class_labels=labels)

    def of_flux(batch: int) -> dict[str, torch.Tensor]:
        return dict(
            hidden_states=draw(batch, tokens, 64), encoder_hidden_states=draw(batch, words, text),
            pooled_projections=draw(batch, 768), timestep=whole(batch, 0.5), guidance=whole(batch, 3.5),
            img_ids=places.reshape(-1, 3).to(device), txt_ids=torch.zeros(words, 3, device=device),
        )  # fmt: skip

    def of_video(batch: int) -> dict[str, torch.Tensor]:
        return dict(
            hidden_states=draw(batch, 16, *grid), timestep=whole(batch), encoder_hidden_states=draw(batch, words, text),
            encoder_attention_mask=torch.ones(batch, words, device=device, dtype=torch.long),
            pooled_projections=draw(batch, 768), guidance=whole(batch, 6000.0),
        )  # fmt: skip

    return [
        Subject("DiT-XL/2", lambda: diffusers.DiTTransformer2DModel(**dit), of_dit, (1, 4, 16)),
        Subject("FLUX.1-dev", lambda: diffusers.FluxTransformer2DModel(**flux), of_flux, (1, 4, 16)),
        Subject("HunyuanVideo", lambda: diffusers.HunyuanVideoTransformer3DModel(**video), of_video, (1,)),
    ]


class Loop:
    """A pipeline in miniature: the denoising loop alone, around one transformer and its fixed inputs."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer, self.inputs = model, inputs
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self._execution_device = next(model.parameters()).device

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    def __call__(self, steps: int = STEPS) -> list[float]:
        """Seconds of each step."""
        self.scheduler.set_timesteps(steps)
        latents, seconds = self.inputs["hidden_states"], []
        context = getattr(self.transformer, "cache_context", lambda _: contextlib.nullcontext())
        for t in self.scheduler.timesteps:
            time_of = {"timestep": torch.full_like(self.inputs["timestep"], self._time(t))}
            synchronize(latents.device)
            begin = time.perf_counter()
            with context("bench"):
                out = self.transformer(**{**self.inputs, "hidden_states": latents, **time_of}).sample
            synchronize(latents.device)
            seconds.append(time.perf_counter() - begin)
            latents = latents - 0.02 * out[:, : latents.shape[1]].reshape(latents.shape)
        reset = getattr(self.transformer, "_reset_stateful_cache", None)
        if reset:
            reset()
        return seconds

    def _time(self, t: torch.Tensor) -> float:
        return float(t) / 1000 if self.inputs["timestep"].dtype.is_floating_point and self._unit else float(t)

    @property
    def _unit(self) -> bool:
        return "img_ids" in self.inputs  # FLUX is given times in [0, 1]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
