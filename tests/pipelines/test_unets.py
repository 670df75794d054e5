"""Pipelines whose denoising model is a U-Net, from tiny random components: nothing of the model is looked into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import speca
import tiny
from speca.diffusers.enable import CONTROLNET

STEPS, SEEDS = 20, [3, 8]
BLOCKS = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=12,
)  # fmt: skip
XL = dict(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=34)


def drawn(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        one = 1.0 if name.endswith("weight") and parameter.dim() == 1 else 0.0
        parameter.data = one + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def unet(channels: int = 4, **more: Any) -> Any:
    return drawn(diffusers.UNet2DConditionModel(sample_size=8, in_channels=channels, out_channels=4, **BLOCKS, **more))


def controlnet() -> Any:
    parts = {n: v for n, v in BLOCKS.items() if n != "up_block_types"}
    return drawn(diffusers.ControlNetModel(in_channels=4, conditioning_embedding_out_channels=(8, 8), **parts), 1)


def ddim() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear")


def prompts(seeds: list[int], wide: bool) -> dict[str, Tensor]:
    def draw(*shape: int, low: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(low + s)) for s in seeds])

    found = dict(prompt_embeds=draw(6, 12, low=100), negative_prompt_embeds=draw(6, 12, low=200))
    if wide:
        found |= dict(pooled_prompt_embeds=draw(10, low=300), negative_pooled_prompt_embeds=draw(10, low=400))
    return found


def picture(seed: int = 0) -> Tensor:
    return torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(seed))


def sd(name: str = "StableDiffusionPipeline", channels: int = 4, **parts: Any) -> Any:
    kept: dict[str, Any] = dict(text_encoder=None, tokenizer=None, feature_extractor=None, image_encoder=None)
    made = dict(vae=tiny.vae(), unet=unet(channels), scheduler=ddim(), safety_checker=None)
    return getattr(diffusers, name)(**{**kept, **made, **parts}, requires_safety_checker=False)


def sdxl(name: str = "StableDiffusionXLPipeline", channels: int = 4, **parts: Any) -> Any:
    kept: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "feature_extractor", "image_encoder")
    )
    made = dict(vae=tiny.vae(), unet=unet(channels, **XL), scheduler=diffusers.EulerDiscreteScheduler())
    return getattr(diffusers, name)(**{**kept, **made, **parts})


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "sd": (sd, dict(guidance_scale=5.0), STEPS),
    "sd, unguided": (sd, dict(guidance_scale=1.0), STEPS),
    "sd, DPM-Solver++": (lambda: sd(scheduler=diffusers.DPMSolverMultistepScheduler()), {}, STEPS),
    "sd, UniPC": (lambda: sd(scheduler=diffusers.UniPCMultistepScheduler()), {}, STEPS),
    "sd, PNDM": (lambda: sd(scheduler=diffusers.PNDMScheduler(skip_prk_steps=True)), {}, STEPS + 1),
    "sd, img2img": (
        lambda: sd("StableDiffusionImg2ImgPipeline"), dict(image=picture(), strength=0.8), 16,
    ),
    "sd, inpaint": (
        lambda: sd("StableDiffusionInpaintPipeline", 9),
        dict(image=picture(), mask_image=Image.new("L", (16, 16), 255), height=16, width=16, strength=1.0), STEPS,
    ),
    "sd, controlnet": (
        lambda: sd("StableDiffusionControlNetPipeline", controlnet=controlnet()),
        dict(image=picture(1), controlnet_conditioning_scale=0.7), STEPS,
    ),
    "sdxl": (sdxl, dict(guidance_scale=5.0), STEPS),
    "sdxl, img2img": (lambda: sdxl("StableDiffusionXLImg2ImgPipeline"), dict(image=picture(), strength=0.8), 16),
    "sdxl, inpaint": (
        lambda: sdxl("StableDiffusionXLInpaintPipeline", 9),
        dict(image=picture(), mask_image=Image.new("L", (16, 16), 255), height=16, width=16, strength=0.99), 19,
    ),
    "sdxl, controlnet": (
        lambda: sdxl("StableDiffusionXLControlNetPipeline", controlnet=controlnet()), dict(image=picture(1)), STEPS,
    ),
}  # fmt: skip
NAMES = pytest.mark.parametrize("name", CASES)


class Drawing:
    """A pipeline with the arguments of its call; counts what its U-Net and its ControlNet compute."""

    def __init__(self, name: str) -> None:
        make, self.call, self.steps = CASES[name]
        self.pipe, self.wide = make(), name.startswith("sdxl")
        self.pipe.set_progress_bar_config(disable=True)
        self.counts = {"unet": 0, "controlnet": 0}
        for part in self.counts:
            if (model := getattr(self.pipe, part, None)) is not None:
                inner = next(iter(model.children()))
                inner.register_forward_hook(lambda *_, part=part: self.counts.__setitem__(part, self.counts[part] + 1))

    def __call__(self, seeds: list[int] = SEEDS) -> Tensor:
        given = dict(self.call)
        if "image" in given:
            given["image"] = given["image"].expand(len(seeds), -1, -1, -1)
        if "mask_image" in given:
            given["mask_image"] = [given["mask_image"]] * len(seeds)
        if not any(n in given for n in ("image", "height")):
            given |= dict(height=16, width=16)
        self.counts |= dict.fromkeys(self.counts, 0)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        out = self.pipe(
            **given, **prompts(seeds, self.wide), generator=generators, num_inference_steps=STEPS, output_type="latent"
        )
        return torch.as_tensor(out[0])


@NAMES
def test_all_full_is_exact_and_disable_restores(name: str) -> None:
    drawing = Drawing(name)
    plain = drawing()
    models = [m for m in (drawing.pipe.unet, getattr(drawing.pipe, "controlnet", None)) if m is not None]
    before = [(set(vars(m)), type(m)) for m in models]
    speca.enable(drawing.pipe, tolerance=0.0)
    assert torch.equal(drawing(), plain)
    report = speca.report(drawing.pipe)
    assert [s.decisions for s in report.samples] == ["F" * drawing.steps] * len(SEEDS)
    speca.disable(drawing.pipe)
    assert [(set(vars(m)), type(m)) for m in models] == before
    assert torch.equal(drawing(), plain)


@NAMES
@pytest.mark.parametrize("prior", ["generic", "none"])
def test_a_budget_is_kept_and_drafts_run_nothing(name: str, prior: str) -> None:
    drawing = Drawing(name)
    plain = drawing()
    speca.enable(drawing.pipe, speedup=4, prior=prior)
    made = drawing()
    report = speca.report(drawing.pipe)
    full = drawing.steps // 4
    assert [(len(s.decisions), s.full) for s in report.samples] == [(drawing.steps, full)] * len(SEEDS)
    assert drawing.counts["unet"] == full
    assert all("too small to forecast from" in note for note in report.notes) and (full < 5 or not report.notes)
    if drawing.counts["controlnet"]:
        assert drawing.counts["controlnet"] == full, "the ControlNet runs at full steps only"
    assert made.isfinite().all() and not torch.equal(made, plain)
    assert torch.equal(drawing(), made), "runs repeat"
    alone = torch.cat([drawing([seed]) for seed in SEEDS])
    assert (alone - made).norm() < 1e-3 * made.norm()


def test_each_sample_adapts_on_its_own() -> None:
    drawing = Drawing("sd")
    plain = drawing()
    speca.enable(drawing.pipe, tolerance=0.02)
    assert (drawing() - plain).norm() < 0.2 * plain.norm()
    decisions = [s.decisions for s in speca.report(drawing.pipe).samples]
    assert all("A" in d and d.startswith("FF") for d in decisions)
    for seed, decision in zip(SEEDS, decisions, strict=True):
        drawing([seed])
        assert [s.decisions for s in speca.report(drawing.pipe).samples] == [decision]


def test_corrections_change_the_picture_and_stay_finite() -> None:
    drawing = Drawing("sd")
    plain, gaps = drawing(), {}
    for corrector in (False, True):
        speca.enable(drawing.pipe, schedule=(0, 1, 4, 8, 12, 16, 19), prior="none", corrector=corrector)
        gaps[corrector] = (drawing() - plain).norm().item()
    assert gaps[True] != gaps[False]


def test_adapters_work_as_without() -> None:
    """LoRA by peft and an IP-Adapter's image embeddings change the model and its inputs; nothing here knows of them."""
    drawing = Drawing("sd")
    plain = drawing()
    from peft import LoraConfig

    drawing.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = drawing()
    assert not torch.equal(adapted, plain)
    speca.enable(drawing.pipe, tolerance=0.0)
    assert torch.equal(drawing(), adapted)
    speca.enable(drawing.pipe, speedup=4)
    drawing()
    assert drawing.counts["unet"] == STEPS // 4
    speca.disable(drawing.pipe)
    assert torch.equal(drawing(), adapted)


