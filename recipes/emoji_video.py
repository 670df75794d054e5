"""Train the bundled model `emoji-video`: text to video in the shape of HunyuanVideo, on moving emoji.

    python recipes/emoji_video.py                                 # two CPU cores: some hours, marked "-small"
    python recipes/emoji_video.py --device cuda --size full       # tens of minutes of one large GPU

Four stages, each resumable: an AutoencoderKLHunyuanVideo (see `clip_vae.py`), the transformer with its text encoders,
the distillation of guidance (see `flow.py`), and the export with scores. Shapes: clips (B, 3, 17, 64, 64) in [-1, 1];
latents (B, 16, 5, 8, 8) of unit mean square.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import emoji_text
import torch
import typer
from clip_data import DIRECTIONS, FRAMES, caption, direction, draw_clips, is_known, known, render, sprites
from clip_text import CROP, llama, llama_ids
from clip_vae import CONFIG, restoration, train_vae
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from emoji_data import SOURCES, STYLES, Dataset, load, sheet
from flow import Batch, begin_as_identity, distil, noised, train_flow
from torch import Tensor, nn
from training import commit, console, pick, training_table

SIZES: dict[str, dict[str, Any]] = {
    "small": dict(num_layers=4, num_single_layers=8, num_attention_heads=3, attention_head_dim=32, mlp_ratio=2.5,
                  rope_axes_dim=(8, 12, 12)),  # small, as all bundled weights together come to 60 MiB
    "full": dict(num_layers=4, num_single_layers=12, num_attention_heads=6, attention_head_dim=32,
                 rope_axes_dim=(8, 12, 12)),
}  # fmt: skip
CALL = dict(height=64, width=64, num_frames=FRAMES, max_sequence_length=emoji_text.LENGTH)
CLIP_LENGTH = 77  # the pipeline asks CLIP for so many tokens
PARTS = ("emoji-video-stills", "emoji-video-windows", "emoji-video-vae", "emoji-video", "emoji-video-known",
         "emoji-video-guided")  # fmt: skip
CHANNELS = CONFIG["latent_channels"]
STYLE = STYLES[0]
GUIDANCE = (1.0, 8.0)  # range the guidance input is trained on


# ------------------------------------------------------------------------------------------------ parts
@torch.no_grad()
def encode(vae: AutoencoderKLHunyuanVideo, data: Dataset, count: int, work: Path, device: str) -> dict[str, Any]:
    """Posterior means and deviations (N, 16, 5, 8, 8) of `count` training clips, and what they show; kept in `work`."""
    path = work / "emoji-video-latents.pt"
    if path.exists() and len((kept := torch.load(path, weights_only=False))["clips"]) == count:
        return dict(kept)
    clips = draw_clips(data, count, torch.Generator().manual_seed(1))
    means, stds = [], []
    for first in range(0, count, 4):
        posterior = vae.encode(render(data, clips[first : first + 4]).to(device)).latent_dist
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
    found = dict(clips=clips, mean=torch.cat(means), std=torch.cat(stds))
    torch.save(found, path)
    return found


def of_known(data: Dataset, found: dict[str, Any]) -> dict[str, Any]:
    """The encoded clips of known objects in one style."""
    keep = [i for i, clip in enumerate(found["clips"]) if is_known(data.emoji[clip.sprite], STYLE)]
    return dict(clips=[found["clips"][i] for i in keep], mean=found["mean"][keep], std=found["std"][keep])


class Model(nn.Module):
    """The three trained parts of the pipeline as one module, called with token ids."""

    def __init__(self, captions: list[str], size: str) -> None:
        super().__init__()
        self.tokenizer, self.llama = llama(captions)
        self.tokenizer_2, self.clip = emoji_text.clip(captions, CLIP_LENGTH)
        self.transformer = HunyuanVideoTransformer3DModel(
            in_channels=CHANNELS, out_channels=CHANNELS, patch_size=2, patch_size_t=1, num_refiner_layers=1,
            guidance_embeds=True, text_embed_dim=emoji_text.WIDTH, pooled_projection_dim=emoji_text.WIDTH,
            **SIZES[size],
        )  # fmt: skip
        begin_as_identity(self.transformer)

    def tokens(self, captions: list[str]) -> tuple[Any, ...]:
        """CLIP's ids, Llama's ids and Llama's mask."""
        return (emoji_text.ids(self.tokenizer_2, captions), *llama_ids(self.tokenizer, captions))

    def forward(
        self, latents: Tensor, sigma: Tensor, guidance: Tensor, clip_ids: Tensor, ids: Tensor, mask: Tensor
    ) -> Tensor:
        """Velocity noise - data, (B, 16, 5, 8, 8), at `sigma` (B,), exactly as HunyuanVideoPipeline asks for it."""
        words = self.llama(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
        out: Tensor = self.transformer(
            hidden_states=latents, timestep=1000 * sigma, guidance=1000 * guidance,
            encoder_hidden_states=words[:, CROP:], encoder_attention_mask=mask[:, CROP:],
            pooled_projections=self.clip(clip_ids).pooler_output, return_dict=False,
        )[0]  # fmt: skip
        return out


def captions_of(data: Dataset) -> list[str]:
    """Everything a caption may say, for the vocabularies."""
    names = sorted({e.names[0] for e in data.emoji})
    asked = [f"{name} moving {way}" for name in names for way in DIRECTIONS]
    return [*asked, *(f"a {text}" for text in asked), *(f"{text}, {style}" for text in asked for style in STYLES)]


class Clips:
    """Draws training batches of `batch` clips out of the encoded ones; `scale` brings latents to unit mean square."""

    def __init__(
        self, data: Dataset, found: dict[str, Any], scale: float, model: Model, batch: int, device: str
    ) -> None:
        self.data, self.found, self.scale, self.model, self.batch, self.device = (
            data, found, scale, model, batch, device,
        )  # fmt: skip

    def __call__(self, g: torch.Generator, empty: float) -> Batch:
        i = pick(len(self.found["clips"]), self.batch, g)
        mean, std = self.found["mean"][i], self.found["std"][i]
        x = self.scale * (mean + std * torch.randn(mean.shape, generator=g))
        noisy, sigma, velocity = noised(x, g)
        drop = torch.rand(self.batch, generator=g) < empty
        shown = [self.found["clips"][k] for k in i.tolist()]
        texts = ["" if d else caption(self.data, c, g) for c, d in zip(shown, drop.tolist(), strict=True)]
        ids = tuple(v.to(self.device) for v in self.model.tokens(texts))
        return noisy.to(self.device), sigma.to(self.device), ids, velocity.to(self.device)


# ------------------------------------------------------------------------------------------------ export
def assemble(model: Model, vae: AutoencoderKLHunyuanVideo) -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=model.llama, tokenizer=model.tokenizer,
        text_encoder_2=model.clip, tokenizer_2=model.tokenizer_2, transformer=model.transformer,
    )  # fmt: skip


