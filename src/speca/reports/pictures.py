"""Draw pixel tensors: one sample as a PNG, and the grid of samples with and without acceleration."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MOST_SAMPLES = 64  # in one picture
MOST_COLUMNS = {16: 8, MOST_SAMPLES: 12}  # number of samples: columns of a band, up to that number
SMALLEST, LARGEST = 112, 256  # pixels of a cell's longer side
MOST_FRAMES, FPS = 6, 12  # of a contact sheet and of an animation
GAP, MARGIN = 6, 20
INK, GREY, LINE, PAPER = (24, 24, 27), (105, 105, 115), (212, 212, 216), (255, 255, 255)
AMPLIFICATIONS = (1, 2, 5, 10, 20, 50, 100)


def save_png(sample: Tensor, path: Path) -> None:
    """Write one image (height, width, channels) in [0, 1]."""
    _picture(sample).save(path)


def save_webp(clip: Tensor, path: Path) -> None:
    """Write one video (frames, height, width, channels) in [0, 1] as a lossless animation without end."""
    first, *others = (_picture(frame).convert("RGB") for frame in clip)
    first.save(path, save_all=True, append_images=others, duration=round(1000 / FPS), loop=0, lossless=True)


def contact_sheet(clips: Tensor, captions: Sequence[str]) -> Image.Image:
    """Videos (N, frames, height, width, channels) in [0, 1], one a row, as evenly spaced frames; at most 64 of them."""
    clips = clips[:MOST_SAMPLES]
    shown = np.linspace(0, clips.shape[1] - 1, min(MOST_FRAMES, clips.shape[1])).round().astype(int).tolist()
    height, width = clips.shape[2:4]
    scale = max(1, SMALLEST // max(height, width))
    cell, foot = (width * scale, height * scale), 22
    image = Image.new("RGB", (len(shown) * (cell[0] + GAP) - GAP, len(clips) * (cell[1] + foot)), PAPER)
    for row, (clip, caption) in enumerate(zip(clips, captions, strict=False)):
        top = row * (cell[1] + foot)
        image.paste(LINE, (0, top, image.width, top + cell[1]))  # shows between frames, or white ones run together
        for column, frame in enumerate(shown):
            picture = _picture(clip[frame]).convert("RGB").resize(cell, Image.Resampling.NEAREST)
            image.paste(picture, (column * (cell[0] + GAP), top))
        text = _cut(caption, image.width - GAP, _font(12))
        ImageDraw.Draw(image).text((2, top + cell[1] + 3), text, INK, _font(12))
    return image


def amplification(difference: Tensor) -> int:
    """Return the largest round factor that keeps 99.5 % of the values of `difference` at or below 1."""
    peak = float(np.percentile(difference.numpy(), 99.5))
    fitting = [factor for factor in AMPLIFICATIONS if factor * peak <= 1]
    return fitting[-1] if fitting and peak > 0 else 1


def draw_grid(full: Tensor, speca: Tensor, captions: Sequence[str], title: str, subtitle: str) -> Image.Image:
    """Three labelled rows for each band of samples: full, SpeCa, and their amplified absolute difference.

    `full` and `speca` are (N, height, width, channels) in [0, 1]; of a video (N, frames, ...) the middle frame is
    shown. `captions` are N texts whose lines stand below each column. At most 64 samples are drawn.
    """
    full, speca, captions = _still(full)[:MOST_SAMPLES], _still(speca)[:MOST_SAMPLES], captions[:MOST_SAMPLES]
    difference = (full - speca).abs()
    factor = amplification(difference)
    rows = {"full": full, "SpeCa": speca, f"difference\nx {factor}": (difference * factor).clamp(0, 1)}
    sheet = _Sheet.fitting(len(full), tuple(full.shape[1:3]), captions, title, subtitle)
    for band in range(sheet.bands):
        for row, name in enumerate(rows):
            sheet.name_row(band, row, name)
    for index, caption in enumerate(captions):
        for row, pixels in enumerate(rows.values()):
            sheet.place(index, row, _picture(pixels[index]))
        sheet.caption(index, caption)
    return sheet.image


def _still(samples: Tensor) -> Tensor:
    return samples[:, samples.shape[1] // 2] if samples.ndim == 5 else samples


def _picture(pixels: Tensor) -> Image.Image:
    levels = (pixels.float().clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Pillow's own font draws few scripts beyond Latin."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Return `text`, shortened with an ellipsis to fit into `width` pixels."""
    kept = text
    while kept and font.getlength(kept if kept == text else kept + "…") > width:
        kept = kept[:-1]
    return text if kept == text else kept + "…"


