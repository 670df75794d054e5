"""Train the bundled model `emoji-unet`: text to image with a U-Net in the shape of Stable Diffusion, on flat emoji.

    python recipes/emoji_unet.py                                  # one CPU core: about three quarters of an hour

The autoencoder and the CLIP text encoder are those of `emoji-flux`, frozen; only the U-Net is trained, on the pictures
of one style and four groups. It predicts velocities (Salimans and Ho, arXiv:2202.00512) on the noise schedule of Stable
Diffusion; a tenth of the captions is empty for classifier-free guidance.
Shapes: images (B, 3, 64, 64) in [-1, 1]; latents (B, 16, 8, 8), about unit variance; text states (B, 12, 128).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import emoji_text
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from emoji_data import GROUPS, SOURCES, Dataset, Emoji, load, sheet
from emoji_flux import encode
from flow import UNCONDITIONAL
from torch import Tensor
from training import commit, console, fit, pick, training_table
from transformers import CLIPTextModel, CLIPTokenizer

from speca.zoo import WEIGHTS, load_classifier

STYLE = "flat"
SUBJECTS = ("smileys & emotion", "animals & nature", "food & drink", "travel & places")
"""One style and half of the groups, so that a short training sees each picture often."""
UNET: dict[str, Any] = dict(
    sample_size=8, in_channels=16, out_channels=16, block_out_channels=(64, 96), layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=emoji_text.WIDTH, attention_head_dim=4, norm_num_groups=8,
)  # fmt: skip
SCHEDULE: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
    steps_offset=1, prediction_type="v_prediction",
)  # fmt: skip
CALL: dict[str, Any] = dict(height=64, width=64, guidance_scale=4.0)  # what a call of the pipeline is given


def frozen(source: Path) -> StableDiffusionPipeline:
    """The pipeline to be trained: autoencoder and text encoder out of the folder `source`, and a U-Net that is new."""
    vae = AutoencoderKL.from_pretrained(source / "vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=None)  # StableDiffusionPipeline knows none
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(source / "tokenizer"), unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(**SCHEDULE), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def train(pipe: StableDiffusionPipeline, data: Dataset, batch: int, compiled: bool, **how: Any) -> None:
    """Mean squared error of the velocity at uniform timesteps; the U-Net of `pipe` is left with averaged weights."""
    device = how["device"]
    pipe.to(device)
    with torch.no_grad():
        mean, std = (part * pipe.vae.config.scaling_factor for part in encode(pipe.vae, data.rgb(), device))
    forward = torch.compile(pipe.unet) if compiled else pipe.unet

    def loss_of(g: torch.Generator) -> Tensor:
        i = pick(len(mean), batch, g)
        x, noise = mean[i] + std[i] * torch.randn(mean[i].shape, generator=g), torch.randn(mean[i].shape, generator=g)
        t = pick(pipe.scheduler.config.num_train_timesteps, batch, g)
        drop = torch.rand(batch, generator=g) < UNCONDITIONAL
        captions = ["" if d else data.emoji[k].caption(g) for k, d in zip(i.tolist(), drop.tolist(), strict=True)]
        with torch.no_grad():
            states = pipe.text_encoder(emoji_text.ids(pipe.tokenizer, captions).to(device))[0]  # type: ignore[attr-defined]
        noisy, velocity = pipe.scheduler.add_noise(x, noise, t), pipe.scheduler.get_velocity(x, noise, t)
        return F.mse_loss(forward(noisy.to(device), t.to(device), states).sample, velocity.to(device))

    fit("emoji-unet", pipe.unet, loss_of, lr=1e-3, **how)


def draw(pipe: StableDiffusionPipeline, asked: list[Emoji]) -> Tensor:
    """One image for each of `asked`, (N, 3, 64, 64) in [-1, 1], by 50 steps, on seeds from 1000000."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for first in range(0, len(asked), 50):
        some = asked[first : first + 50]
        generators = [torch.Generator().manual_seed(1_000_000 + first + k) for k in range(len(some))]
        out = pipe([e.names[0] for e in some], **CALL, generator=generators, output_type="pt")
        parts.append(out.images * 2 - 1)
        console.print(f"drawn {first + len(some)} of {len(asked)}")
    return torch.cat(parts)


