"""Whole diffusers pipelines with tiny random transformers, as data. No files, no network, no text encoders.

A case is a pipeline class, the configuration of its transformer, and the arguments of a call; conditions are drawn from
the seed of each sample. A VAE is built only where a pipeline cannot do without one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

import tiny

HEADS = dict(num_attention_heads=2, attention_head_dim=8)
TWO_LISTS = dict(num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=16)
FLUX = dict(
    **TWO_LISTS, patch_size=1, in_channels=16, joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True,
    axes_dims_rope=(4, 4, 8),
)  # fmt: skip
HUNYUAN = dict(
    num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=10, in_channels=4, out_channels=4,
    num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=12,
    pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
)  # fmt: skip
WAN = dict(
    num_layers=4, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
    ffn_dim=32, patch_size=(1, 2, 2), rope_max_seq_len=32,
)  # fmt: skip

SD3 = dict(
    **HEADS, sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, joint_attention_dim=12,
    caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8, qk_norm="rms_norm",
)  # fmt: skip
LTX = dict(
    **HEADS, in_channels=8, out_channels=8, cross_attention_dim=16, num_layers=4, caption_channels=12,
    qk_norm="rms_norm_across_heads",
)  # fmt: skip

SMALL = dict(height=16, width=16, output_type="latent")
WIDE = dict(height=64, width=64, output_type="latent")
VIDEO = dict(height=32, width=32, num_frames=5, output_type="latent")

Draw = Callable[[list[int]], Any]


def text(*shape: int, sign: float = 1.0, low: int = 1000) -> Draw:
    """Gaussian numbers (B, *shape), each row from its sample's seed."""

    def draw(seeds: list[int]) -> Tensor:
        return sign * torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(low + s)) for s in seeds])

    return draw


def mask(length: int, dtype: torch.dtype = torch.float32) -> Draw:
    """Ones (B, length)."""
    return lambda seeds: torch.ones(len(seeds), length, dtype=dtype)


def listed(draw: Draw) -> Draw:
    """A list with one tensor a row."""
    return lambda seeds: list(draw(seeds).unbind(0))


def image(*shape: int) -> Draw:
    """Pictures (B, *shape) with values from 0 to 1."""
    return lambda seeds: text(*shape, low=2000)(seeds).sigmoid()


def both(draws: dict[str, Draw]) -> dict[str, Draw]:
    """The draws, and for each the negative prompt's: the same numbers with the sign turned, and the same mask."""
    return {**draws, **{f"negative_{name}": turned(draw) for name, draw in draws.items()}}


def turned(draw: Draw) -> Draw:
    """The draw with its sign turned, masks left as they are."""

    def flip(value: Any) -> Any:
        if isinstance(value, list):
            return [flip(v) for v in value]
        return value if bool((value == 1).all()) else -value

    return lambda seeds: flip(draw(seeds))


