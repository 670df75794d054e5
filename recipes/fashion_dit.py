"""Train the bundled model `fashion-dit`: a class-conditional latent DiT on Fashion-MNIST.

    python recipes/fashion_dit.py                     # two CPU cores: about an hour and a half
    python recipes/fashion_dit.py --device cuda --steps 60000

Four stages, each resumable: a scoring classifier, a small AutoencoderKL, the DiT on its latents, and the
export with scores. Every stage leaves its checkpoint in --work; running the command again goes on from there.
Shapes: B batch, images (B, 1, 28, 28) in [-1, 1], latents (B, 4, 7, 7) scaled to unit variance.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from training import commit, console, fit, half, pick, training_table

from speca.zoo.classifier import Classifier

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
NULL_CLASS = 1000  # the label DiTPipeline itself uses for the unconditional branch
SHA256 = {  # of the decompressed files, so any mirror's gzip is welcome
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
VAE_CONFIG: dict[str, Any] = dict(
    in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(24, 48, 64), layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=8, sample_size=28,
)  # fmt: skip
DIT_CONFIG: dict[str, Any] = dict(
    num_attention_heads=4, attention_head_dim=30, in_channels=4, out_channels=4, num_layers=16,
    sample_size=7, patch_size=1, num_embeds_ada_norm=NULL_CLASS, attention_bias=True,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ data
def fetch(folder: Path) -> Path:
    """Folder with the four idx files, from Debian's package `dataset-fashion-mnist` (MIT licence)."""
    found = next(folder.rglob("train-images-idx3-ubyte.gz"), None)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=folder, check=True)
        package = next(folder.glob("dataset-fashion-mnist*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, "deb"], cwd=folder, check=True)
        found = next(folder.rglob("train-images-idx3-ubyte.gz"))
    return found.parent


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [-1, 1] and labels (N,) of split "train" or "t10k"; sums are checked."""
    arrays = []
    for kind, offset in (("images-idx3", 16), ("labels-idx1", 8)):
        name = f"{split}-{kind}-ubyte.gz"
        raw = gzip.decompress((folder / name).read_bytes())
        if hashlib.sha256(raw).hexdigest() != SHA256[name]:
            raise SystemExit(f"{folder / name}: not the published Fashion-MNIST file; delete it and run again")
        arrays.append(np.frombuffer(raw, np.uint8, offset=offset).copy())
    images = torch.from_numpy(arrays[0]).reshape(-1, 1, 28, 28).float() / 127.5 - 1
    return images, torch.from_numpy(arrays[1]).long()


# ------------------------------------------------------------------------------------------------ stages
def train_classifier(images: Tensor, labels: Tensor, **how: Any) -> Classifier:
    model, device = Classifier(), how["device"]

    def loss_of(g: torch.Generator) -> Tensor:
        i = pick(len(images), 256, g)
        x, shift = images[i], torch.randint(-2, 3, (2,), generator=g).tolist()
        if torch.rand((), generator=g) < 0.5:
            x = x.flip(-1)
        x = x.roll(shift, dims=(2, 3))
        return F.cross_entropy(model(x.to(device)), labels[i].to(device), label_smoothing=0.05)

    return fit("classifier", model, loss_of, decay=0.99, lr=3e-3, **how)


def train_vae(images: Tensor, **how: Any) -> AutoencoderKL:
    vae, device = AutoencoderKL(**VAE_CONFIG), how["device"]

    def loss_of(g: torch.Generator) -> Tensor:
        x = images[pick(len(images), 128, g)].to(device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g).to(device)
        restored = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.l1_loss(restored, x) + F.mse_loss(restored, x) + 1e-3 * kl

    return fit("vae", vae, loss_of, lr=2e-3, decay=0.995, **how)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of all images, each (N, 4, 7, 7), on the CPU."""
    parts = [vae.encode(chunk.to(device)).latent_dist for chunk in images.split(1000)]
    return torch.cat([p.mean.cpu() for p in parts]), torch.cat([p.std.cpu() for p in parts])


def train_dit(
    mean: Tensor, std: Tensor, labels: Tensor, scale: float, compiled: bool, batch: int, **how: Any
) -> DiTTransformer2DModel:
    dit, device = DiTTransformer2DModel(**DIT_CONFIG), how["device"]
    for block in dit.transformer_blocks:  # adaLN-zero, as in the DiT paper
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        table = block.norm1.emb.class_embedder.embedding_table
        nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():  # the 990 labels DiTPipeline allows and this model never sees
            table.weight[len(CLASSES) : NULL_CLASS] = 0
    nn.init.zeros_(dit.proj_out_2.weight)
    nn.init.zeros_(dit.proj_out_2.bias)
    alphas = scheduler().alphas_cumprod
    forward = torch.compile(dit) if compiled else dit

    def loss_of(g: torch.Generator) -> Tensor:
        i = pick(len(mean), batch, g)
        x = (mean[i] + std[i] * torch.randn(mean[i].shape, generator=g)) * scale
        label = torch.where(torch.rand(batch, generator=g) < 0.1, NULL_CLASS, labels[i])
        t = torch.randint(0, 1000, (batch,), generator=g)
        noise = torch.randn(x.shape, generator=g)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        out = forward(noisy.to(device), timestep=t.to(device), class_labels=label.to(device)).sample
        return F.mse_loss(out.float(), noise.to(device))

    return fit("dit", dit, loss_of, lr=1e-3, **how)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False)


@torch.no_grad()
def score(pipe: DiTPipeline, classifier: Classifier, count: int, folder: Path) -> dict[str, Any]:
    """Agreement of the classifier with the asked label over `count` samples of 50-step DDIM, guidance 4."""
    pipe.set_progress_bar_config(disable=True)
    agree, images = 0, []
    for first in range(0, count, 100):
        labels = torch.arange(first, min(first + 100, count)) % len(CLASSES)
        seeds = [torch.Generator().manual_seed(1_000_000 + first + k) for k in range(len(labels))]
        out = pipe(class_labels=labels.tolist(), generator=seeds, num_inference_steps=50, output_type="np").images
        batch = torch.from_numpy(out).permute(0, 3, 1, 2).cpu()
        images.append(batch)
        agree += int((classifier(batch * 2 - 1).argmax(1) == labels).sum())
        console.print(f"scored {first + len(labels)} of {count}: agreement {agree / (first + len(labels)):.3f}")
    sheet = torch.cat(images)[:100].reshape(10, 10, 28, 28).permute(0, 2, 1, 3).reshape(280, 280)
    from PIL import Image

    Image.fromarray((sheet * 255).round().byte().numpy()).resize((840, 840), Image.Resampling.NEAREST).save(
        folder / "samples.png"
    )
    return dict(samples=count, agreement=round(agree / count, 4))


def main(
    work: Annotated[Path, typer.Option(help="Folder for data and checkpoints.")] = Path("recipes/_work"),
    out: Annotated[Path, typer.Option(help="Folder the finished model is written to.")] = Path(
        "src/speca/zoo/weights/fashion-dit"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Training steps of the DiT.", min=100)] = 3200,
    batch: Annotated[int, typer.Option(help="Images a step of the DiT.", min=8)] = 128,
    compiled: Annotated[
        bool, typer.Option(help="torch.compile the DiT (a minute once, then about a third faster).")
    ] = True,
    scored: Annotated[int, typer.Option(help="Samples scored at the end.", min=10)] = 1000,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train, export and score fashion-dit."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data = fetch(work)
    images, labels = read(data, "train")
    test_images, test_labels = read(data, "t10k")
    how: dict[str, Any] = dict(work=work, device=device)

    classifier = train_classifier(images, labels, steps=2000, **how).cpu()
    with torch.no_grad():
        hits = sum(
            int((classifier(x).argmax(1) == y).sum())
            for x, y in zip(test_images.split(1000), test_labels.split(1000), strict=True)
        )
    console.print(f"classifier: {hits / len(test_labels):.4f} on the held-out split")

    vae = train_vae(images, steps=1500, **how)
    mean, std = encode(vae, images, device)
    scale = 1 / float(mean.std())
    vae.register_to_config(scaling_factor=scale)
    with torch.no_grad():
        test = test_images[:2000].to(device)
        error = F.mse_loss(vae.decode(vae.encode(test).latent_dist.mean).sample, test)
    vae_psnr = float(10 * torch.log10(4 / error))
    console.print(f"vae: {vae_psnr:.2f} dB on held-out images, scaling factor {scale:.3f}")

    dit = train_dit(mean, std, labels, scale, compiled, batch, steps=steps, bf16=True, **how)
    pipe = DiTPipeline(dit.cpu().half(), vae.cpu().half(), scheduler(), id2label=dict(enumerate(CLASSES)))
    pipe.save_pretrained(out, safe_serialization=True)
    index = json.loads((out / "model_index.json").read_text())  # save_pretrained forgets the names of the classes
    index["id2label"] = {str(number): name for number, name in enumerate(CLASSES)}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    from safetensors.torch import save_file

    save_file(half(classifier), out / "classifier.safetensors")
    pipe = DiTPipeline.from_pretrained(out, dtype=torch.float32)
    result = score(pipe, classifier, scored, out)
    scores = dict(classifier_accuracy=hits / len(test_labels), vae_psnr=round(vae_psnr, 2), **result)
    logs, table = training_table(work, "classifier", "vae", "dit")
    (out / "scores.json").write_text(json.dumps({**scores, "training": logs}, indent=2) + "\n")
    (out / "README.md").write_text(model_card(scores, table, batch, device))
    console.print_json(data=scores)


def model_card(scores: dict[str, Any], table: str, batch: int, device: str) -> str:
    """The model's README: data, licence, how it was trained, what it scored."""
    return f"""---
license: apache-2.0
makes: 28 x 28 grey garments, ten classes
library_name: diffusers
pipeline_tag: unconditional-image-generation
datasets: [fashion_mnist]
---
# fashion-dit

A class-conditional latent diffusion transformer in the shape of DiT-XL/2, small enough for a laptop: an unmodified
`DiTPipeline` with 16 blocks of width 120, 49 tokens,
epsilon prediction, 50-step DDIM with classifier-free guidance 4, and an `AutoencoderKL` of 4 x 7 x 7 latents. It exists
so that acceleration can be measured on trained weights; it says nothing about FLUX or HunyuanVideo.

![100 samples, one class a column](samples.png)

- **Classes**: {", ".join(f"{i} {name}" for i, name in enumerate(CLASSES))}.
- **Data**: Fashion-MNIST (Zalando SE, 2017, MIT licence), the 60,000 training images; the 10,000 test images are held
  out. From Debian's package `dataset-fashion-mnist`, sums checked.
- **Weights**: Apache-2.0, float16 safetensors.
- **Training**: `python recipes/fashion_dit.py` (seed 0, batch {batch}, on {device}, commit {commit()}):

{table}

- **Scores**: the classifier is right on {scores["classifier_accuracy"]:.1%} of real held-out images; it agrees with
  the asked class on {scores["agreement"]:.1%} of {scores["samples"]} samples (50-step DDIM, guidance 4, seeds from
  1000000, no acceleration).
  The autoencoder restores held-out images at {scores["vae_psnr"]:.1f} dB.
- **Limits**: soft fine texture, as the autoencoder is tiny; labels other than 0 to 9 mean nothing.
"""


if __name__ == "__main__":
    typer.run(main)