@torch.no_grad()
def score(pipe: StableDiffusionPipeline, data: Dataset, held: Dataset, count: int, out: Path) -> dict[str, Any]:
    """How often the classifier of `emoji-flux` sees the group that was asked for; writes samples to `out`."""
    order = torch.randperm(len(data.emoji), generator=torch.Generator().manual_seed(1_000_000)).tolist()
    asked = [data.emoji[order[k % len(order)]] for k in range(count)]
    images, classifier = draw(pipe, asked), load_classifier("emoji-flux")

    def agreement(pictures: Tensor, emoji: list[Emoji]) -> Tensor:
        seen = torch.cat([classifier(x).argmax(1) for x in pictures.split(100)])
        return (seen == torch.tensor([e.group for e in emoji])).float()

    agree, groups = agreement(images, asked), torch.tensor([e.group for e in asked])
    sheet(images[:64]).quantize(256).save(out / "samples.png")  # a third of the bytes
    (out / "samples.txt").write_text("\n".join(e.names[0] for e in asked[:64]) + "\n")
    return dict(
        classifier_accuracy=round(float(agreement(held.rgb(), held.emoji).mean()), 4),
        samples=count, agreement=round(float(agree.mean()), 4),
        agreement_by_group={
            n: round(float(agree[groups == k].mean()), 3) for k, n in enumerate(GROUPS) if (groups == k).any()
        },
    )  # fmt: skip


def main(
    work: Annotated[Path, typer.Option(help="Folder for data and checkpoints.")] = Path("recipes/_work"),
    out: Annotated[Path, typer.Option(help="Folder the finished model is written to.")] = WEIGHTS / "emoji-unet",
    source: Annotated[Path, typer.Option(help="Folder whose autoencoder and text encoder it uses.")] = WEIGHTS
    / "emoji-flux",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Training steps of the U-Net.", min=2)] = 3200,
    batch: Annotated[int, typer.Option(help="Pictures a step.", min=2)] = 32,
    compiled: Annotated[bool, typer.Option(help="torch.compile the U-Net.")] = False,
    scored: Annotated[int, typer.Option(help="Samples scored at the end.", min=1)] = 200,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Train, export and score emoji-unet."""
    torch.set_num_threads(threads)
    whole = load(work)
    keep = [i for i, e in enumerate(whole.emoji) if e.style == STYLE and GROUPS[e.group] in SUBJECTS]
    flat = Dataset([whole.emoji[i] for i in keep], whole.pixels[keep])
    data, held = flat.part(False), flat.part(True)
    torch.manual_seed(0)
    pipe = frozen(source)
    train(pipe, data, batch, compiled, steps=steps, work=work, device=device)

    pipe.to("cpu", torch.float16).save_pretrained(out, safe_serialization=True)
    (out / "call.json").write_text(json.dumps(CALL) + "\n")
    pipe = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    scores = score(pipe, data, held, scored, out)
    logs, table = training_table(work, "emoji-unet")
    scores |= dict(pictures=len(data.emoji), seen=round(steps * batch / len(data.emoji)), training=logs)
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (out / "README.md").write_text(model_card(scores, table, f"seed 0, batch {batch}, on {device}"))
    console.print_json(data=scores)


def model_card(scores: dict[str, Any], table: str, how: str) -> str:
    """The model's README: data, licences, how it was trained, what it scored."""
    groups = "\n".join(f"| {name} | {share:.1%} |" for name, share in scores["agreement_by_group"].items())
    call = ", ".join(f"{name}={value}" for name, value in CALL.items())
    return f"""---
license: cc-by-4.0
makes: 64 x 64 flat emoji from text, by a U-Net
library_name: diffusers
pipeline_tag: text-to-image
---
# emoji-unet

Text to image in the shape of Stable Diffusion: an unmodified `StableDiffusionPipeline` with a U-Net of two levels that
predicts velocities, cross-attention to a CLIP text encoder, classifier-free guidance and DDIM. Autoencoder and text
encoder are those of `emoji-flux`, as they were. It exists so that acceleration of U-Nets can be measured on trained
weights; it says nothing about Stable Diffusion itself.

    pipe = StableDiffusionPipeline.from_pretrained("emoji-unet")
    pipe("red apple", {call}).images[0]

![64 samples; what was asked stands in samples.txt](samples.png)

{SOURCES}
  The U-Net has seen only Twemoji, and of it {", ".join(SUBJECTS)}.
- **Weights**: CC-BY 4.0, float16 safetensors.
- **Training**: `python recipes/emoji_unet.py` ({how}, commit {commit()}):

{table}

- **Scores**: the classifier of `emoji-flux`, trained on real pictures only, is right on
  {scores["classifier_accuracy"]:.1%} of held-out flat pictures; it agrees with the asked group on
  {scores["agreement"]:.1%} of {scores["samples"]} samples (names of training pictures, 50 steps,
  guidance {CALL["guidance_scale"]:g}, seeds from 1000000, no acceleration).

| group | agreement |
| --- | --- |
{groups}

- **Limits**: one style, and names of emoji in English; whole sentences, and what is no emoji, mean little to it. It has
  seen {scores["pictures"]} pictures {scores["seen"]} times each, so it draws what it remembers of them.
"""


if __name__ == "__main__":
    typer.run(main)
