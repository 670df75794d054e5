"""Whether what a request gives is made of finite numbers: a picture of NaN is black, and looks like a result."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError

PROCESSORS = ("image_processor", "video_processor")


class Finite:
    """Keeps what a pipeline makes last, as numbers, and looks at it at the end."""

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}

    def note(self, what: str, value: Any) -> None:
        """Keep a tensor under a name, in place of the one before."""
        if isinstance(value, Tensor) and value.is_floating_point():
            self._seen[what] = value.detach()

    def watch(self, pipe: Any) -> None:
        """Keep the pictures that a request's copy of a pipeline turns into images."""
        for name in PROCESSORS:
            processor = getattr(pipe, name, None)
            if callable(getattr(processor, "postprocess", None)):
                setattr(pipe, name, self._noting(processor))

    def _noting(self, processor: Any) -> Any:
        mine = copy.copy(processor)
        for entry in ("postprocess", "postprocess_video"):
            own = getattr(processor, entry, None)
            if callable(own):
                mine.__dict__[entry] = self._entry(own)
        return mine

    def _entry(self, own: Any) -> Any:
        def postprocess(*args: Any, **kwargs: Any) -> Any:
            self.note("decoded picture", next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None))
            return own(*args, **kwargs)

        return postprocess

    def demand(self, output: Any) -> None:
        """Refuse a result that is not finite; reads one number for each kind of thing from the device.

        Raises:
            NonFiniteError: with what was not finite, and the remedy.
        """
        wrong = [what for what, value in self._seen.items() if not bool(torch.isfinite(value).all())]
        self._seen.clear()
        if not wrong and not _finite(output):
            wrong = ["output"]
        if wrong:
            raise NonFiniteError(
                f"the {wrong[0]} of this request holds NaN or infinity, so there is nothing to return; look for such "
                "numbers in its arguments (guidance, embeddings, latents), and run a model or autoencoder that "
                "overflows in float16 in bfloat16 or float32."
            )


def _finite(output: Any) -> bool:
    """Whether the numbers of a pipeline's output are finite; images and texts are."""
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    if isinstance(output, np.ndarray):
        return output.dtype.kind != "f" or bool(np.isfinite(output).all())
    if isinstance(output, dict):
        return all(_finite(value) for value in output.values())
    if isinstance(output, (list, tuple)):
        return all(_finite(value) for value in output)
    return True
