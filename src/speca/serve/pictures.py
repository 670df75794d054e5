"""Pictures and clips between bytes and PIL: uploads are looked at before they are decoded."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from .faults import Fault, wrong

Format = Literal["png", "jpeg", "webp"]
READ = ("PNG", "JPEG", "WEBP")
"""Formats of uploads."""


def encode(image: Image.Image, form: Format, compression: int | None = None) -> bytes:
    """Return a picture as a file.

    Args:
        image: the picture.
        form: of the file.
        compression: 0 to 100, as OpenAI's `output_compression`: of "jpeg" and "webp" the quality is 100 less this.
    """
    file = io.BytesIO()
    quality = 95 if compression is None else max(1, 100 - compression)
    options = {} if form == "png" else {"quality": quality}
    (image if form == "png" else image.convert("RGB")).save(file, form.upper(), **options)
    return file.getvalue()


def decode(data: bytes, most_pixels: int, param: str) -> Image.Image:
    """Return an uploaded picture, upright as its metadata says.

    Raises:
        Fault: 400, if it is no picture of a known format, or has more than `most_pixels`, which is found before it is
            decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=READ) as found:
            width, height = found.size
            if width * height > most_pixels:
                raise wrong(f"the picture has {width}x{height} pixels; at most {most_pixels} are taken.", param)
            found.load()
            return ImageOps.exif_transpose(found)
    except Fault:
        raise
    except Exception as error:  # Pillow raises many kinds at broken files
        raise wrong(f"the file is no picture that can be read; send {', '.join(READ)}.", param) from error


def clip(frames: Sequence[Image.Image], fps: int) -> bytes:
    """Return frames as an MP4 file (H.264)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"  # `faststart` puts the index first, for which the file is read again
        _write(frames, fps, file)
        return file.read_bytes()


def _write(frames: Sequence[Image.Image], fps: int, file: Path) -> None:
    import av

    with av.open(file, "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "17"})
        # H.264 with 4:2:0 colour needs even sides.
        stream.width, stream.height = (side + side % 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            padded = ImageOps.pad(frame.convert("RGB"), (stream.width, stream.height))
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.asarray(padded), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