@dataclass(frozen=True)
class Recipe:
    """How to make one pipeline and call it.

    Attributes:
        pipeline: class in diffusers.
        transformer: class in diffusers, and its configuration.
        call: arguments common to all samples.
        draws: arguments per sample.
        scheduler: class in diffusers, and its configuration.
        parts: further components, by name: a value, or a function that makes one.
        absent: components that are None.
        attributes: what is set on the pipeline afterwards, to make it small.
        calls: transformer calls a step.
    """

    pipeline: str
    transformer: tuple[str, dict[str, Any]]
    call: dict[str, Any]
    draws: dict[str, Draw]
    scheduler: tuple[str, dict[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {})
    parts: dict[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ("text_encoder", "tokenizer", "vae")
    attributes: dict[str, Any] = field(default_factory=dict)
    calls: int = 1

    def build(self) -> tiny.Case:
        """The pipeline, ready to be called with seeds."""
        name, config = self.transformer
        parts = {n: p() if callable(p) else p for n, p in self.parts.items()}
        parts = {**dict.fromkeys(self.absent), "transformer": model(name, config), **parts}
        scheduler, settings = self.scheduler
        pipe = getattr(diffusers, self.pipeline)(scheduler=getattr(diffusers, scheduler)(**settings), **parts)
        pipe.set_progress_bar_config(disable=True)
        for attribute, value in self.attributes.items():
            setattr(pipe, attribute, value)
        return tiny.Case(pipe, self.call, lambda seeds: {n: draw(seeds) for n, draw in self.draws.items()})


def model(name: str, config: dict[str, Any], seed: int = 0) -> Any:
    """A transformer with every weight drawn anew."""
    return tiny.randomised(getattr(diffusers, name)(**config), seed)


def video_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def controlnet() -> Any:
    return model("FluxControlNetModel", {**FLUX, "num_layers": 1, "num_single_layers": 1})


TWO_ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
THREE_ENCODERS = (*TWO_ENCODERS, "text_encoder_3", "tokenizer_3")
FLUX_TEXT = dict(prompt_embeds=text(6, 12), pooled_prompt_embeds=text(10))
SD3_TEXT = both(dict(prompt_embeds=text(6, 12), pooled_prompt_embeds=text(10)))
HUNYUAN_TEXT = dict(prompt_embeds=text(6, 12), pooled_prompt_embeds=text(8), prompt_attention_mask=mask(6))
WAN_TEXT = both(dict(prompt_embeds=text(6, 16)))


def flux(pipeline: str = "FluxPipeline", calls: int = 1, **changes: Any) -> Recipe:
    """A pipeline of the Flux family; with two calls a step it is given a negative prompt."""
    call, draws, parts = changes.get("call", {}), changes.get("draws", {}), changes.get("parts", {})
    guided = dict(true_cfg_scale=3.0) if calls == 2 else {}
    return Recipe(
        pipeline, ("FluxTransformer2DModel", FLUX), {**SMALL, **guided, **call},
        {**(both(FLUX_TEXT) if calls == 2 else FLUX_TEXT), **draws}, parts=dict(vae=tiny.vae, **parts),
        absent=TWO_ENCODERS, calls=calls,
    )  # fmt: skip


def wan(pipeline: str = "WanPipeline", call: Any = VIDEO, draws: Any = (), **changes: Any) -> Recipe:
    """A pipeline of the Wan family, guided."""
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return Recipe(
        pipeline, ("WanTransformer3DModel", WAN), call, {**WAN_TEXT, **dict(draws)},
        ("UniPCMultistepScheduler", flow), calls=2, **changes,
    )  # fmt: skip


RECIPES: dict[str, Recipe] = {
    "dit": Recipe(
        "DiTPipeline",
        ("DiTTransformer2DModel", dict(**HEADS, in_channels=4, out_channels=8, num_layers=4, sample_size=4,
                                       patch_size=1, num_embeds_ada_norm=1000, attention_bias=True)),
        dict(output_type="np"), dict(class_labels=lambda seeds: [s % 10 for s in seeds]),
        ("DDIMScheduler", dict(clip_sample=False)), parts=dict(vae=tiny.vae), absent=(),
    ),
    "flux": flux(),
    "flux-cfg": flux(calls=2),
    "flux-img2img": flux("FluxImg2ImgPipeline", call=dict(strength=0.7), draws=dict(image=image(3, 16, 16))),
    "flux-inpaint": flux("FluxInpaintPipeline", call=dict(strength=0.9),
                         draws=dict(image=image(3, 16, 16), mask_image=image(1, 16, 16))),
    "flux-kontext": flux("FluxKontextPipeline", call=dict(max_area=256, _auto_resize=False),
                         draws=dict(image=image(3, 16, 16))),
    "flux-kontext-cfg": flux("FluxKontextPipeline", 2, call=dict(max_area=256, _auto_resize=False),
                             draws=dict(image=image(3, 16, 16))),
    "flux-controlnet": flux("FluxControlNetPipeline", parts=dict(controlnet=controlnet),
                            draws=dict(control_image=image(3, 16, 16))),
    "flux2": Recipe(
        "Flux2Pipeline",
        ("Flux2Transformer2DModel", dict(**TWO_LISTS, patch_size=1, in_channels=16, joint_attention_dim=12,
                                         timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4))),
        WIDE, dict(prompt_embeds=text(6, 12)),
    ),
    "hunyuan-video": Recipe(
        "HunyuanVideoPipeline", ("HunyuanVideoTransformer3DModel", HUNYUAN), VIDEO, HUNYUAN_TEXT,
        parts=dict(vae=video_vae), absent=TWO_ENCODERS,
    ),
    "hunyuan-video-cfg": Recipe(
        "HunyuanVideoPipeline", ("HunyuanVideoTransformer3DModel", HUNYUAN), {**VIDEO, "true_cfg_scale": 3.0},
        both(HUNYUAN_TEXT), parts=dict(vae=video_vae), absent=TWO_ENCODERS, calls=2,
    ),
    "hunyuan-video-i2v": Recipe(
        "HunyuanVideoImageToVideoPipeline",
        ("HunyuanVideoTransformer3DModel", {**HUNYUAN, "image_condition_type": "token_replace"}),
        {**VIDEO, "true_cfg_scale": 3.0}, {**both(HUNYUAN_TEXT), "image": image(3, 32, 32)},
        parts=dict(vae=video_vae, image_processor=None), absent=TWO_ENCODERS, calls=2,
    ),
    "hunyuan-video-1.5": Recipe(
        "HunyuanVideo15Pipeline",
        ("HunyuanVideo15Transformer3DModel", dict(
            **HEADS, in_channels=9, out_channels=4, num_layers=4, num_refiner_layers=1, mlp_ratio=2.0, patch_size=1,
            patch_size_t=1, text_embed_dim=12, text_embed_2_dim=8, image_embed_dim=10, rope_axes_dim=(2, 2, 4),
            target_size=16, task_type="t2v")),
        dict(height=64, width=64, num_frames=5, output_type="latent"),
        both(dict(prompt_embeds=text(6, 12), prompt_embeds_mask=mask(6), prompt_embeds_2=text(4, 8),
                  prompt_embeds_mask_2=mask(4))),
        parts=dict(guider=diffusers.ClassifierFreeGuidance, vae=lambda: diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1)),
        absent=TWO_ENCODERS, attributes=dict(vision_num_semantic_tokens=3), calls=2,
    ),
    "wan-2.1": wan(),
    "wan-2.2": wan(parts=dict(transformer_2=lambda: model("WanTransformer3DModel", WAN, 1), boundary_ratio=0.875)),
    "wan-2.2-5b": wan(parts=dict(expand_timesteps=True)),
    # each token has a time of its own: those of the given first frame are clean; one image for all samples
    "wan-i2v-5b": wan("WanImageToVideoPipeline", {**VIDEO, "image": image(3, 32, 32)([0])},
                      parts=dict(expand_timesteps=True, vae=wan_vae)),
    "wan-v2v": wan("WanVideoToVideoPipeline", dict(height=32, width=32, output_type="latent", strength=0.8),
                   dict(latents=text(4, 2, 4, 4))),
    "sd3": Recipe(
        "StableDiffusion3Pipeline", ("SD3Transformer2DModel", SD3), SMALL, SD3_TEXT, parts=dict(vae=tiny.vae),
        absent=THREE_ENCODERS,
    ),
    "sd3-img2img": Recipe(
        "StableDiffusion3Img2ImgPipeline", ("SD3Transformer2DModel", SD3), {**SMALL, "strength": 0.8},
        {**SD3_TEXT, "image": image(3, 16, 16)}, parts=dict(vae=tiny.vae), absent=THREE_ENCODERS,
    ),
    "pixart-sigma": Recipe(
        "PixArtSigmaPipeline",
        ("PixArtTransformer2DModel", dict(**HEADS, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
                                          patch_size=2, cross_attention_dim=16, caption_channels=12,
                                          use_additional_conditions=False)),
        {**SMALL, "use_resolution_binning": False, "negative_prompt": None},
        both(dict(prompt_embeds=text(6, 12), prompt_attention_mask=mask(6, torch.long))),
        ("DPMSolverMultistepScheduler", {}), parts=dict(vae=tiny.vae), absent=TWO_ENCODERS[:2],
    ),
    "sana": Recipe(
        "SanaPipeline",
        ("SanaTransformer2DModel", dict(**HEADS, in_channels=4, out_channels=4, num_layers=4,
                                        num_cross_attention_heads=2, cross_attention_head_dim=8,
                                        cross_attention_dim=16, caption_channels=12, sample_size=8, patch_size=1)),
        dict(height=128, width=128, output_type="latent", use_resolution_binning=False, negative_prompt=None),
        both(dict(prompt_embeds=text(6, 12), prompt_attention_mask=mask(6, torch.long))),
        ("DPMSolverMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True)),
    ),
    "qwen-image": Recipe(
        "QwenImagePipeline",
        ("QwenImageTransformer2DModel", dict(num_layers=4, num_attention_heads=2, attention_head_dim=16, patch_size=2,
                                             in_channels=16, out_channels=4, joint_attention_dim=12,
                                             axes_dims_rope=(8, 4, 4))),
        WIDE, {**both(dict(prompt_embeds=text(6, 12), prompt_embeds_mask=mask(6, torch.long))),
               # the negative prompt is shorter, as it is in life
               "negative_prompt_embeds": text(4, 12, sign=-1.0), "negative_prompt_embeds_mask": mask(4, torch.long)},
        calls=2,
    ),
    "cogvideox": Recipe(
        "CogVideoXPipeline",
        ("CogVideoXTransformer3DModel", dict(**HEADS, in_channels=4, out_channels=4, time_embed_dim=8,
                                             text_embed_dim=12, num_layers=4, sample_width=8, sample_height=8,
                                             sample_frames=5, patch_size=2, max_text_seq_length=6)),
        dict(height=64, width=64, num_frames=5, output_type="latent", max_sequence_length=6),
        both(dict(prompt_embeds=text(6, 12))), ("CogVideoXDDIMScheduler", {}),
    ),
    "ltx": Recipe(
        "LTXPipeline", ("LTXVideoTransformer3DModel", LTX),
        dict(height=128, width=128, num_frames=9, output_type="latent"),
        both(dict(prompt_embeds=text(6, 12), prompt_attention_mask=mask(6))),
    ),
    "ltx-i2v": Recipe(
        "LTXImageToVideoPipeline", ("LTXVideoTransformer3DModel", LTX),
        dict(height=128, width=128, num_frames=9, output_type="latent"),
        {**both(dict(prompt_embeds=text(6, 12), prompt_attention_mask=mask(6))), "latents": text(32, 8)},
    ),
    "mochi": Recipe(
        "MochiPipeline",
        ("MochiTransformer3DModel", dict(**HEADS, patch_size=2, num_layers=4, pooled_projection_dim=16, in_channels=4,
                                         out_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=6)),
        dict(height=64, width=64, num_frames=7, output_type="latent"),
        both(dict(prompt_embeds=text(6, 16), prompt_attention_mask=mask(6, torch.bool))),
    ),
    "z-image": Recipe(
        "ZImagePipeline",
        ("ZImageTransformer2DModel", dict(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=16,
                                          n_layers=4, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=12,
                                          axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])),
        WIDE, both(dict(prompt_embeds=listed(text(6, 12)))),
    ),
    "lumina2": Recipe(
        "Lumina2Pipeline",
        ("Lumina2Transformer2DModel", dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=4,
                                           num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2,
                                           axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=12)),
        WIDE, both(dict(prompt_embeds=text(6, 12), prompt_attention_mask=mask(6, torch.bool))), calls=2,
    ),
    "chroma": Recipe(
        "ChromaPipeline",
        ("ChromaTransformer2DModel", dict(**TWO_LISTS, patch_size=1, in_channels=16, joint_attention_dim=12,
                                          axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
                                          approximator_hidden_dim=16, approximator_layers=1)),
        WIDE, both(dict(prompt_embeds=text(6, 12), prompt_attention_mask=mask(6))), calls=2,
    ),
    "hidream": Recipe(
        "HiDreamImagePipeline",
        ("HiDreamImageTransformer2DModel", dict(**HEADS, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
                                                num_single_layers=2, caption_channels=[10, 12], text_emb_dim=8,
                                                num_routed_experts=2, num_activated_experts=2,
                                                axes_dims_rope=(4, 2, 2), max_resolution=(16, 16),
                                                llama_layers=(0, 1, 2, 3), force_inference_output=True)),
        WIDE,
        both(dict(prompt_embeds_t5=text(6, 10), pooled_prompt_embeds=text(8),
                  prompt_embeds_llama3=lambda seeds: text(4, 6, 12)(seeds).transpose(0, 1))),
        parts={f"text_encoder_{i}": None for i in (3, 4)} | {f"tokenizer_{i}": None for i in (3, 4)},
        absent=(*TWO_ENCODERS, "vae"), attributes=dict(default_sample_size=8),
    ),
    "cogview4": Recipe(
        "CogView4Pipeline",
        ("CogView4Transformer2DModel", dict(**HEADS, patch_size=2, in_channels=4, out_channels=4, num_layers=4,
                                            text_embed_dim=12, time_embed_dim=8, condition_dim=4, sample_size=8,
                                            rope_axes_dim=(8, 8))),
        WIDE, both(dict(prompt_embeds=text(16, 12))), calls=2,
    ),
    "auraflow": Recipe(
        "AuraFlowPipeline",
        ("AuraFlowTransformer2DModel", dict(**HEADS, sample_size=8, patch_size=2, in_channels=4, out_channels=4,
                                            num_mmdit_layers=2, num_single_dit_layers=3, joint_attention_dim=12,
                                            caption_projection_dim=16, pos_embed_max_size=16)),
        WIDE, both(dict(prompt_embeds=text(6, 12), prompt_attention_mask=mask(6))),
    ),
    "allegro": Recipe(
        "AllegroPipeline",
        ("AllegroTransformer3DModel", dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
                                           num_layers=4, cross_attention_dim=48, sample_width=8, sample_height=8,
                                           sample_frames=2, caption_channels=12)),
        {**WIDE, "num_frames": 8, "clean_caption": False, "negative_prompt": None},
        both(dict(prompt_embeds=text(6, 12), prompt_attention_mask=mask(6))), ("EulerAncestralDiscreteScheduler", {}),
    ),
    "hunyuan-dit": Recipe(
        "HunyuanDiTPipeline",
        ("HunyuanDiT2DModel", dict(**HEADS, sample_size=8, patch_size=2, in_channels=4, num_layers=4,
                                   cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4,
                                   hidden_size=16, text_len=4, text_len_t5=4,
                                   use_style_cond_and_image_meta_size=False)),
        {**SMALL, "use_resolution_binning": False},
        both(dict(prompt_embeds=text(4, 8), prompt_embeds_2=text(4, 8), prompt_attention_mask=mask(4),
                  prompt_attention_mask_2=mask(4))),
        ("DDPMScheduler", {}),
        parts=dict(vae=tiny.vae, safety_checker=None, feature_extractor=None, requires_safety_checker=False),
        absent=TWO_ENCODERS,
    ),
    "sana-video": Recipe(
        "SanaVideoPipeline",
        ("SanaVideoTransformer3DModel", dict(in_channels=4, out_channels=4, num_attention_heads=2,
                                             attention_head_dim=12, num_layers=4, num_cross_attention_heads=2,
                                             cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=12,
                                             sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32)),
        {**WIDE, "frames": 5, "use_resolution_binning": False, "negative_prompt": None},
        both(dict(prompt_embeds=text(6, 12), prompt_attention_mask=mask(6, torch.long))),
    ),
}  # fmt: skip
