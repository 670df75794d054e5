"""The autoencoder of `emoji-video`: an image autoencoder trained on single frames, inflated, then trained on clips.

Inflation (Carreira and Zisserman, arXiv:1705.07750), causal as in MAGVIT-v2 (arXiv:2310.05737, section 3): the kernels
learned in two dimensions become the last slice in time and the slices of earlier frames begin at zero, so that at first
every frame is coded by itself. Most of what there is to learn is learned where a step costs a third.

Shapes: frames (B, 3, 64, 64) and clips (B, 3, 17, 64, 64) in [-1, 1]; latents (B, 16, 5, 8, 8).
"""

from __future__ import annotations

from typing import Any

import torch
from clip_data import FRAMES, draw_clips, render
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo
from emoji_data import Dataset
from torch import Tensor, nn
from training import console, fit

CONFIG: dict[str, Any] = dict(
    latent_channels=16, block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=4,
    mid_block_add_attention=False,
)  # fmt: skip
# Groups of several channels: with one channel a group the norm takes the colour away, and training fell apart.
STILLS, WINDOWS, WINDOW = 16, 4, 5  # frames, windows a step; frames a window: one latent for the first, one for four


def image_vae() -> AutoencoderKL:
    """The video autoencoder without time: it pads by the edge, where AutoencoderKL pads by zero."""
    levels = len(CONFIG["block_out_channels"])
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    vae = AutoencoderKL(**blocks, **CONFIG)
    for parent in list(vae.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                edged = nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1, padding_mode="replicate")  # type: ignore[arg-type]
                setattr(parent, name, edged)
                if hasattr(parent, "padding"):  # the downsamplers, or they pad once more
                    parent.padding = 1  # type: ignore[assignment]
    return vae


@torch.no_grad()
def inflated(image: nn.Module) -> AutoencoderKLHunyuanVideo:
    """The video autoencoder that codes every frame by itself as `image` does."""
    vae = AutoencoderKLHunyuanVideo(**CONFIG)
    flat, deep = image.state_dict(), vae.state_dict()
    for name, value in deep.items():
        module, leaf = name.rsplit(".", 1)
        source = flat[name if name in flat else f"{module.removesuffix('.conv')}.{leaf}"]
        if value.dim() == 5:
            value.zero_()[:, :, -1] = source.reshape(*source.shape[:2], *value.shape[3:])
        else:
            value.copy_(source)
    return vae


def _loss(vae: nn.Module, x: Tensor, g: torch.Generator) -> Tensor:
    """Restoration, absolute and squared, four times as heavy where there is something, and a small KL."""
    posterior = vae.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=g).to(x.device)
    restored = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
    weight = 1 + 4 * (x < 0.9).any(1, keepdim=True)  # most of a frame is plain white
    return (weight * ((restored - x).abs() + (restored - x) ** 2)).mean() + 1e-3 * kl


def train_vae(data: Dataset, stills: int, windows: int, clips: int, **how: Any) -> AutoencoderKLHunyuanVideo:
    """`stills` steps on frames in two dimensions, `windows` on pieces of clips, `clips` on whole ones.

    Whole clips go through the tiles in time that the autoencoder uses at this length, on which its pipeline decodes.
    """
    device = how["device"]
    image = image_vae().to(memory_format=torch.channels_last)

    def still(g: torch.Generator) -> Tensor:
        frame = int(torch.randint(FRAMES, (), generator=g))
        return _loss(image, render(data, draw_clips(data, STILLS, g), slice(frame, frame + 1))[:, :, 0].to(device), g)

    fit("emoji-video-stills", image, still, steps=stills, lr=2e-3, decay=0.99, **how)
    vae = inflated(image)

    def window(g: torch.Generator) -> Tensor:
        first = int(torch.randint(FRAMES - WINDOW + 1, (), generator=g))
        clips = draw_clips(data, WINDOWS, g)
        return _loss(vae, render(data, clips, slice(first, first + WINDOW)).to(device), g)

    def clip(g: torch.Generator) -> Tensor:
        return _loss(vae, render(data, draw_clips(data, 1, g)).to(device), g)

    fit("emoji-video-windows", vae, window, steps=windows, lr=1e-3, decay=0.99, **how)
    fit("emoji-video-vae", vae, clip, steps=clips, lr=5e-4, decay=0.99, **how)
    return vae


@torch.no_grad()
def restoration(vae: AutoencoderKLHunyuanVideo, data: Dataset, device: str) -> float:
    """Median PSNR in decibels of 20 fresh clips, range 2."""
    test = render(data, draw_clips(data, 20, torch.Generator().manual_seed(2))).to(device)
    restored = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) for x in test.split(4)])
    found = float((10 * torch.log10(4 / (restored - test).pow(2).flatten(1).mean(1))).median())
    console.print(f"vae: median {found:.2f} dB on fresh clips")
    return found
