"""The table of tiny models: configuration, inputs, and how pipelines call the class. Data only.

`CASES` holds what runs, `REASONS` the classes that have no case and why. A class of diffusers in neither is reported
as untested. Sizes are the smallest at which every kind of block of the class runs at least once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .inputs import Shape, Time, grid, ids, layers, listed, mask, noise, rotary, table

# How the class's pipelines ask for guidance.
STACKED = "1 call, cond and uncond stacked"
STACKED_NAMED = '1 call, stacked, context "cond_uncond"'
TWO_NAMED = '2 calls, contexts "cond" and "uncond"'
TWO = "2 calls, no context"
GUIDER = "a call per guider branch, with contexts"
EMBEDDED = "1 call, guidance embedded"
MODULAR = "modular pipeline, a call per branch"
ONE = "1 call"


@dataclass(frozen=True)
class Case:
    """One tiny model of class `cls` with the arguments of a call; the first argument is what the loop denoises."""

    cls: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    guidance: str
    note: str = ""  # what is unusual about the class, for the table
    plain: str = ""  # part of the reason if its drafts cannot be verified, and preset "paper" runs it plainly
    variant: str = ""  # a second case of the same class
    rows: int = 3  # rows a batch can hold; 1 for packed models
    slice: bool = False  # part of the quick run in the test suite
    latent: str = ""  # the argument the loop denoises, if it is not the first

    @property
    def name(self) -> str:
        """Class and variant."""
        return f"{self.cls} ({self.variant})" if self.variant else self.cls


HEADS = dict(num_attention_heads=2, attention_head_dim=8)
WIDE = dict(num_attention_heads=2, attention_head_dim=16)
PICTURE = dict(in_channels=4, out_channels=4)
DEEP = dict(num_layers=4)
TWO_STACKS = dict(num_layers=2, num_single_layers=3)
T, T1 = Time(1000), Time(1)
BOOL = torch.bool

IMAGE, VIDEO = noise(4, 8, 8), noise(4, 2, 8, 8)
TEXT = noise(6, 12)
PAIR = table([64.0, 64.0])

WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, **PICTURE, **DEEP, text_dim=16, freq_dim=32,
    ffn_dim=32, rope_max_seq_len=32,
)  # fmt: skip
WAN_CALL = dict(hidden_states=VIDEO, timestep=T, encoder_hidden_states=noise(6, 16))

FLUX = dict(patch_size=1, in_channels=16, **TWO_STACKS, **WIDE, joint_attention_dim=12, axes_dims_rope=(4, 4, 8))
PACKED = dict(
    hidden_states=noise(16, 16), encoder_hidden_states=TEXT, timestep=T1, img_ids=grid(4, 4), txt_ids=torch.zeros(6, 3)
)
PACKED_4 = {**PACKED, "img_ids": grid(4, 4, 4), "txt_ids": torch.zeros(6, 4)}
GUIDED = dict(guidance=table(3.5, 4.5, 2.5, 1.5))

HUNYUAN = dict(
    **PICTURE, num_attention_heads=2, attention_head_dim=10, **TWO_STACKS, num_refiner_layers=1, patch_size=2,
    patch_size_t=1, guidance_embeds=True, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
)  # fmt: skip
HUNYUAN_CALL = dict(
    hidden_states=VIDEO, timestep=T, encoder_hidden_states=TEXT, encoder_attention_mask=mask(6, 6, 4, 5, 6),
    pooled_projections=noise(8), guidance=table(6000.0, 4000.0, 2000.0, 1000.0),
)  # fmt: skip

COG = dict(
    **HEADS, **PICTURE, **DEEP, time_embed_dim=8, text_embed_dim=12, sample_width=8, sample_height=8, sample_frames=8,
    patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6,
)  # fmt: skip
COG_CALL = dict(hidden_states=noise(2, 4, 8, 8), encoder_hidden_states=TEXT, timestep=T)
COG_IMAGE = dict(patch_size=2, **PICTURE, **DEEP, **HEADS, text_embed_dim=12, time_embed_dim=8, condition_dim=4)
COG_IMAGE_CALL = dict(
    hidden_states=IMAGE, encoder_hidden_states=TEXT, timestep=T, original_size=PAIR, target_size=PAIR,
    crop_coords=table([0.0, 0.0]),
)  # fmt: skip

HELIOS = {**{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)}
JOY = dict(**PICTURE, hidden_size=16, num_attention_heads=2, text_dim=12, **DEEP, rope_dim_list=[4, 2, 2])
FIBO2 = dict(
    in_channels=4, patch_size=2, dim=16, n_layers=4, n_refiner_layers=1, n_heads=2, cap_feat_dim=12,
    injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=6, gist_step=2,
    gist_min_text_len=2, gist_max_text_len=8, axes_dims=(4, 2, 2), axes_lens=(16, 16, 16),
)  # fmt: skip
FIBO2_CALL = dict(hidden_states=IMAGE, timestep=T1, encoder_hidden_states=noise(2, 8, 12))

# DiT, FLUX and HunyuanVideo first: the paper's three systems.
CASES: tuple[Case, ...] = (
    Case(
        "DiTTransformer2DModel",
        dict(**HEADS, in_channels=4, out_channels=8, **DEEP, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
             attention_bias=True),
        dict(hidden_states=IMAGE, timestep=T, class_labels=table(1, 4, 7, 9)),
        STACKED, slice=True,
    ),
    Case(
        "FluxTransformer2DModel", dict(**FLUX, pooled_projection_dim=10, guidance_embeds=True),
        {**PACKED, "pooled_projections": noise(10), **GUIDED},
        EMBEDDED + "; true CFG: " + TWO_NAMED, slice=True,
    ),
    Case(
        "HunyuanVideoTransformer3DModel", HUNYUAN, HUNYUAN_CALL, EMBEDDED + "; true CFG: " + TWO_NAMED, slice=True,
        note="in verified drafts the text refiner runs at every step",
    ),
    Case("AllegroTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=24, **PICTURE, **DEEP, cross_attention_dim=48, sample_width=8,
             sample_height=8, sample_frames=8, caption_channels=12),
        dict(hidden_states=VIDEO, encoder_hidden_states=TEXT, timestep=T, attention_mask=table(torch.ones(2, 8, 8)),
             encoder_attention_mask=mask(6), image_rotary_emb=rotary("allegro")),
        STACKED_NAMED),
    Case("AuraFlowTransformer2DModel",
        dict(sample_size=8, patch_size=2, **PICTURE, num_mmdit_layers=2, num_single_dit_layers=3, **HEADS,
             joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=16),
        dict(hidden_states=IMAGE, encoder_hidden_states=TEXT, timestep=T1), STACKED),
    Case("BriaTransformer2DModel", {**FLUX, "axes_dims_rope": [0, 8, 8], "pooled_projection_dim": None},
        {**PACKED, "timestep": T}, STACKED),
    Case("BriaFiboTransformer2DModel",
        {**FLUX, "axes_dims_rope": [0, 8, 8], "pooled_projection_dim": None, "text_encoder_dim": 10},
        {**PACKED, "timestep": T, "text_encoder_layers": layers(5, 6, 10)}, STACKED, slice=True,
        note="`text_encoder_layers` is a list with one batch per layer"),
    Case("ChromaTransformer2DModel",
        dict(**FLUX, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1), PACKED, TWO,
        note="modulation is sliced by block index"),
    Case("ChronoEditTransformer3DModel", dict(**WAN, rope_temporal_skip_len=8), WAN_CALL, TWO),
    Case("CogVideoXTransformer3DModel", COG, COG_CALL, STACKED_NAMED, slice=True),
    Case("CogView3PlusTransformer2DModel", dict(**COG_IMAGE, pos_embed_max_size=8, sample_size=8), COG_IMAGE_CALL,
        STACKED),
    Case("CogView4Transformer2DModel", dict(**COG_IMAGE, sample_size=8, rope_axes_dim=(8, 8)), COG_IMAGE_CALL,
        TWO_NAMED),
    Case("CosmosTransformer3DModel",
        dict(**PICTURE, num_attention_heads=2, attention_head_dim=12, **DEEP, mlp_ratio=2, text_embed_dim=16,
             adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
             concat_padding_mask=False, extra_pos_embed_type="learnable"),
        {**WAN_CALL, "attention_mask": mask(6, dtype=BOOL), "fps": 30}, TWO),
    Case("EasyAnimateTransformer3DModel",
        dict(**WIDE, **PICTURE, patch_size=2, **DEEP, mmdit_layers=2, time_embed_dim=8, text_embed_dim=12,
             sample_width=8, sample_height=8, time_position_encoding_type="3d_rope", add_noise_in_inpaint_model=False),
        dict(hidden_states=VIDEO, timestep=T, encoder_hidden_states=TEXT), STACKED),
    Case("ErnieImageTransformer2DModel",
        dict(hidden_size=32, num_attention_heads=2, **DEEP, ffn_hidden_size=32, **PICTURE, patch_size=1,
             text_in_dim=12, rope_axes_dim=(4, 4, 8)),
        dict(hidden_states=noise(4, 4, 4), timestep=T, text_bth=TEXT, text_lens=table(6, 4, 5, 6)), STACKED, slice=True,
        note="rows are dimension 1 inside the stack"),
    Case("Flux2Transformer2DModel",
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32, "guidance_embeds": True},
        {**PACKED_4, **GUIDED}, EMBEDDED + "; klein: " + TWO_NAMED),
    Case("Flux3Transformer2DModel",
        dict(in_channels=16, cond_in_channels=16, **TWO_STACKS, **WIDE, joint_attention_dim=12, timestep_channels=32,
             axes_dims_rope=(4, 4, 4, 4)),
        PACKED_4, MODULAR, note="one stack sits in a ModuleDict"),
    Case("GlmImageTransformer2DModel", dict(**COG_IMAGE, prior_vq_quantizer_codebook_size=16),
        dict(hidden_states=IMAGE, encoder_hidden_states=TEXT, prior_token_id=ids(16, high=16),
             prior_token_drop=table(torch.zeros(16, dtype=BOOL)), timestep=T, target_size=PAIR,
             crop_coords=table([0.0, 0.0])), TWO),
    Case("HiDreamImageTransformer2DModel",
        dict(patch_size=2, **PICTURE, num_layers=2, num_single_layers=2, **HEADS, caption_channels=[10, 12],
             text_emb_dim=8, num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(4, 2, 2),
             max_resolution=(16, 16), llama_layers=(0, 1, 2, 3), force_inference_output=True),
        dict(hidden_states=IMAGE, encoder_hidden_states_t5=noise(6, 10),
             encoder_hidden_states_llama3=noise(4, 6, 12, dim=1), pooled_embeds=noise(8), timesteps=T), STACKED,
        slice=True, note="`encoder_hidden_states_llama3` is (layers, B, S, D)"),
    Case("HunyuanDiT2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, **DEEP, **HEADS, cross_attention_dim=8,
             cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=16, text_len=4, text_len_t5=4,
             use_style_cond_and_image_meta_size=False),
        dict(hidden_states=IMAGE, timestep=T, encoder_hidden_states=noise(4, 8), text_embedding_mask=mask(4),
             encoder_hidden_states_t5=noise(4, 8), text_embedding_mask_t5=mask(4),
             image_rotary_emb=rotary("hunyuan-dit")),
        STACKED, slice=True, note="long skips reach the last block"),
    Case("HunyuanImageTransformer2DModel",
        dict(**PICTURE, **HEADS, **TWO_STACKS, num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=False,
             text_embed_dim=12, text_embed_2_dim=8, rope_axes_dim=(4, 4)),
        dict(hidden_states=noise(4, 4, 4), timestep=T, encoder_hidden_states=TEXT, encoder_attention_mask=mask(6),
             encoder_hidden_states_2=noise(4, 8), encoder_attention_mask_2=mask(4)), GUIDER),
    Case("HunyuanVideo15Transformer3DModel",
        dict(**PICTURE, **HEADS, **DEEP, num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1,
             text_embed_dim=12, text_embed_2_dim=8, image_embed_dim=10, rope_axes_dim=(2, 2, 4), target_size=16,
             task_type="t2v"),
        dict(hidden_states=noise(4, 2, 4, 4), timestep=T, encoder_hidden_states=TEXT,
             encoder_attention_mask=mask(6, 6, 4, 5, 6), encoder_hidden_states_2=noise(4, 8),
             encoder_attention_mask_2=mask(4), image_embeds=table(torch.zeros(3, 10))), GUIDER),
    Case("Kandinsky5Transformer3DModel",
        dict(in_visual_dim=4, in_text_dim=12, in_text_dim2=6, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
             model_dim=24, ff_dim=32, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 4, 4)),
        dict(hidden_states=noise(2, 8, 8, 4), encoder_hidden_states=TEXT, timestep=T, pooled_projections=noise(6),
             visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(4)], text_rope_pos=torch.arange(6)), TWO,
        slice=True, note="`visual_rope_pos` is a list of 3 that no row owns; the text stream is state too"),
    Case("Krea2Transformer2DModel",
        dict(in_channels=16, **DEEP, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
             intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3,
             text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=32,
             num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8)),
        dict(hidden_states=noise(16, 16), encoder_hidden_states=noise(6, 3, 16), timestep=T1,
             position_ids=torch.cat([torch.zeros(6, 3), grid(4, 4)])), TWO),
    Case("LatteTransformer3DModel",
        dict(sample_size=8, num_layers=3, patch_size=2, **HEADS, caption_channels=12, in_channels=4,
             cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
             num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
             video_length=2),
        dict(hidden_states=VIDEO, encoder_hidden_states=TEXT, timestep=T), STACKED_NAMED, slice=True,
        note="rows are folded with frames or patches"),
    Case("LongCatImageTransformer2DModel", dict(**FLUX, pooled_projection_dim=12), PACKED, TWO_NAMED),
    Case("LTXVideoTransformer3DModel",
        dict(in_channels=8, out_channels=8, **HEADS, cross_attention_dim=16, **DEEP, caption_channels=12,
             qk_norm="rms_norm_across_heads"),
        dict(hidden_states=noise(32, 8), encoder_hidden_states=TEXT, timestep=T,
             encoder_attention_mask=mask(6, dtype=BOOL), num_frames=2, height=4, width=4), STACKED_NAMED),
    Case("LTX2VideoTransformer3DModel",
        dict(**PICTURE, **HEADS, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
             audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=3,
             caption_channels=12, rope_double_precision=False),
        dict(hidden_states=noise(32, 4), audio_hidden_states=noise(6, 4), encoder_hidden_states=TEXT,
             audio_encoder_hidden_states=TEXT, timestep=T, encoder_attention_mask=mask(6, dtype=BOOL),
             audio_encoder_attention_mask=mask(6, dtype=BOOL), num_frames=2, height=4, width=4, fps=25.0,
             audio_num_frames=6), STACKED_NAMED + '; also "uncond_stg", "uncond_modality"', slice=True,
        note="video and audio are both state and both output"),
    Case("Lumina2Transformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=24, **DEEP, num_refiner_layers=1,
             num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
             cap_feat_dim=12),
        dict(hidden_states=IMAGE, timestep=T1, encoder_hidden_states=TEXT,
             encoder_attention_mask=mask(6, 6, 4, 5, 6, dtype=BOOL)), TWO, slice=True),
    Case("LuminaNextDiT2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=24, **DEEP, num_attention_heads=3, num_kv_heads=1,
             multiple_of=16, cross_attention_dim=12, learn_sigma=True),
        dict(hidden_states=IMAGE, timestep=T1, encoder_hidden_states=TEXT, encoder_mask=mask(6, dtype=torch.long),
             image_rotary_emb=rotary("lumina-next"), cross_attention_kwargs={}), STACKED),
    Case("MochiTransformer3DModel",
        dict(patch_size=2, **HEADS, **DEEP, pooled_projection_dim=16, **PICTURE, text_embed_dim=16, time_embed_dim=4,
             max_sequence_length=6),
        {**WAN_CALL, "encoder_attention_mask": mask(6, 6, 4, 5, 6, dtype=BOOL)}, STACKED_NAMED, slice=True,
        note="the last block returns the text unchanged"),
    Case("MotifVideoTransformer3DModel",
        dict(**PICTURE, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=4,
             num_decoder_layers=2, mlp_ratio=2.0, patch_size=2, patch_size_t=1, text_embed_dim=12,
             rope_axes_dim=(2, 4, 4)),
        dict(hidden_states=VIDEO, timestep=T, encoder_hidden_states=TEXT, encoder_attention_mask=mask(6)), GUIDER,
        note="the single stack is used in two slices"),
    Case("NucleusMoEImageTransformer2DModel",
        dict(patch_size=2, in_channels=16, out_channels=4, **DEEP, **WIDE, joint_attention_dim=12,
             axes_dims_rope=(8, 4, 4), mlp_ratio=2.0, num_experts=4, moe_intermediate_dim=16,
             capacity_factors=[2.0] * 4, dense_moe_strategy="leave_first_block_dense"),
        dict(hidden_states=noise(16, 16), img_shapes=listed((1, 4, 4)), encoder_hidden_states=TEXT,
             encoder_hidden_states_mask=mask(6, dtype=BOOL), timestep=T1), TWO, note="routed experts"),
    Case("OmniGenTransformer2DModel",
        dict(in_channels=4, patch_size=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=2,
             intermediate_size=32, **DEEP, pad_token_id=0, vocab_size=64, max_position_embeddings=64, time_step_dim=8,
             rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}),
        dict(hidden_states=IMAGE, timestep=T1, input_ids=ids(6, high=60), input_img_latents=[], input_image_sizes={},
             attention_mask=table(torch.ones(23, 23)), position_ids=table(torch.arange(23))), STACKED),
    Case("OvisImageTransformer2DModel", dict(**FLUX, out_channels=16), PACKED, TWO_NAMED),
    Case("PixArtTransformer2DModel",
        dict(**HEADS, in_channels=4, out_channels=8, **DEEP, sample_size=8, patch_size=2, cross_attention_dim=16,
             caption_channels=12, use_additional_conditions=False),
        dict(hidden_states=IMAGE, encoder_hidden_states=TEXT, timestep=T, encoder_attention_mask=mask(6, 6, 4, 5, 6),
             added_cond_kwargs={"resolution": None, "aspect_ratio": None}), STACKED),
    Case("PRXTransformer2DModel",
        dict(in_channels=4, patch_size=2, context_in_dim=12, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=4,
             axes_dim=[4, 4]),
        dict(hidden_states=IMAGE, timestep=T1, encoder_hidden_states=TEXT), STACKED),
    Case("QwenImageTransformer2DModel",
        dict(patch_size=2, in_channels=16, out_channels=4, **DEEP, **WIDE, joint_attention_dim=12,
             axes_dims_rope=(8, 4, 4)),
        dict(hidden_states=noise(16, 16), encoder_hidden_states=TEXT,
             encoder_hidden_states_mask=mask(6, 6, 4, 5, 6, dtype=torch.long), timestep=T1,
             img_shapes=listed([(1, 4, 4)])), TWO_NAMED),
    Case("SanaTransformer2DModel",
        dict(**PICTURE, **HEADS, **DEEP, num_cross_attention_heads=2, cross_attention_head_dim=8,
             cross_attention_dim=16, caption_channels=12, sample_size=8, patch_size=1),
        dict(hidden_states=IMAGE, encoder_hidden_states=TEXT, timestep=T), STACKED + "; Sprint: " + EMBEDDED),
    Case("SanaVideoTransformer3DModel",
        dict(**PICTURE, num_attention_heads=2, attention_head_dim=12, **DEEP, num_cross_attention_heads=2,
             cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=12, sample_size=8,
             patch_size=(1, 2, 2), rope_max_seq_len=32),
        dict(hidden_states=VIDEO, encoder_hidden_states=TEXT, timestep=T), STACKED),
    Case("SD3Transformer2DModel",
        dict(sample_size=8, patch_size=2, **PICTURE, **DEEP, **HEADS, joint_attention_dim=12,
             caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8, dual_attention_layers=(0,),
             qk_norm="rms_norm"),
        dict(hidden_states=IMAGE, encoder_hidden_states=TEXT, pooled_projections=noise(10), timestep=T),
        STACKED + "; skip-layer guidance: one more call", slice=True, note="the last block returns no text"),
    Case("SkyReelsV2Transformer3DModel", WAN, WAN_CALL, TWO_NAMED),
    Case("StableAudioDiTModel",
        dict(sample_size=4, in_channels=3, **DEEP, attention_head_dim=8, num_attention_heads=2,
             num_key_value_attention_heads=2, out_channels=3, cross_attention_dim=8, time_proj_dim=8,
             global_states_input_dim=8, cross_attention_input_dim=8),
        dict(hidden_states=noise(3, 4), timestep=T1, encoder_hidden_states=noise(5, 8),
             global_hidden_states=noise(1, 8), rotary_embedding=rotary("stable-audio")), STACKED),
    Case("WanTransformer3DModel", WAN, WAN_CALL, TWO_NAMED, slice=True),
    Case("WanVACETransformer3DModel", dict(**WAN, vace_layers=[0, 2], vace_in_channels=8),
        {**WAN_CALL, "control_hidden_states": noise(8, 2, 8, 8)}, TWO_NAMED,
        note="hints are added after listed blocks"),
    Case("WanVACETransformer3DModel", dict(**WAN, vace_layers=[0, 3], vace_in_channels=8),
        {**WAN_CALL, "control_hidden_states": noise(8, 2, 8, 8)}, TWO_NAMED, variant="hint after the last block",
        plain="past", slice=True, note="a hint added after the last block passes the verify block by"),
    Case("ZImageTransformer2DModel",
        dict(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=16, n_layers=4, n_refiner_layers=1,
             n_heads=1, n_kv_heads=1, cap_feat_dim=12, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]),
        dict(x=listed(Shape(4, 1, 8, 8)), t=T1,
             cap_feats=listed(Shape(40, 12), Shape(6, 12), Shape(5, 12), Shape(40, 12))), STACKED, slice=True,
        note="inputs are Python lists"),
    Case("AceStepTransformer1DModel",
        dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
             head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, patch_size=2, sliding_window=2),
        dict(hidden_states=noise(8, 4), timestep=T1, timestep_r=T1, encoder_hidden_states=noise(6, 16),
             context_latents=noise(8, 8)), STACKED),
    Case("AnyFlowTransformer3DModel", WAN,
        dict(hidden_states=noise(2, 4, 8, 8), timestep=Time(1000, 2), r_timestep=table([0.0, 0.0]),
             encoder_hidden_states=noise(6, 16)),
        STACKED, note="a flow-map model, made for few steps"),
    Case("BriaFibo2Transformer2DModel", FIBO2, {**FIBO2_CALL, "encoder_attention_mask": mask(8, dtype=BOOL)}, TWO),
    Case("BriaFibo2Transformer2DModel", FIBO2,
        {**FIBO2_CALL, "encoder_attention_mask": mask(8, 8, 2, 4, 8, dtype=BOOL)}, TWO,
        variant="prompts of unequal length in one batch", plain="row by row",
        note="puts its gist tokens elsewhere when a batch is ragged"),
    Case("ConsisIDTransformer3DModel",
        {**COG, "is_train_face": True, "cross_attn_interval": 2, "cross_attn_dim_head": 4, "cross_attn_num_heads": 2,
         "LFE_id_dim": 4, "LFE_vit_dim": 4, "LFE_depth": 5, "LFE_dim_head": 4, "LFE_num_heads": 2,
         "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10, "LFE_ff_mult": 1, "LFE_num_scale": 1},
        {**COG_CALL, "id_cond": noise(4), "id_vit_hidden": layers(1, 2, 4)}, STACKED,
        note="a face term is added between blocks"),
    Case("Cosmos3OmniTransformer",
        dict(head_dim=8, hidden_size=16, intermediate_size=32, latent_channel=4, latent_patch_size=2,
             num_attention_heads=2, num_hidden_layers=4, num_key_value_heads=1, patch_latent_dim=16,
             rope_axes_dim=(2, 1, 1), vocab_size=32),
        dict(input_ids=torch.arange(6), text_indexes=torch.arange(6), position_ids=torch.arange(22), und_len=6,
             sequence_length=22, vision_tokens=listed(Shape(1, 4, 1, 8, 8)), vision_token_shapes=[(1, 4, 4)],
             vision_sequence_indexes=torch.arange(6, 22), vision_mse_loss_indexes=torch.arange(6, 22),
             vision_timesteps=Time(1000, 16, flat=True), vision_noisy_frame_indexes=[torch.arange(1)]), TWO_NAMED,
        rows=1, slice=True, latent="vision_tokens", note="packed: no row dimension, a call is one row"),
    Case("HeliosTransformer3DModel", HELIOS,
        {**WAN_CALL, "indices_hidden_states": table(torch.arange(1, 3)),
         "indices_latents_history_short": table(torch.arange(1)), "latents_history_short": noise(4, 1, 8, 8)},
        TWO_NAMED, note="autoregressive chunks: each is a run of its own"),
    Case("HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        {**HUNYUAN_CALL, "image_embeds": noise(3, 8), "indices_latents": torch.arange(1, 3),
         "latents_clean": noise(4, 1, 8, 8), "indices_latents_clean": torch.arange(1),
         "latents_history_2x": noise(4, 2, 8, 8), "indices_latents_history_2x": torch.arange(2),
         "latents_history_4x": noise(4, 4, 8, 8), "indices_latents_history_4x": torch.arange(4)}, TWO,
        slice=True, note="a row alone drops its padding tokens; chunks are runs of their own"),
    Case("Ideogram4Transformer2DModel",
        dict(in_channels=16, **DEEP, **WIDE, intermediate_size=32, adaln_dim=8, llm_features_dim=12,
             mrope_section=(4, 2, 2)),
        dict(hidden_states=noise(22, 16), timestep=T1, encoder_hidden_states=noise(22, 12),
             position_ids=table(torch.cat([torch.zeros(6, 3), grid(4, 4)]).long()),
             segment_ids=table(torch.ones(22, dtype=torch.long)), indicator=table([3] * 6 + [2] * 16)),
        "1 call each of two transformers", note="cond and uncond are two models"),
    Case("JoyImageEditTransformer3DModel", JOY, dict(hidden_states=VIDEO, timestep=T, encoder_hidden_states=TEXT), TWO),
    Case("JoyImageEditPlusTransformer3DModel", JOY,
        dict(hidden_states=noise(16, 4, 1, 2, 2), timestep=T, encoder_hidden_states=TEXT,
             encoder_hidden_states_mask=mask(6, 6, 4, 5, 6), shape_list=listed([(1, 4, 4)])), STACKED),
    Case("Kandinsky6Transformer3DModel",
        dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=6, time_dim=16, patch_size=(1, 2, 2),
             model_dim=24, ff_dim=32, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 4, 4), visual_cond=False,
             in_audio_dim=4, out_audio_dim=4, ca_rope=True, cross_gates=True, fix_modulation=True),
        dict(hidden_states=noise(2, 8, 8, 4), encoder_hidden_states=TEXT, pooled_projections=noise(6), timestep=T,
             audio_hidden_states=noise(6, 4)), TWO_NAMED,
        note="video and audio are both state and both output, and so are their texts"),
    Case("Kandinsky6SRTransformer3DModel",
        dict(in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=24, ff_dim=32, num_visual_blocks=3,
             axes_dims=(4, 4, 4), nabla_window=(1, 1, 1)),
        dict(hidden_states=noise(1, 8, 8, 9), timestep=T), ONE, note="sparse attention"),
    Case("LongCatAudioDiTTransformer",
        dict(dit_dim=16, dit_depth=4, dit_heads=2, dit_text_dim=12, latent_dim=4, ff_mult=2.0),
        dict(hidden_states=noise(8, 4), encoder_hidden_states=TEXT,
             encoder_attention_mask=mask(6, 6, 4, 5, 6, dtype=BOOL), timestep=T1,
             attention_mask=mask(8, dtype=BOOL), latent_cond=noise(8, 4)), TWO,
        note="the input is added after the stack"),
    Case("MiniMaxH3Transformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=12, hidden_size=24, **DEEP, num_refiner_layers=1, ffn_dim=32,
             in_channels=4, audio_in_channels=4, text_dim=12, freq_dim=16, time_embed_hidden_dim=24,
             time_embed_dim=16, rope_freq_dim=2),
        dict(hidden_states=noise(16, 16), audio_hidden_states=noise(4, 4), encoder_hidden_states=TEXT, timestep=T,
             timestep_indices=torch.zeros(26, dtype=torch.long), token_tags=torch.tensor([0] * 6 + [1] * 16 + [2] * 4),
             position_ids=torch.cat([torch.zeros(6, 3), grid(4, 4), torch.zeros(4, 3)]).long(),
             video_indices=torch.arange(6, 22), audio_indices=torch.arange(22, 26), text_indices=torch.arange(6)),
        EMBEDDED, rows=1, note="packed: no row dimension, a call is one row; made for few steps"),
    Case("MiniMaxMusic3Transformer1DModel",
        dict(in_channels=4, condition_dim=12, **DEEP, **HEADS, ff_inner_dim=32, rotary_dim=4,
             fourier_embedding_dim=16),
        dict(hidden_states=noise(4, 8), timestep=T1, encoder_hidden_states=noise(8, 12)), MODULAR),
    Case("PriorTransformer",
        dict(**HEADS, **DEEP, embedding_dim=16, num_embeddings=6, additional_embeddings=4),
        dict(hidden_states=noise(16), timestep=T, proj_embedding=noise(16), encoder_hidden_states=noise(6, 16),
             attention_mask=mask(6, dtype=BOOL)), STACKED,
        note="the component is called `prior`: enable it on the module itself"),
    Case("QwenImage21Transformer2DModel",
        dict(in_channels=16, out_channels=16, **DEEP, **WIDE, context_in_dim=12, axes_dims_rope=(8, 4, 4)),
        dict(hidden_states=noise(16, 16), encoder_hidden_states=TEXT, timestep=T1, img_shapes=listed([(1, 4, 4)]),
             img_mask=table([False] * 6 + [True] * 4)), TWO_NAMED,
        note="with `kv_cache`, as its pipeline calls it, it runs plainly"),
    Case("SanaWMTransformer3DModel",
        dict(in_channels=4, num_layers=4, hidden_size=32, num_attention_heads=2, linear_head_dim=16,
             caption_channels=12, chunk_plucker_channels=4, softmax_every_n=2, mlp_ratio=2.0,
             chunk_plucker_post_attn_blocks=4),
        dict(hidden_states=noise(4, 2, 4, 4), timestep=Time(1000, 1, 2), encoder_hidden_states=noise(1, 6, 12),
             encoder_attention_mask=mask(6)), STACKED),
    Case("SanaWMLTX2RefinerTransformer3DModel",
        dict(**PICTURE, **HEADS, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
             audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=3,
             caption_channels=12, rope_double_precision=False),
        dict(hidden_states=noise(32, 4), encoder_hidden_states=TEXT, timestep=T, video_rotary_emb=rotary("ltx"),
             encoder_attention_mask=mask(6)), ONE, note="with `kv_cache`, as its pipeline calls it, it runs plainly"),
    Case("StableAudio3DiTModel",
        dict(io_channels=4, embed_dim=16, depth=4, num_heads=2, cond_token_dim=8, global_cond_dim=8,
             local_add_cond_dim=5, timestep_features_dim=16, num_memory_tokens=2, ff_mult=2.0),
        dict(hidden_states=noise(4, 8), timestep=T1, encoder_hidden_states=noise(5, 8),
             global_hidden_states=noise(8), encoder_attention_mask=mask(5, 5, 3, 4, 5)), STACKED),
    Case("WanAnimateTransformer3DModel",
        {**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16,
         "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8,
         "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
         "inject_face_latents_blocks": 2},
        {**WAN_CALL, "hidden_states": noise(12, 3, 8, 8), "encoder_hidden_states_image": noise(4, 16),
         "pose_hidden_states": noise(4, 2, 8, 8), "face_pixel_values": noise(3, 5, 16, 16)}, TWO_NAMED,
        note="in verified drafts motion and face encoders run at every step; a face term is added between blocks"),
)  # fmt: skip

# What has no case, and why.
REASONS: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "each call of its pipeline reads and writes a key-value cache; runs plainly",
    "WanAnimate2Transformer3DModel": "each call takes a key-value cache; runs plainly",
    "DreamLiteTransformer2DModel": "a part of UNets, no denoiser of its own",
    "Transformer2DModel": "a part of UNets, no denoiser of its own",
    "TransformerTemporalModel": "a part of UNets, no denoiser of its own",
    "MiniMaxMusic3RVQDepthDecoder": "decodes audio codes one after the other; no denoising steps",
    "RFD4ProteinaTransformer": "designs proteins: two timesteps a call and a pair representation updated between "
    "blocks; its forward has no timestep argument, so it runs plainly",
    "T5FilmDecoder": "decodes spectrograms for a pipeline that diffusers has retired; its forward has no timestep "
    "argument, so it runs plainly",
}
