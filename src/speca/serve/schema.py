"""What clients may send: OpenAI's fields, and flat ones of our own beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import nearest
from .faults import Fault, wrong

Preset = Literal["faithful", "balanced", "fast", "paper", "full"]
QUALITIES: dict[str, str] = {
    "low": "fast", "medium": "balanced", "high": "faithful", "standard": "balanced", "hd": "faithful",
}  # fmt: skip
"""OpenAI's `quality` as a preset; "auto" is the server's own."""

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class Asked(BaseModel):
    """What all requests may say.

    `user`, `moderation` and `background` are taken with the values that ask for nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(None, description="One of /v1/models; may be left out where only one is served.")
    prompt: str = Field(
        min_length=1, description="What to draw; of a class-conditional model the name or number of a class."
    )
    size: str | None = Field(None, description='"WIDTHxHEIGHT" in pixels, or "auto" for the model\'s own size.')
    user: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of the first image; image k has this plus k.")
    negative_prompt: str | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    true_cfg_scale: float | None = Field(None, ge=0, le=100)
    scheduler: str | None = Field(None, description="Class of the sampler, one of those that /v1/models lists.")
    preset: Preset | None = Field(None, description='How close to the full run; "full" computes every step.')
    speedup: float | None = Field(None, ge=1, description="At most one step of so many is computed in full.")
    tolerance: float | None = Field(None, ge=0)
    priority: int = Field(0, description="Higher starts sooner; bounded by the server.")
    deadline_s: float | None = Field(None, gt=0, description="Seconds after which to give up.")

    @property
    def width_height(self) -> tuple[int, int] | None:
        """The size in pixels, None for the model's own. Raises `Fault` for what is no size."""
        if self.size is None or self.size == "auto":
            return None
        found = SIZE.fullmatch(self.size)
        if found is None:
            raise wrong(f"size={self.size!r} is no size; write it as 1024x1024, or auto.", "size")
        return int(found[1]), int(found[2])


class Pictures(Asked):
    """What requests for images may say."""

    n: int = Field(1, ge=1)
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3, description="Previews to send while an image is drawn.")
    stream_progress: bool = Field(False, description="Whether to stream an event for each step as well.")


class ImageRequest(Pictures):
    """`POST /v1/images/generations`."""


class EditRequest(Pictures):
    """The fields of `POST /v1/images/edits` beside its pictures."""

    strength: float | None = Field(None, gt=0, le=1, description="How far from the given picture, up to 1.")
    input_fidelity: Literal["low", "high"] | None = None


class VideoRequest(Asked):
    """The fields of `POST /v1/videos` beside its reference picture."""

    seconds: float | None = Field(None, gt=0, description="Length; frames are this times `fps`.")
    num_frames: int | None = Field(None, ge=1)
    fps: int = Field(12, ge=1, le=60, description="Frames a second of the file.")


Shape = TypeVar("Shape", bound=Asked)


def parse(shape: type[Shape], given: Mapping[str, Any], *, text: bool = False) -> Shape:
    """Return a request from what a client has sent; of a form, whose values are `text`, numbers are read from it.

    Raises:
        Fault: 400, naming the field and the nearest valid one.
    """
    try:
        return shape.model_validate(dict(given), strict=not text)
    except ValidationError as error:
        raise _fault(error, shape) from error


def _fault(error: ValidationError, shape: type[BaseModel]) -> Fault:
    fault = error.errors()[0]
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return wrong(f"unknown field {name!r}; {nearest(name, shape.model_fields)}", name, "unknown_parameter")
    if fault["type"] == "missing":
        return wrong(f"the field {name!r} is missing.", name, "missing_required_parameter")
    shown = repr(fault["input"])
    shown = shown if len(shown) < 80 else f"{shown[:77]}..."
    return wrong(f"{name}={shown} is not valid: {fault['msg']}.", name)