def test_image_prompts_of_an_ip_adapter() -> None:
    pipe = sd()
    pipe.set_progress_bar_config(disable=True)
    cross = 12
    state = {"image_proj": {}, "ip_adapter": {}}
    generator = torch.Generator().manual_seed(0)
    state["image_proj"] = {
        "proj.weight": torch.randn((4 * cross, 8), generator=generator), "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross),
    }  # fmt: skip
    key = 1
    for name, processor in pipe.unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("k", "v"):
                state["ip_adapter"][f"{key}.to_{part}_ip.weight"] = torch.randn((hidden, cross), generator=generator)
            key += 2
        assert processor is not None
    pipe.unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    embeds = [torch.randn((4, 1, 8), generator=generator)]

    def draw() -> Tensor:
        generators = [torch.Generator().manual_seed(s) for s in SEEDS]
        out = pipe(
            **prompts(SEEDS, False), ip_adapter_image_embeds=embeds, generator=generators, output_type="latent",
            num_inference_steps=STEPS, height=16, width=16,
        )  # fmt: skip
        return torch.as_tensor(out[0])

    plain = draw()
    speca.enable(pipe, tolerance=0.0)
    assert torch.equal(draw(), plain)
    speca.enable(pipe, speedup=4)
    assert draw().isfinite().all() and {s.full for s in speca.report(pipe).samples} == {STEPS // 4}


def test_prompts_of_one_seed_are_samples_of_their_own() -> None:
    """Stacked guidance and equal first latents: the samples are known from the call, not guessed from equal rows."""
    for name in ("sd", "sdxl"):
        drawing = Drawing(name)
        speca.enable(drawing.pipe, speedup=4)
        drawing([5, 5])
        assert len(speca.report(drawing.pipe).samples) == 2
        drawing([5, 5, 5, 5])
        assert len(speca.report(drawing.pipe).samples) == 4


def test_the_hook_of_a_controlnet_goes_with_disable() -> None:
    drawing = Drawing("sd, controlnet")
    drawing()
    speca.enable(drawing.pipe, speedup=4)
    drawing()
    controlnet = drawing.pipe.controlnet
    assert CONTROLNET in controlnet.__dict__
    speca.disable(drawing.pipe)
    assert CONTROLNET not in controlnet.__dict__ and "forward" not in controlnet.__dict__


def test_a_sampler_that_is_not_linear_runs_plainly_without_blocks_to_check_with() -> None:
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    pipe = diffusers.DDPMPipeline(drawn(model), diffusers.DDPMScheduler(clip_sample=True))
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Any:
        return pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images

    plain = draw()
    speca.enable(pipe)
    with pytest.warns(UserWarning, match="runs plainly"):
        made = draw()
    assert (made == plain).all()
    assert any("a step of DDPMScheduler is not linear" in note for note in speca.report(pipe).notes)
