"""Moving sprites: clips of one emoji of Emoji-64 that crosses a white frame, with captions and a direction scorer.

Shapes: clips (N, 3, 17, 64, 64) in [-1, 1]; positions in pixels, x to the right, y down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from emoji_data import Dataset, Emoji
from torch import Tensor

FRAMES, SIDE = 17, 64
LEAST_SIDE, MARGIN = 30, 2  # of a sprite, in pixels; what stays free at the edges
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OBJECTS = (
    "red apple", "green apple", "banana", "grapes", "watermelon", "strawberry", "cherries", "pineapple", "carrot",
    "lemon", "tangerine", "hamburger", "slice of pizza", "doughnut", "cookie", "birthday cake", "dog face", "cat face",
    "mouse face", "rabbit face", "fox face", "bear face", "panda face", "tiger face", "cow face", "pig face",
    "frog face", "monkey face", "penguin", "bird", "fish", "octopus", "honeybee", "snail", "turtle", "butterfly",
    "rocket", "automobile", "bus", "fire engine", "tractor", "sailboat", "airplane", "soccer ball",
    "basketball and hoop", "balloon", "wrapped present", "crown", "umbrella", "key", "alarm clock",
    "rose", "sunflower", "cactus", "evergreen tree", "heavy black heart", "white medium star", "robot face", "ghost",
)  # fmt: skip

KNOWN = (
    "red apple", "green apple", "banana", "grapes", "strawberry", "pineapple", "carrot", "lemon", "hamburger",
    "dog face", "cat face", "rabbit face", "fox face", "panda face", "pig face", "frog face", "penguin", "octopus",
    "butterfly", "rocket", "automobile", "bus", "sailboat", "airplane", "soccer ball", "evergreen tree", "cactus",
    "heavy black heart", "white medium star", "robot face", "ghost",
)  # fmt: skip
"""What a small model can learn to draw; it is trained on these last, in one style."""


@dataclass(frozen=True)
class Clip:
    """What a clip shows: the sprite's place in the data set, direction, side and centre's path (17, 2) in pixels."""

    sprite: int
    direction: str
    side: int
    path: Tensor


def sprites(data: Dataset) -> Dataset:
    """The pictures of the well-known objects, in every style there is."""
    keep = [i for i, e in enumerate(data.emoji) if e.names[0] in OBJECTS]
    return Dataset([data.emoji[i] for i in keep], data.pixels[keep])


def is_known(emoji: Emoji, style: str) -> bool:
    """Whether it is the picture of a `KNOWN` object in this style."""
    return emoji.names[0] in KNOWN and emoji.style == style


def known(data: Dataset, style: str) -> Dataset:
    """Of the pictures of `sprites`, those of `KNOWN` objects in one style."""
    keep = [i for i, e in enumerate(data.emoji) if is_known(e, style)]
    return Dataset([data.emoji[i] for i in keep], data.pixels[keep])


def draw_clips(data: Dataset, count: int, generator: torch.Generator) -> list[Clip]:
    """`count` random clips: 30 to 34 px sprites that travel 18 to 26 px, with a still other coordinate."""
    clips, names = [], list(DIRECTIONS)
    steps = torch.linspace(0, 1, FRAMES)
    for _ in range(count):
        kind, sprite, side = (int(torch.randint(0, n, (), generator=generator)) for n in (4, len(data.emoji), 5))
        side += LEAST_SIDE
        room = SIDE - side - 2 * MARGIN
        travel, begin, other = torch.rand(3, generator=generator).tolist()
        length = 18 + 8 * travel
        along = MARGIN + side / 2 + begin * (room - length) + length * steps
        across = torch.full_like(along, MARGIN + side / 2 + other * room)
        dx, dy = DIRECTIONS[names[kind]]
        along = along if dx + dy > 0 else along.flip(0)
        path = torch.stack((along, across) if dx else (across, along), 1)
        clips.append(Clip(sprite, names[kind], side, path))
    return clips


def render(data: Dataset, clips: list[Clip], frames: slice = slice(None)) -> Tensor:
    """The clips' pixels on white, (N, 3, 17, 64, 64) in [-1, 1], or only those of some `frames`."""
    count = len(range(FRAMES)[frames])
    out = torch.empty(len(clips), 3, count, SIDE, SIDE)
    for n, clip in enumerate(clips):
        pixels = data.pixels[clip.sprite].float() / 255
        pixels = torch.cat([pixels[:3] * pixels[3:], pixels[3:]])  # premultiplied, or edges take the clear pixels' hue
        small = F.interpolate(pixels[None], (clip.side, clip.side), mode="bilinear", antialias=True)
        small = F.pad(small, (2, 2, 2, 2))
        scale = SIDE / (clip.side + 4)
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = scale
        theta[:, :, 2] = -scale * (clip.path[frames] / SIDE * 2 - 1)
        grid = F.affine_grid(theta, [count, 4, SIDE, SIDE], align_corners=False)
        moved = F.grid_sample(small.expand(count, -1, -1, -1), grid, align_corners=False)
        out[n] = ((moved[:, :3] + 1 - moved[:, 3:]) * 2 - 1).transpose(0, 1)
    return out.clamp(-1, 1)


def caption(data: Dataset, clip: Clip, generator: torch.Generator) -> str:
    """One way to ask for it: "a red apple moving left", at times without article or with the style."""
    article, style = torch.rand(2, generator=generator).tolist()
    emoji = data.emoji[clip.sprite]
    text = f"{emoji.names[0]} moving {clip.direction}"
    text = f"a {text}" if article < 0.7 else text
    return f"{text}, {emoji.style}" if style < 0.4 else text


def direction(clips: Tensor) -> list[str]:
    """Where the centroid of what is not white went, first three against last three frames; "still" under 4 px."""
    mass = (1 - clips.float()).clamp(0, 2).mean(1)
    mass = mass * (mass > 0.15)  # grain of the decoder is not the sprite
    grid = torch.arange(clips.shape[-1], dtype=torch.float32)
    total = mass.sum((2, 3)).clamp_min(1e-6)
    x, y = (mass.sum(2) * grid).sum(2) / total, (mass.sum(3) * grid).sum(2) / total
    moved = torch.stack([v[:, -3:].mean(1) - v[:, :3].mean(1) for v in (x, y)], 1)
    found = []
    for dx, dy in moved.tolist():
        name = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        found.append(name if max(abs(dx), abs(dy)) >= 4 else "still")
    return found
