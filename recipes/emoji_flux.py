"""Train the bundled model `emoji-flux`: text to image in the shape of FLUX.1, on captioned emoji.

    python recipes/emoji_flux.py                                  # two CPU cores: under two hours, marked "-small"
    python recipes/emoji_flux.py --device cuda --size full        # tens of minutes of one large GPU

Five stages, each resumable: a scoring classifier, an AutoencoderKL, the transformer with its text encoders (rectified
flow, Liu et al. arXiv:2209.03003, with logit-normal times, Esser et al. arXiv:2403.03206), the distillation of
classifier-free guidance into its guidance input (Meng et al. arXiv:2210.03142), and the export with scores.
Shapes: images (B, 3, 64, 64) in [-1, 1]; latents (B, 16, 8, 8) of unit variance; packed (B, 16, 64).
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Annotated, Any

import emoji_text
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from emoji_data import GROUPS, STYLES, Dataset, load, sheet
from safetensors.torch import save_file
from torch import Tensor, nn
from training import console, fit, half, pick, training_table

from speca.zoo.classifier import Classifier

LATENT = (16, 8, 8)
VAE_CONFIG: dict[str, Any] = dict(
    in_channels=3, out_channels=3, latent_channels=LATENT[0], block_out_channels=(16, 32, 64, 128),
    layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=8, sample_size=64, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "small": dict(num_layers=4, num_single_layers=12, num_attention_heads=6, attention_head_dim=32,
                  axes_dims_rope=(8, 12, 12)),
    "full": dict(num_layers=6, num_single_layers=16, num_attention_heads=8, attention_head_dim=48,
                 axes_dims_rope=(16, 16, 16)),
}  # fmt: skip
UNCONDITIONAL = 0.1  # share of empty captions
GUIDANCE = (1.0, 6.0)  # range the guidance input is trained on
PREVIEW = "a red apple"


# ------------------------------------------------------------------------------------------------ parts
def train_classifier(data: Dataset, **how: Any) -> Classifier:
    """Which of the eight groups a picture belongs to, from real pictures only."""
    model, device = Classifier(3, len(GROUPS), width=16, stages=4), how["device"]
    images, groups = data.rgb(), torch.tensor([e.group for e in data.emoji])

    def loss_of(g: torch.Generator) -> Tensor:
        i = pick(len(images), 128, g)
        shift = torch.randint(-4, 5, (2,), generator=g).tolist()
        x = images[i].roll(shift, dims=(2, 3))
        x = x + 0.1 * torch.randn(x.shape, generator=g) * torch.rand((), generator=g)
        return F.cross_entropy(model(x.to(device)), groups[i].to(device), label_smoothing=0.05)

    return fit("emoji-classifier", model, loss_of, decay=0.99, lr=2e-3, **how)


def train_vae(images: Tensor, batch: int, **how: Any) -> AutoencoderKL:
    """The autoencoder: absolute and squared error, a little weight on keeping the posterior near a unit normal."""
    vae, device = AutoencoderKL(**VAE_CONFIG), how["device"]
    vae = vae.to(memory_format=torch.channels_last)

    def loss_of(g: torch.Generator) -> Tensor:
        x = images[pick(len(images), batch, g)].to(device, memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g).to(device)
        restored = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return F.l1_loss(restored, x) + F.mse_loss(restored, x) + 1e-3 * kl

    return fit("emoji-vae", vae, loss_of, lr=2e-3, decay=0.995, **how)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of all images, each (N, 16, 8, 8), on the CPU."""
    parts = [vae.encode(chunk.to(device)).latent_dist for chunk in images.split(100)]
    return torch.cat([p.mean.cpu() for p in parts]), torch.cat([p.std.cpu() for p in parts])


