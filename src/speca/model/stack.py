"""The calls that have led here, looked at as a debugger would: for what no object that pipelines hand out can tell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

MAX_FRAMES = 40


def callers() -> Iterator[FrameType]:
    """The frames of whoever asks and of its callers, innermost first; no more than lie between a model and a user."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(MAX_FRAMES):
        if frame is None:
            return
        yield frame
        frame = frame.f_back