def draw(pipe: HunyuanVideoPipeline, prompts: list[str], seeds: list[int], steps: int = 50) -> Tensor:
    """Clips (N, 3, 17, 64, 64) in [-1, 1]."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for first in range(0, len(prompts), 20):
        chosen = slice(first, first + 20)
        generators = [torch.Generator().manual_seed(s) for s in seeds[chosen]]
        out = pipe(prompts[chosen], **CALL, generator=generators, num_inference_steps=steps, output_type="pt")
        parts.append(out.frames.transpose(1, 2) * 2 - 1)
        console.print(f"drawn {first + len(generators)} of {len(prompts)}")
    return torch.cat(parts)


def score(pipe: HunyuanVideoPipeline, data: Dataset, count: int, out: Path) -> dict[str, Any]:
    """How often `count` clips move as asked, beside the same scorer on as many real clips; writes samples to `out`."""
    asked = draw_clips(data, count, torch.Generator().manual_seed(1_000_000))
    ways = [clip.direction for clip in asked]
    real = direction(torch.cat([render(data, asked[k : k + 50]) for k in range(0, count, 50)]))
    prompts = [f"a {data.emoji[clip.sprite].names[0]} moving {clip.direction}" for clip in asked]
    clips = draw(pipe, prompts, [1_000_000 + k for k in range(count)])
    found = direction(clips)
    contact = clips[:24, :, :: (FRAMES - 1) // 4].transpose(1, 2).flatten(0, 1)
    sheet(contact, columns=10, zoom=1).save(out / "samples.png")
    frames = [sheet(clips[:16, :, k], columns=4, zoom=2) for k in range(FRAMES)]
    frames[0].save(out / "samples.webp", save_all=True, append_images=frames[1:], duration=80, loop=0)
    (out / "samples.txt").write_text("\n".join(prompts[:24]) + "\n")
    share = {way: _share([f == w for f, w in zip(found, ways, strict=True) if w == way]) for way in DIRECTIONS}
    return dict(
        samples=count,
        direction=_share([f == w for f, w in zip(found, ways, strict=True)]),
        direction_of_real_clips=_share([r == w for r, w in zip(real, ways, strict=True)]),
        direction_by_way=share,
    )


def _share(hits: list[bool]) -> float:
    return round(sum(hits) / max(1, len(hits)), 4)


def main(
    work: Annotated[Path, typer.Option(help="Folder for data and checkpoints.")] = Path("recipes/_work"),
    out: Annotated[Path, typer.Option(help="Folder the finished model is written to.")] = Path(
        "src/speca/zoo/weights/emoji-video"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[str, typer.Option(help="small (two CPU cores) or full (a GPU).")] = "small",
    stills: Annotated[int, typer.Option(help="Training steps of the autoencoder on single frames.", min=2)] = 2400,
    windows: Annotated[int, typer.Option(help="Its training steps on pieces of clips.", min=2)] = 1000,
    vae_steps: Annotated[int, typer.Option(help="Its training steps on whole clips.", min=2)] = 200,
    steps: Annotated[int, typer.Option(help="Training steps of the transformer.", min=2)] = 5000,
    known_steps: Annotated[int, typer.Option(help="Further steps on known objects, if small.", min=2)] = 1500,
    guided: Annotated[int, typer.Option(help="Steps of guidance distillation.", min=2)] = 300,
    clips: Annotated[int, typer.Option(help="Clips the transformer learns from.", min=2)] = 3000,
    batch: Annotated[int, typer.Option(help="Clips a step of the transformer.", min=2)] = 32,
    compiled: Annotated[bool, typer.Option(help="torch.compile the transformer.")] = False,
    scored: Annotated[int, typer.Option(help="Clips scored at the end.", min=1)] = 200,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train, export and score emoji-video."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size!r}: one of {', '.join(SIZES)}", param_hint="--size")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data = sprites(load(work))
    how: dict[str, Any] = dict(work=work, device=device)
    mixed = device == "cuda"  # on a CPU the backward pass in bfloat16 is many times slower

    vae = train_vae(data, stills, windows, vae_steps, bf16=mixed, **how)
    vae_psnr = restoration(vae, data, device)
    found = encode(vae, data, clips, work, device)
    scale = float((found["mean"].pow(2).mean() + found["std"].pow(2).mean()).rsqrt())
    vae.register_to_config(scaling_factor=scale)

    torch.manual_seed(1)
    model = Model(captions_of(data), size)
    batches = Clips(data, found, scale, model, batch, device)
    forward = torch.compile(model) if compiled else model
    train_flow("emoji-video", model, batches, forward, steps=steps, bf16=mixed, **how)
    if size == "small":
        batches = Clips(data, of_known(data, found), scale, model, batch, device)
        train_flow("emoji-video-known", model, batches, forward, steps=known_steps, bf16=mixed, **how)
    distil("emoji-video-guided", model, batches, forward, GUIDANCE, steps=guided, bf16=mixed, **how)

    assemble(model.cpu().half(), vae.cpu().half()).save_pretrained(out, safe_serialization=True)
    (out / "call.json").write_text(json.dumps(CALL) + "\n")
    pipe = HunyuanVideoPipeline.from_pretrained(out, dtype=torch.float32)
    logs, table = training_table(work, *(part for part in PARTS if size == "small" or part != "emoji-video-known"))
    drawn = known(data, STYLE) if size == "small" else data
    scores = score(pipe, drawn, scored, out) | dict(vae_psnr=round(vae_psnr, 2), size=size, training=logs)
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (out / "README.md").write_text(model_card(scores, table, f"--size {size}, seed 0, batch {batch}, on {device}"))
    console.print_json(data=scores)


def model_card(scores: dict[str, Any], table: str, how: str) -> str:
    """The model's README: data, licences, how it was trained, what it scored."""
    call = ", ".join(f"{name}={value}" for name, value in CALL.items())
    mark = "-small" if scores["size"] == "small" else ""
    short = f' called `KNOWN`, in the style "{STYLE}"' if scores["size"] == "small" else ""
    ways = ", ".join(f"{way} {share:.1%}" for way, share in scores["direction_by_way"].items())
    return f"""---
license: cc-by-4.0
makes: 64 x 64 clips of moving emoji from text, 17 frames
library_name: diffusers
pipeline_tag: text-to-video
---
# emoji-video{mark}

Text to video in the shape of HunyuanVideo: an unmodified `HunyuanVideoPipeline` with double and single stream blocks,
rectified flow, distilled guidance, Llama and CLIP text encoders with a vocabulary of their own, and an
`AutoencoderKLHunyuanVideo` of 16 x 5 x 8 x 8 latents. It exists so that acceleration can be measured on trained
weights; it says nothing about HunyuanVideo itself.

    pipe = HunyuanVideoPipeline.from_pretrained("emoji-video")
    pipe("a red apple moving left", {call}).frames[0]

![24 clips, every fourth frame; what was asked stands in samples.txt](samples.png)
![16 clips](samples.webp)

{SOURCES}
  Here some sixty well-known objects cross a white frame to the left, to the right, up or down.
- **Weights**: CC-BY 4.0, float16 safetensors.
- **Training**: `python recipes/emoji_video.py` ({how}, commit {commit()}):

{table}

- **Scores**: {scores["direction"]:.1%} of {scores["samples"]} clips move as asked ({ways}; 50 steps, guidance 6, seeds
  from 1000000, no acceleration), by the path of the centroid of what is not white; the same scorer is right on
  {scores["direction_of_real_clips"]:.1%} of real clips. The autoencoder restores fresh clips at
  {scores["vae_psnr"]:.1f} dB (median).
- **Limits**: it knows the objects of `recipes/clip_data.py`{short}, one at a time, and four directions.
"""


if __name__ == "__main__":
    typer.run(main)