class Model(nn.Module):
    """The three trained parts of the pipeline as one module, called with token ids."""

    def __init__(self, captions: list[str], size: str) -> None:
        super().__init__()
        self.tokenizer_2, self.t5 = emoji_text.t5(captions)
        self.tokenizer, self.clip = emoji_text.clip(captions)
        self.transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4 * LATENT[0], joint_attention_dim=emoji_text.WIDTH,
            pooled_projection_dim=emoji_text.WIDTH, guidance_embeds=True, **SIZES[size],
        )  # fmt: skip
        for module in self.transformer.modules():  # adaLN-zero: every block begins as the identity
            if "AdaLayerNorm" in type(module).__name__:
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)

    def tokens(self, captions: list[str]) -> tuple[Any, Any]:
        return emoji_text.ids(self.tokenizer, captions), emoji_text.ids(self.tokenizer_2, captions)

    def forward(self, latents: Tensor, sigma: Tensor, guidance: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Velocity noise - data, packed (B, 16, 64), at `sigma` (B,), exactly as FluxPipeline asks for it."""
        return self.transformer(
            hidden_states=latents, timestep=sigma, guidance=guidance,
            pooled_projections=self.clip(clip_ids).pooler_output, encoder_hidden_states=self.t5(t5_ids)[0],
            txt_ids=torch.zeros(t5_ids.shape[1], 3, device=latents.device),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 4, 4, latents.device, torch.float32),
            return_dict=False,
        )[0]  # fmt: skip


def captions_of(data: Dataset) -> list[str]:
    """Everything a caption may say, for the vocabularies."""
    names = [name for e in data.emoji for name in e.names]
    return [*names, *(f"a {name}" for name in names), *(f"{name}, {style}" for name in names for style in STYLES)]


class Batches:
    """Draws training batches: packed noisy latents, times, token ids and the velocity to learn."""

    def __init__(self, data: Dataset, mean: Tensor, std: Tensor, model: Model, batch: int, device: str) -> None:
        self.data, self.mean, self.std, self.model, self.batch, self.device = data, mean, std, model, batch, device

    def __call__(self, g: torch.Generator, empty: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        i = pick(len(self.mean), self.batch, g)
        x = self.mean[i] + self.std[i] * torch.randn(self.mean[i].shape, generator=g)
        noise = torch.randn(x.shape, generator=g)
        sigma = torch.sigmoid(torch.randn(self.batch, generator=g))
        s = sigma.view(-1, 1, 1, 1)
        noisy, velocity = (1 - s) * x + s * noise, noise - x
        drop = torch.rand(self.batch, generator=g) < empty
        captions = ["" if d else self.data.emoji[k].caption(g) for k, d in zip(i.tolist(), drop.tolist(), strict=True)]
        packed = [FluxPipeline._pack_latents(v, self.batch, *LATENT) for v in (noisy, velocity)]
        clip_ids, t5_ids = self.model.tokens(captions)
        moved = [v.to(self.device) for v in (packed[0], sigma, clip_ids, t5_ids, packed[1])]
        return moved[0], moved[1], moved[2], moved[3], moved[4]


def train_flow(model: Model, batches: Batches, forward: Any, **how: Any) -> Model:
    """Rectified flow: mean squared error of the velocity; guidance input 1."""

    def loss_of(g: torch.Generator) -> Tensor:
        x, sigma, clip_ids, t5_ids, velocity = batches(g, UNCONDITIONAL)
        return F.mse_loss(forward(x, sigma, torch.ones_like(sigma), clip_ids, t5_ids).float(), velocity)

    return fit("emoji-flux", model, loss_of, lr=1e-3, **how)


def distil(model: Model, batches: Batches, forward: Any, **how: Any) -> Model:
    """Guidance into the guidance input: v(w) = v_empty + w (v_caption - v_empty), Meng et al., eq. 3 there."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False).to(how["device"])
    empty = [v.to(how["device"]) for v in model.tokens([""])]

    def loss_of(g: torch.Generator) -> Tensor:
        x, sigma, clip_ids, t5_ids, _ = batches(g, 0.0)
        w = torch.empty(len(x)).uniform_(*GUIDANCE, generator=g).to(x.device)
        with torch.no_grad():
            one, both = torch.ones_like(w), [torch.cat([ids, e.expand_as(ids)]) for ids, e in
                                             zip((clip_ids, t5_ids), empty, strict=True)]  # fmt: skip
            told, free = teacher(x.repeat(2, 1, 1), sigma.repeat(2), one.repeat(2), *both).float().chunk(2)
            target = free + w.view(-1, 1, 1) * (told - free)
        return F.mse_loss(forward(x, sigma, w, clip_ids, t5_ids).float(), target)

    return fit("emoji-flux-guided", model, loss_of, lr=5e-4, **how)


# ------------------------------------------------------------------------------------------------ export
def assemble(model: Model, vae: AutoencoderKL) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=model.clip, tokenizer=model.tokenizer,
        text_encoder_2=model.t5, tokenizer_2=model.tokenizer_2, transformer=model.transformer,
    )  # fmt: skip


