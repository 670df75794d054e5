"""Tiny random diffusers pipelines: DiT, FLUX, HunyuanVideo (one branch and true CFG). No files, no network."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import speca
from speca.core import correction
from speca.core.correction import Corrector

diffusers.utils.logging.set_verbosity_error()
STEPS = 14
VERIFYING = speca.VerifiedConfig(threshold_decay=1.0)
"""Drafts that are verified one by one, as in the paper: what tests of the mechanism are about."""


def randomised(model: torch.nn.Module, seed: int = 0) -> Any:
    """The model with every weight redrawn: diffusers starts gates at zero, which would make blocks the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.02 if "norm" in name and name.endswith("weight") and parameter.dim() == 1 else 0.15
        base = 1.0 if scale == 0.02 else 0.0
        parameter.data = base + scale * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


@dataclass
class Case:
    """A pipeline, the arguments of a call but for samples, and how to ask for given samples."""

    pipe: Any
    arguments: dict[str, Any]
    conditions: Callable[[list[int]], dict[str, Any]]

    def __call__(self, seeds: list[int], steps: int = STEPS, **extra: Any) -> Tensor:
        """Latents or images (B, ...) of one sample per seed; the condition depends on the seed as well."""
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        kwargs = {**self.arguments, **self.conditions(seeds), **extra}
        out = self.pipe(generator=generators, num_inference_steps=steps, return_dict=False, **kwargs)[0]
        return torch.as_tensor(out)

    @property
    def transformer(self) -> torch.nn.Module:
        model: torch.nn.Module = self.pipe.transformer
        return model


def vae() -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    ).eval()  # fmt: skip


def dit_transformer(layers: int = 4) -> Any:
    return randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=layers,
            sample_size=4, patch_size=1, num_embeds_ada_norm=1000, attention_bias=True,
        )
    )  # fmt: skip


def flux_transformer() -> Any:
    return randomised(
        diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip


def hunyuan_transformer() -> Any:
    return randomised(
        diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
            num_single_layers=3, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
        )
    )  # fmt: skip


def dit() -> Case:
    """Class to image, DDIM, cond and uncond stacked in one call."""
    pipe = diffusers.DiTPipeline(dit_transformer(), vae(), diffusers.DDIMScheduler(clip_sample=False))
    return _quiet(Case(pipe, dict(output_type="np"), lambda seeds: dict(class_labels=[s % 10 for s in seeds])))


def flux() -> Case:
    """Text to image, rectified flow, embedded guidance: one branch."""
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(), transformer=flux_transformer(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    return _quiet(
        Case(
            pipe, dict(height=16, width=16, output_type="latent"),
            lambda seeds: dict(prompt_embeds=_draw(seeds, 6, 12), pooled_prompt_embeds=_draw(seeds, 10)),
        )
    )  # fmt: skip


def hunyuan_video(true_cfg: bool = False) -> Case:
    """Text to video; with `true_cfg` two calls a step, in the contexts "cond" and "uncond"."""
    video_vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=video_vae,
        transformer=hunyuan_transformer(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip

    def conditions(seeds: list[int]) -> dict[str, Any]:
        mask = torch.ones(len(seeds), 6)
        asked = dict(
            prompt_embeds=_draw(seeds, 6, 12), pooled_prompt_embeds=_draw(seeds, 8), prompt_attention_mask=mask
        )
        if true_cfg:
            asked |= {f"negative_{k}": -v if v is not mask else v for k, v in asked.items()}
        return asked

    scale = 3.0 if true_cfg else 1.0
    size = dict(height=32, width=32, num_frames=5, output_type="latent", true_cfg_scale=scale)
    return _quiet(Case(pipe, size, conditions))


def threshold_in_a_gap(case: Case) -> float:
    """A threshold that rejects some drafts and accepts others, far from any error, so that rounding decides nothing."""
    errors = sorted(e for s in speca.report(case.pipe).samples for e in s.errors if e is not None)
    middle = errors[len(errors) // 4 : 3 * len(errors) // 4]
    ratio, low = max((high / low, low) for low, high in itertools.pairwise(middle) if low > 0)
    return low * ratio**0.5


def _draw(seeds: list[int], *shape: int) -> Tensor:
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(1000 + s)) for s in seeds])


def _quiet(case: Case) -> Case:
    case.pipe.set_progress_bar_config(disable=True)
    return case


PIPELINES: dict[str, Callable[[], Case]] = {
    "dit": dit,
    "flux": flux,
    "hunyuan-video": hunyuan_video,
    "hunyuan-video-cfg": lambda: hunyuan_video(true_cfg=True),
}


def take_corrections_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compare with what forecasts and corrections would do if nothing shortened them."""
    monkeypatch.setattr(correction, "ADAPT", 0.0)
    monkeypatch.setattr(Corrector, "trust", staticmethod(lambda size, surprise, expected: torch.ones_like(size)))
