"""What is seen of a request while it runs: each step of its scheduler, and the finished sample as it predicts it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

Told = Callable[[Tensor | None, Callable[[], Tensor | None]], None]

NUMBERING = ("prompt", "prompt_embeds", "class_labels")
"""Arguments of pipelines that have one item for each picture."""

_WATCHED: WeakKeyDictionary[Any, Told] = WeakKeyDictionary()
"""Whom to tell of each step of these schedulers."""


@contextmanager
def watched(scheduler: Any, tell: Told) -> Iterator[None]:
    """Inside, call `tell` after each step of this scheduler, with the next sample and a function that returns the
    predicted finished one, or None where the scheduler does not say.

    The latter is what the scheduler returns beside the next sample (DDIM, DDPM, Euler, LCM) or, for a flow,
    `x - sigma * v`. Nothing is computed that a step would wait for, and copies are not watched.
    """
    if not callable(getattr(scheduler, "step", None)):
        yield
        return
    plain: Any = type(scheduler)
    scheduler.__class__ = _telling(plain)
    _WATCHED[scheduler] = tell
    try:
        yield
    finally:
        del _WATCHED[scheduler]


@functools.lru_cache(maxsize=64)  # one class for all requests: what is found of a scheduler is kept by its class
def _telling(plain: Any) -> Any:
    own: Callable[..., Any] = plain.step

    @functools.wraps(own)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = own(self, model_output, timestep, sample, *args, **kwargs)
        tell = _WATCHED.get(self)
        if tell is not None:
            following = out[0] if isinstance(out, tuple) else getattr(out, "prev_sample", None)
            tell(
                following if isinstance(following, Tensor) else None,
                lambda: _clean(self, out, model_output, sample),
            )
        return out

    return type(plain.__name__, (plain,), {"step": step, "__module__": plain.__module__})


def _clean(scheduler: Any, out: Any, velocity: Tensor, sample: Tensor) -> Tensor | None:
    found = out[1] if isinstance(out, tuple) and len(out) > 1 else getattr(out, "pred_original_sample", None)
    if isinstance(found, Tensor):
        return found
    index = getattr(scheduler, "step_index", None)  # of the next step
    if not hasattr(scheduler, "scale_noise") or not isinstance(index, int) or index < 1:
        return None
    clean: Tensor = sample - scheduler.sigmas[index - 1].to(sample.device) * velocity
    return clean.to(sample.dtype)


def decoded(pipe: Any, clean: Tensor, asked: dict[str, Any]) -> Any:
    """Return latents as the pictures that the pipeline would return of them; None where it is not known how.

    Known are pipelines of pictures with an autoencoder of one scale and shift; latents that are packed into tokens are
    unpacked by the pipeline's own function.
    """
    vae: Any = getattr(pipe, "vae", None)
    config: Any = getattr(vae, "config", None)
    scale = getattr(config, "scaling_factor", None)
    if not scale or getattr(config, "latents_mean", None) is not None:
        return None
    try:
        latents = _unpacked(pipe, clean[: _pictures(asked)], asked)  # some stack the rows of guidance in their latents
        if latents is None or latents.dim() != 4 or latents.shape[1] != config.latent_channels:
            return None
        with torch.no_grad():
            picture = vae.decode(latents / scale + (getattr(config, "shift_factor", None) or 0.0), return_dict=False)[0]
        return _as_images(pipe, picture, asked.get("output_type"))
    except Exception:  # of a pipeline that is not as it seemed; a preview is not worth the request
        return None


def _pictures(asked: dict[str, Any]) -> int:
    """How many pictures a request asks for."""
    first = next((asked[name] for name in NUMBERING if asked.get(name) is not None), None)
    count = len(first) if isinstance(first, (list, tuple, Tensor)) else 1
    return count * int(asked.get("num_images_per_prompt") or 1)


def _unpacked(pipe: Any, clean: Tensor, asked: dict[str, Any]) -> Tensor | None:
    if clean.dim() == 4:
        return clean
    unpack = getattr(pipe, "_unpack_latents", None)
    factor: Any = getattr(pipe, "vae_scale_factor", None)
    if unpack is None or list(inspect.signature(unpack).parameters)[:4] != [
        "latents", "height", "width", "vae_scale_factor",
    ]:  # fmt: skip
        return None
    side = getattr(pipe, "default_sample_size", 0) * factor
    latents: Tensor = unpack(clean, asked.get("height") or side, asked.get("width") or side, factor)
    return latents


def _as_images(pipe: Any, picture: Tensor, kind: str | None) -> Any:
    """Pictures (B, C, H, W) from -1 to 1 as the pipeline returns them: `kind` is its `output_type`."""
    kind = kind if kind in ("np", "pt", "pil") else "pil"
    processor = getattr(pipe, "image_processor", None)
    if processor is not None:
        return processor.postprocess(picture, output_type=kind)
    found = (picture / 2 + 0.5).clamp(0, 1)
    if kind == "pt":
        return found
    array = found.permute(0, 2, 3, 1).cpu().float().numpy()
    return pipe.numpy_to_pil(array) if kind == "pil" else array
