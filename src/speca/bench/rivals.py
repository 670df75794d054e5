"""Caches of diffusers and cache-dit behind the interface of `methods`, configured as their documentation says."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import itertools
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..reports.measure import run_once
from .setup import Apply, Call, Setup, transformer_of

Build = Callable[[Any, Call, Any], Any]
TUNING_SEED = 500_000  # tuning seeds count up from here, reporting seeds from 0


# ------------------------------------------------------------------------------------------------ diffusers
def diffusers_cache(build: Build, with_step: bool = False) -> Apply:
    """Apply a cache of diffusers with the configuration returned by `build(pipe, call, value)`.

    Add CacheMixin to a transformer without it while the cache is active, and a cache context to each call of a pipeline
    that sets none, so that these caches also run on `DiTPipeline`. With `with_step`, the context has the index of the
    step, the number of steps and the noise level.
    """

    @contextmanager
    def apply(pipe: Any, call: Call, value: Any) -> Iterator[Setup]:
        with cacheable(pipe, call["num_inference_steps"] if with_step else 0) as model:
            model.enable_cache(build(pipe, call, value))
            try:
                yield Setup(pipe, call)
            finally:
                model.disable_cache()

    return apply


@contextmanager
def cacheable(pipe: Any, steps: int = 0) -> Iterator[Any]:
    """Add `enable_cache` of CacheMixin to the transformer and run each of its calls in a cache context.

    With `steps`, the context has the index of the step, 0 to `steps - 1` in each run, and its noise level.
    """
    from diffusers.models.cache_utils import CacheMixin

    model = transformer_of(pipe)
    if isinstance(model, CacheMixin) and not steps:
        yield model
        return
    cls, before, calls = type(model), dict(model.__dict__), itertools.count()

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        here = {}
        if steps:
            step = next(calls) % steps
            time = float(pipe.scheduler.timesteps[step]) / pipe.scheduler.config.num_train_timesteps
            here = {"step_index": step, "sigma": min(1.0, time), "num_inference_steps": steps}
            self.__dict__["_bench_time"] = 1000 * time
        with self.cache_context("bench", **here):
            return cls.__call__(self, *args, **kwargs)

    bases = (cls,) if isinstance(model, CacheMixin) else (cls, CacheMixin)
    model.__class__ = type(cls.__name__, bases, {"__module__": cls.__module__, "__call__": called})
    try:
        yield model
    finally:
        model.__class__ = cls
        for name in model.__dict__.keys() - before.keys():
            del model.__dict__[name]


def first_block(pipe: Any, call: Call, threshold: float) -> Any:
    """FirstBlockCache: reuse all later blocks while the first block's residual changes by less than the threshold."""
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=threshold)


ATTENTION = [r"(single_)?transformer_blocks\.\d+\.attn1?"]
BLOCKS, HEAD = [r"(single_)?transformer_blocks\.\d+"], [r"proj_out(_2)?"]


def taylorseer(lite: bool) -> Build:
    """TaylorSeer at even intervals: each attention output forecast, or (`lite`) the last projection's alone.

    Its default patterns do not match the module names of DiT, so patterns are passed.
    """

    def build(pipe: Any, call: Call, interval: int) -> Any:
        from diffusers import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(
            cache_interval=interval, max_order=1, taylor_factors_dtype=torch.float32,
            skip_predict_identifiers=BLOCKS if lite else None, cache_identifiers=HEAD if lite else ATTENTION,
        )  # fmt: skip

    return build


def broadcast(pipe: Any, call: Call, skip: int) -> Any:
    """Pyramid Attention Broadcast: attention computed every `skip`-th step, at all timesteps."""
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(0, 1001),
        current_timestep_callback=lambda: 500,  # within the range at every step
    )


def faster(pipe: Any, call: Call, skip: int) -> Any:
    """The attention cache of FasterCache, from the first tenth of the run on, as the first step cannot be skipped.

    The cache of the unconditional branch is off: it expects that branch in the first half of a batch, where DiT has the
    conditional one.
    """
    from diffusers import FasterCacheConfig

    model = transformer_of(pipe)
    return FasterCacheConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(-1, 900),
        current_timestep_callback=lambda: model._bench_time,
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BCHW",
        is_guidance_distilled=True,
    )


def magnitude(pipe: Any, call: Call, threshold: float) -> Any:
    """MagCache, calibrated on one tuning seed as its documentation says, with its default limits of skipped steps."""
    from diffusers import MagCacheConfig

    steps = call["num_inference_steps"]
    return MagCacheConfig(
        threshold=threshold, max_skip_steps=8, retention_ratio=0.1, num_inference_steps=steps,
        mag_ratios=_magnitudes(pipe, call, steps),
    )  # fmt: skip