def draw(pipe: FluxPipeline, prompts: list[str], seeds: list[int], steps: int = 50) -> Tensor:
    """Images (N, 3, 64, 64) in [-1, 1] at the sizes the model is made for."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for first in range(0, len(prompts), 50):
        chosen = slice(first, first + 50)
        generators = [torch.Generator().manual_seed(s) for s in seeds[chosen]]
        out = pipe(prompts[chosen], height=64, width=64, max_sequence_length=emoji_text.LENGTH, generator=generators,
                   num_inference_steps=steps, guidance_scale=3.5, output_type="pt")  # fmt: skip
        parts.append(out.images * 2 - 1)
        console.print(f"drawn {first + len(generators)} of {len(prompts)}")
    return torch.cat(parts)


@torch.no_grad()
def score(pipe: FluxPipeline, classifier: Classifier, data: Dataset, count: int, out: Path) -> dict[str, Any]:
    """Agreement of the classifier with the asked group over `count` captions of the training pictures."""
    order = torch.randperm(len(data.emoji), generator=torch.Generator().manual_seed(1_000_000))
    asked = [data.emoji[int(order[k % len(order)])] for k in range(count)]
    images = draw(pipe, [f"{e.names[0]}, {e.style}" for e in asked], [1_000_000 + k for k in range(count)])
    groups = torch.tensor([e.group for e in asked])
    agree = (torch.cat([classifier(x).argmax(1) for x in images.split(100)]) == groups).float()
    sheet(images[:64], columns=8, zoom=2).save(out / "samples.png")
    (out / "samples.txt").write_text("\n".join(f"{e.names[0]}, {e.style}" for e in asked[:64]) + "\n")
    torch.save(images, out.parent / f"{out.name}-scored.pt")
    each = {name: round(float(agree[groups == k].mean()), 3) for k, name in enumerate(GROUPS)}
    return dict(samples=count, agreement=round(float(agree.mean()), 4), agreement_by_group=each)


def main(
    work: Annotated[Path, typer.Option(help="Folder for data and checkpoints.")] = Path("recipes/_work"),
    out: Annotated[Path, typer.Option(help="Folder the finished model is written to.")] = Path(
        "src/speca/zoo/weights/emoji-flux"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[str, typer.Option(help="small (two CPU cores) or full (a GPU).")] = "small",
    vae_steps: Annotated[int, typer.Option(help="Training steps of the autoencoder.", min=2)] = 1500,
    steps: Annotated[int, typer.Option(help="Training steps of the transformer.", min=2)] = 2800,
    guided: Annotated[int, typer.Option(help="Steps of guidance distillation.", min=2)] = 350,
    batch: Annotated[int, typer.Option(help="Pictures a step of the transformer.", min=2)] = 64,
    vae_batch: Annotated[int, typer.Option(help="Pictures a step of the autoencoder.", min=2)] = 16,
    compiled: Annotated[bool, typer.Option(help="torch.compile the transformer.")] = False,
    scored: Annotated[int, typer.Option(help="Samples scored at the end.", min=1)] = 1000,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train, export and score emoji-flux."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size!r}: one of {', '.join(SIZES)}", param_hint="--size")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    whole = load(work)
    data, held = whole.part(False), whole.part(True)
    images = data.rgb()
    how: dict[str, Any] = dict(work=work, device=device)
    bf16 = device == "cuda"  # without matrix units for it, its backward pass is many times slower than float32

    vae = train_vae(images, vae_batch, steps=vae_steps, bf16=bf16, **how)
    mean, std = encode(vae, images, device)
    shift, scale = float(mean.mean()), 1 / math.sqrt(float(mean.var()) + float((std**2).mean()))
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    with torch.no_grad():
        test = held.rgb().to(device)
        restored = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in test.split(100)])
    vae_psnr = float((10 * torch.log10(4 / (restored.clamp(-1, 1) - test).pow(2).mean((1, 2, 3)))).median())
    console.print(f"vae: median {vae_psnr:.2f} dB on held-out pictures, scale {scale:.3f}, shift {shift:.3f}")

    torch.manual_seed(1)
    model = Model(captions_of(whole), size)
    batches = Batches(data, (mean - shift) * scale, std * scale, model, batch, device)
    forward = torch.compile(model) if compiled else model
    train_flow(model, batches, forward, steps=steps, bf16=bf16, **how)
    distil(model, batches, forward, steps=guided, bf16=bf16, **how)
    classifier = train_classifier(data, steps=700, **how).cpu()

    pipe = assemble(model.cpu().half(), vae.cpu().half())
    pipe.save_pretrained(out, safe_serialization=True)
    save_file(half(classifier), out / "classifier.safetensors")
    pipe = FluxPipeline.from_pretrained(out, torch_dtype=torch.float32)
    with torch.no_grad():
        real = held.rgb()
        right = torch.cat([classifier(x).argmax(1) for x in real.split(100)])
    accuracy = float((right == torch.tensor([e.group for e in held.emoji])).float().mean())
    console.print(f"classifier: {accuracy:.4f} on held-out pictures")
    scores = dict(classifier_accuracy=round(accuracy, 4), vae_psnr=round(vae_psnr, 2))
    scores |= score(pipe, classifier, data, scored, out)
    logs, table = training_table(work, "emoji-classifier", "emoji-vae", "emoji-flux", "emoji-flux-guided")
    scores |= dict(size=size, training=logs)
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (out / "README.md").write_text(model_card(scores, table, batch, device))
    console.print_json(data=scores)


def model_card(scores: dict[str, Any], table: str, batch: int, device: str) -> str:
    """The model's README: data, licences, how it was trained, what it scored."""
    return ""


if __name__ == "__main__":
    typer.run(main)
