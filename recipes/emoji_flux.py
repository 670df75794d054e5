"""Train the bundled model `emoji-flux`: text to image in the shape of FLUX.1, on captioned emoji.

    python recipes/emoji_flux.py                                  # two CPU cores: some hours, marked "-small"
    python recipes/emoji_flux.py --device cuda --size full        # tens of minutes of one large GPU

Six stages, each resumable: an AutoencoderKL, the text encoders alone (they learn to tell what a picture looks like, as
CLIP's does, arXiv:2103.00020, here by regression), the transformer with its text encoders (rectified
flow, Liu et al. arXiv:2209.03003, with logit-normal times, Esser et al. arXiv:2403.03206), the distillation of
classifier-free guidance into its guidance input (Meng et al. arXiv:2210.03142), a scoring classifier, and the export
with scores.
Shapes: images (B, 3, 64, 64) in [-1, 1]; latents (B, 16, 8, 8) of unit variance; packed (B, 16, 64).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import emoji_text
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from emoji_data import GROUPS, SOURCES, STYLES, Dataset, load, sheet
from flow import Batch, begin_as_identity, distil, noised, train_flow
from safetensors.torch import save_file
from torch import Tensor, nn
from training import commit, console, fit, half, pick, training_table

from speca.reports import distances
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
CALL = dict(height=64, width=64, max_sequence_length=emoji_text.LENGTH)  # what a call of the pipeline is given
GUIDANCE = (1.0, 6.0)  # range the guidance input is trained on


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
        begin_as_identity(self.transformer)

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

    def __call__(self, g: torch.Generator, empty: float) -> Batch:
        i = pick(len(self.mean), self.batch, g)
        x = self.mean[i] + self.std[i] * torch.randn(self.mean[i].shape, generator=g)
        noisy, sigma, velocity = noised(x, g)
        drop = torch.rand(self.batch, generator=g) < empty
        captions = ["" if d else self.data.emoji[k].caption(g) for k, d in zip(i.tolist(), drop.tolist(), strict=True)]
        packed = [FluxPipeline._pack_latents(v, self.batch, *LATENT) for v in (noisy, velocity)]
        clip_ids, t5_ids = (v.to(self.device) for v in self.model.tokens(captions))
        return packed[0].to(self.device), sigma.to(self.device), (clip_ids, t5_ids), packed[1].to(self.device)


class Reader(nn.Module):
    """Both text encoders, each with a linear head that says what the picture of a caption looks like."""

    def __init__(self, model: Model, features: int) -> None:
        super().__init__()
        self.clip, self.t5 = model.clip, model.t5
        self.heads = nn.ModuleList(nn.Linear(emoji_text.WIDTH, features) for _ in range(2))

    def forward(self, clip_ids: Tensor, t5_ids: Tensor) -> list[Tensor]:
        states = self.clip(clip_ids).pooler_output, self.t5(t5_ids)[0].mean(1)
        return [head(state) for head, state in zip(self.heads, states, strict=True)]


def appearance(data: Dataset) -> Tensor:
    """What pictures look like, (N, 104): principal components of 16 px thumbnails, of unit variance, and the group."""
    small = F.avg_pool2d(data.rgb(), 4).flatten(1)
    left, values, _ = torch.linalg.svd(small - small.mean(0), full_matrices=False)
    parts = left[:, :96] * values[:96].sqrt()  # between variance as it is and whitened: outlines count as well
    groups = F.one_hot(torch.tensor([e.group for e in data.emoji]), len(GROUPS)).float()
    return torch.cat([parts / parts.std(), 2 * groups], dim=1)


def train_text(model: Model, data: Dataset, **how: Any) -> None:
    """The text encoders alone: without it the transformer learns rare words from a handful of noisy pictures."""
    looks, device = appearance(data), how["device"]
    reader = Reader(model, looks.shape[1])

    def loss_of(g: torch.Generator) -> Tensor:
        i = pick(len(looks), 128, g)
        ids = model.tokens([data.emoji[k].caption(g) for k in i.tolist()])
        said = reader(*(v.to(device) for v in ids))
        return sum((F.mse_loss(s.float(), looks[i].to(device)) for s in said), start=torch.zeros((), device=device))

    fit("emoji-text", reader, loss_of, lr=1e-3, **how)


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
        out = pipe(prompts[chosen], **CALL, generator=generators,
                   num_inference_steps=steps, guidance_scale=3.5, output_type="pt")  # fmt: skip
        parts.append(out.images * 2 - 1)
        console.print(f"drawn {first + len(generators)} of {len(prompts)}")
    return torch.cat(parts)


@torch.no_grad()
def score(
    pipe: FluxPipeline, classifier: Classifier, data: Dataset, held: Dataset, count: int, out: Path
) -> dict[str, Any]:
    """Agreement of the classifier with the asked group over `count` captions of the training pictures, and KID.

    Writes samples and, as reference for samples of one's own, the features of the held-out pictures to `out`.
    """
    order = torch.randperm(len(data.emoji), generator=torch.Generator().manual_seed(1_000_000))
    asked = [data.emoji[int(order[k % len(order)])] for k in range(count)]
    images = draw(pipe, [f"{e.names[0]}, {e.style}" for e in asked], [1_000_000 + k for k in range(count)])
    groups = torch.tensor([e.group for e in asked])
    agree = (torch.cat([classifier(x).argmax(1) for x in images.split(100)]) == groups).float()
    sheet(images[:64], columns=8, zoom=2).save(out / "samples.png")
    (out / "samples.txt").write_text("\n".join(f"{e.names[0]}, {e.style}" for e in asked[:64]) + "\n")
    each = {n: round(float(agree[groups == k].mean()), 3) for k, n in enumerate(GROUPS) if (groups == k).any()}
    reference = distances.features((held.rgb() + 1) / 2)
    save_file({"features": reference.half()}, out / "reference.safetensors")
    train = distances.features((data.rgb()[order[:count]] + 1) / 2)
    made = distances.features((images.clamp(-1, 1) + 1) / 2)
    return dict(
        samples=count, agreement=round(float(agree.mean()), 4), agreement_by_group=each,
        kid=round(distances.kid(made, reference)[0], 4), kid_of_real=round(distances.kid(train, reference)[0], 4),
        frechet=round(distances.frechet(made, reference), 2),
        frechet_of_real=round(distances.frechet(train, reference), 2),
    )  # fmt: skip


def main(
    work: Annotated[Path, typer.Option(help="Folder for data and checkpoints.")] = Path("recipes/_work"),
    out: Annotated[Path, typer.Option(help="Folder the finished model is written to.")] = Path(
        "src/speca/zoo/weights/emoji-flux"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[str, typer.Option(help="small (two CPU cores) or full (a GPU).")] = "small",
    vae_steps: Annotated[int, typer.Option(help="Training steps of the autoencoder.", min=2)] = 1500,
    text_steps: Annotated[int, typer.Option(help="Training steps of the text encoders alone.", min=2)] = 4000,
    steps: Annotated[int, typer.Option(help="Training steps of the transformer.", min=2)] = 9000,
    guided: Annotated[int, typer.Option(help="Steps of guidance distillation.", min=2)] = 350,
    classifier_steps: Annotated[int, typer.Option(help="Training steps of the scoring classifier.", min=2)] = 1500,
    batch: Annotated[int, typer.Option(help="Pictures a step of the transformer.", min=2)] = 64,
    vae_batch: Annotated[int, typer.Option(help="Pictures a step of the autoencoder.", min=2)] = 16,
    compiled: Annotated[bool, typer.Option(help="torch.compile the transformer.")] = False,
    bf16: Annotated[
        bool | None, typer.Option(help="bfloat16 autocast of the transformer. Default: on cuda only.")
    ] = None,
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
    cuda = device == "cuda"  # on a CPU without matrix units for bfloat16 its backward pass is many times slower
    mixed = cuda if bf16 is None else bf16

    vae = train_vae(images, vae_batch, steps=vae_steps, bf16=cuda, **how)
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
    train_text(model, data, steps=text_steps, **how)
    train_flow("emoji-flux", model, batches, forward, steps=steps, bf16=mixed, **how)
    distil("emoji-flux-guided", model, batches, forward, GUIDANCE, steps=guided, bf16=mixed, **how)
    classifier = train_classifier(data, steps=classifier_steps, **how).cpu()

    pipe = assemble(model.cpu().half(), vae.cpu().half())
    pipe.save_pretrained(out, safe_serialization=True)
    save_file(half(classifier), out / "classifier.safetensors")
    (out / "call.json").write_text(json.dumps(CALL) + "\n")
    pipe = FluxPipeline.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        real = held.rgb()
        right = torch.cat([classifier(x).argmax(1) for x in real.split(100)])
    accuracy = float((right == torch.tensor([e.group for e in held.emoji])).float().mean())
    console.print(f"classifier: {accuracy:.4f} on held-out pictures")
    scores = dict(classifier_accuracy=round(accuracy, 4), vae_psnr=round(vae_psnr, 2))
    scores |= score(pipe, classifier, data, held, scored, out)
    logs, table = training_table(work, "emoji-vae", "emoji-text", "emoji-flux", "emoji-flux-guided", "emoji-classifier")
    scores |= dict(size=size, training=logs)
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (out / "README.md").write_text(model_card(scores, table, f"--size {size}, seed 0, batch {batch}, on {device}"))
    console.print_json(data=scores)


def model_card(scores: dict[str, Any], table: str, how: str) -> str:
    """The model's README: data, licences, how it was trained, what it scored."""
    groups = "\n".join(f"| {name} | {share:.1%} |" for name, share in scores["agreement_by_group"].items())
    call = ", ".join(f"{name}={value}" for name, value in CALL.items())
    mark = "-small" if scores["size"] == "small" else ""
    return f"""---
license: cc-by-4.0
makes: 64 x 64 emoji from text
library_name: diffusers
pipeline_tag: text-to-image
---
# emoji-flux{mark}

Text to image in the shape of FLUX.1: an unmodified `FluxPipeline` with double and single stream blocks, rectified flow,
distilled guidance, T5 and CLIP text encoders with a vocabulary of their own, and an `AutoencoderKL` of 16 x 8 x 8
latents. It exists so that acceleration can be measured on trained weights; it says nothing about FLUX.1 itself.

    pipe = FluxPipeline.from_pretrained("emoji-flux")
    pipe("a red apple", {call}).images[0]

![64 samples; what was asked stands in samples.txt](samples.png)

{SOURCES}
- **Weights**: CC-BY 4.0, float16 safetensors.
- **Training**: `python recipes/emoji_flux.py` ({how}, commit {commit()}):

{table}

- **Scores**: the classifier, trained on real pictures only, is right on {scores["classifier_accuracy"]:.1%} of held-out
  pictures; it agrees with the asked group on {scores["agreement"]:.1%} of {scores["samples"]} samples (50 steps,
  guidance 3.5, seeds from 1000000, no acceleration). The autoencoder restores held-out pictures at
  {scores["vae_psnr"]:.1f} dB (median). To the held-out pictures, on EfficientNet-Lite0 features
  (`speca.compare.distance`): KID {scores["kid"]:.4f} of samples and {scores["kid_of_real"]:.4f} of training pictures,
  Frechet distance {scores["frechet"]:.1f} and {scores["frechet_of_real"]:.1f} (not FID, which is taken on other
  features).

| group | agreement |
| --- | --- |
{groups}

- **Limits**: names of emoji in English; whole sentences, and what is no emoji, mean little to it.
"""


if __name__ == "__main__":
    typer.run(main)