_RATIOS: weakref.WeakKeyDictionary[Any, dict[int, list[float]]] = weakref.WeakKeyDictionary()


def _magnitudes(pipe: Any, call: Call, steps: int) -> list[float]:
    """Return the ratios that MagCache prints after a calibration run; cached per model and number of steps."""
    from diffusers import MagCacheConfig

    model = transformer_of(pipe)
    known = _RATIOS.setdefault(model, {})
    if steps not in known:
        one = {name: value[:1] if isinstance(value, list) else value for name, value in call.items()}
        one = {name: value[:1] if isinstance(value, Tensor) and value.ndim else value for name, value in one.items()}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            model.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
            try:
                run_once(pipe, one, [TUNING_SEED], None)
            finally:
                model.disable_cache()
        found = re.search(r"^\[[\d., e+-]+\]$", printed.getvalue(), re.MULTILINE)
        if not found:
            raise InputError("MagCache printed no ratios at the end of its calibration.")
        known[steps] = ast.literal_eval(found[0])
    return known[steps]


def spectral(pipe: Any, call: Call, threshold: float) -> Any:
    """SeaCache; it has adapters for two video models only, so others get a function that returns the latents."""
    from diffusers import SeaCacheConfig

    return SeaCacheConfig(threshold=threshold, max_consecutive_cached=0, raw_vision_callback=_latents)


def _latents(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the latents of a call, each (C, T, H, W); packed tokens are unpacked to a square."""
    given: Tensor = args[0] if args else kwargs["hidden_states"]
    if given.ndim == 3:
        side = round(given.shape[1] ** 0.5)
        given = given.transpose(1, 2).reshape(len(given), -1, side, side)
    return list((given.unsqueeze(2) if given.ndim == 4 else given).unbind(0))


# ------------------------------------------------------------------------------------------------ cache-dit
SETTINGS = (
    "F1B0 W3 R0.05", "F1B0 W3 R0.1", "F1B0 W3 R0.2", "F1B0 W3 MC2 R0.8", "F1B0 W3 MC4 R0.8", "F1B0 W3 MC6 R0.8",
    "F1B0 W4 MC9 R0.8", "F4B0 W3 R0.15", "F1B2 W3 MC4 R0.8", "F8B0 W8 R0.08",
)  # fmt: skip
"""F, B: first and last blocks computed; W: warm-up; MC: most cached steps in a row; R: threshold. Last: the default."""

_SETTING = re.compile(r"F(\d+)B(\d+) W(\d+)(?: MC(\d+))? R([\d.]+)")


def quiet() -> None:
    """Silence the log of cache-dit, a dozen lines per setting."""
    for name in [n for n in logging.root.manager.loggerDict if n.lower().startswith("cache_dit")]:
        logging.getLogger(name).setLevel(logging.ERROR)


def cache_dit(order: int) -> Apply:
    """DBCache of cache-dit with one of SETTINGS; `order` 0 reuses residuals, 1 or more forecasts with TaylorSeer.

    cache-dit patches classes permanently, so it runs on a copy of the pipeline with a new class.
    """

    @contextmanager
    def apply(pipe: Any, call: Call, setting: str) -> Iterator[Setup]:
        try:
            import cache_dit as library
        except ImportError as error:
            raise InputError("cache-dit is not installed; pip install 'speca-diffusers[bench]'.") from error
        quiet()
        own = copy.deepcopy(pipe)
        for thing in (own, transformer_of(own)):
            cls = type(thing)
            thing.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__})
        calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        library.enable_cache(own, cache_config=configuration(library, setting), calibrator_config=calibrator)
        try:
            yield Setup(own, call)
        finally:
            library.disable_cache(own)

    return apply


def configuration(library: Any, setting: str) -> Any:
    """Parse one of SETTINGS into arguments of `cache_dit`; raise InputError if the format is wrong."""
    found = _SETTING.fullmatch(setting)
    if not found:
        raise InputError(f"{setting!r} is no setting of cache-dit; write it like {SETTINGS[0]!r}.")
    first, last, warmup, longest, threshold = found.groups()
    return library.DBCacheConfig(
        Fn_compute_blocks=int(first), Bn_compute_blocks=int(last), max_warmup_steps=int(warmup),
        max_continuous_cached_steps=int(longest or -1), residual_diff_threshold=float(threshold),
    )  # fmt: skip