@dataclass
class _Sheet:
    """Positions on the sheet in pixels; `cell` is (width, height) of one picture."""

    image: Image.Image
    cell: tuple[int, int]
    columns: int
    bands: int
    top: int  # below the title
    left: int  # right of the row names
    foot: int  # height of the captions

    @classmethod
    def fitting(cls, count: int, size: tuple[int, ...], captions: Sequence[str], title: str, subtitle: str) -> _Sheet:
        """Return an empty sheet with its title, for `count` pictures of `size` (height, width)."""
        height, width = size
        longer = max(size)
        scale = -(-SMALLEST // longer) if longer < SMALLEST else min(1.0, LARGEST / longer)
        cell = (round(width * scale), round(height * scale))
        bands = math.ceil(count / next(most for samples, most in MOST_COLUMNS.items() if count <= samples))
        columns = math.ceil(count / bands)
        foot = 18 * max(caption.count("\n") + 1 for caption in captions) + 6
        left, top = MARGIN + 96, MARGIN + 62
        words = max(_font(18).getlength(title), _font(12).getlength(subtitle))
        shape = (
            max(left + columns * (cell[0] + GAP), MARGIN + math.ceil(words)) + MARGIN,
            top + bands * (3 * (cell[1] + GAP) + foot) + (bands - 1) * MARGIN + MARGIN // 2,
        )
        image = Image.new("RGB", shape, PAPER)
        draw = ImageDraw.Draw(image)
        draw.text((MARGIN, MARGIN - 4), title, INK, _font(18))
        draw.text((MARGIN, MARGIN + 26), subtitle, GREY, _font(12))
        return cls(image, cell, columns, bands, top, left, foot)

    def place(self, index: int, row: int, picture: Image.Image) -> None:
        """Draw the picture of sample `index` in `row` of its band; enlarge small pictures without smoothing."""
        how = Image.Resampling.NEAREST if picture.width < self.cell[0] else Image.Resampling.LANCZOS
        self.image.paste(picture.convert("RGB").resize(self.cell, how), self._corner(index, row))

    def name_row(self, band: int, row: int, name: str) -> None:
        _, y = self._corner(band * self.columns, row)
        spot = (self.left - 12, y + self.cell[1] // 2)
        ImageDraw.Draw(self.image).multiline_text(spot, name, INK, _font(13), anchor="rm", align="right")

    def caption(self, index: int, text: str) -> None:
        """Draw lines centred below the column of sample `index`, the first in ink and cut to the column's width."""
        x, y = self._corner(index, 3)
        draw, font = ImageDraw.Draw(self.image), _font(12)
        for number, line in enumerate(text.splitlines()):
            spot = (x + self.cell[0] // 2, y + 18 * number)
            draw.text(spot, _cut(line, self.cell[0], font), GREY if number else INK, font, anchor="ma")

    def _corner(self, index: int, row: int) -> tuple[int, int]:
        band, column = divmod(index, self.columns)
        height = 3 * (self.cell[1] + GAP) + self.foot + MARGIN
        return self.left + column * (self.cell[0] + GAP), self.top + band * height + row * (self.cell[1] + GAP)
