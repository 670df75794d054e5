"""Requests of an engine: what one may say, whether it can be, and what its memory depends on."""

from __future__ import annotations

import inspect
import math
import numbers
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import Config, SpecaConfig
from ..errors import ConfigError, InputError, nearest

SETTINGS = ("preset", "tolerance", "speedup", "threshold", "settings")
OWN = (*SETTINGS, "generator_seed", "scheduler", "priority", "deadline", "preview", "id", "pipe")
"""What a request may say besides the arguments of the pipeline."""

COUNTS = (
    "num_inference_steps", "height", "width", "num_frames", "num_images_per_prompt", "num_videos_per_prompt",
    "batch_size", "max_sequence_length",
)  # fmt: skip
"""Arguments of pipelines that are whole numbers from 1 on."""

STEPS = "num_inference_steps"

Preview = Literal["latents"] | int


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of the pipeline, with settings of its own.

    Attributes:
        arguments: what the pipeline's `__call__` is given.
        config: the settings that say which of its steps are forecast.
        seed: the seed of its random generator; None where the arguments bring generators.
        scheduler: used in place of the pipeline's own, or None; it is copied.
        priority: requests of higher priority start sooner; one level counts as 32 rounds of waiting.
        deadline: seconds after which it is given up, None for never.
        preview: what its events carry of the finished sample as it is predicted on the way: nothing (None), the latents
            at each step, or so many images, evenly over the steps.
        id: a name that the user gives it.
        pipe: a pipeline that is run in place of the engine's, with the same models: one that begins with a picture.
    """

    arguments: dict[str, Any]
    config: Config
    seed: int | None
    scheduler: Any = None
    priority: int = 0
    deadline: float | None = None
    preview: Preview | None = None
    id: Any = None
    pipe: Any = None

    @classmethod
    def build(cls, asked: Mapping[str, Any], accepted: Iterable[str], config: Config) -> Request:
        """Return the request for some arguments: those of the pipeline, named in `accepted`, and those of `OWN`.

        A request without generator or seed is given a seed that the operating system draws.

        Raises:
            InputError: an argument that the pipeline does not take, or a value that cannot be.
            ConfigError: a wrong setting.
        """
        own = {n: v for n, v in asked.items() if n in OWN}
        arguments = {n: v for n, v in asked.items() if n not in OWN}
        names = list(accepted)
        for name in arguments:
            if name not in names:
                raise InputError(f"the pipeline takes no argument {name!r}; {nearest(name, [*names, *OWN])}")
        _demand_counts(arguments)
        _demand_own(own)
        seed, generator = own.get("generator_seed"), arguments.get("generator")
        if seed is not None and generator is not None:
            raise InputError("give either generator or generator_seed, not both.")
        if seed is None and generator is None:
            seed = secrets.randbelow(2**31)  # not from torch's global generator, which every request sets back
        preview = own.get("preview")
        return cls(
            arguments=arguments,
            config=_config(own, config),
            seed=seed,
            scheduler=own.get("scheduler"),
            priority=own.get("priority", 0),
            deadline=own.get("deadline"),
            preview="latents" if preview is True else preview or None,
            id=own.get("id"),
            pipe=own.get("pipe"),
        )

    def call(self) -> dict[str, Any]:
        """Return the arguments, with a new generator made from the seed."""
        if self.seed is None:
            return dict(self.arguments)
        return {**self.arguments, "generator": torch.Generator().manual_seed(self.seed)}

    @property
    def global_seed(self) -> int:
        """Return the seed for torch's global generators, from which some pipelines draw in spite of their own."""
        if self.seed is not None:
            return self.seed
        given = self.arguments["generator"]
        return int((given[0] if isinstance(given, (list, tuple)) else given).initial_seed())

    @property
    def size(self) -> object:
        """Return what is equal for requests that need equal memory: rows, pixels, frames, and what is kept of steps.

        How many steps there are does not matter, and of a guidance scale only whether it guides, which adds rows.
        """
        c = self.config
        kept = (c.prior, c.corrector, bool(c.speedup)) if isinstance(c, SpecaConfig) else c.history_dtype
        parts: list[object] = [type(c), c.anchors, kept, type(self.scheduler), type(self.pipe)]
        return (*parts, *((name, _size(name, value)) for name, value in sorted(self.arguments.items())))


def arguments_of(pipe: Any) -> dict[str, Any]:
    """Return the names of the arguments that the pipeline's `__call__` takes, with their defaults (None without)."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = {name: p.default for name, p in parameters.items() if p.kind in kinds and name != "self"}
    return {name: None if given is inspect.Parameter.empty else given for name, given in taken.items()}


def _size(name: str, value: Any) -> object:
    """What of one argument the memory of a request depends on."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple)):
        return len(value), frozenset(_size(name, item) for item in value)
    if isinstance(value, float) or (isinstance(value, int) and ("guidance" in name or "cfg" in name)):
        return value > 1 if "guidance" in name or "cfg" in name else None
    if isinstance(value, numbers.Integral):
        return value if isinstance(value, bool) or (name in COUNTS and name != STEPS) else None
    if isinstance(getattr(value, "size", None), tuple):  # a PIL image
        return value.size
    return tuple(value.shape) if hasattr(value, "shape") else type(value)


def _config(own: dict[str, Any], config: Config) -> Config:
    """The settings of a request that brings its `own`, on top of those of the engine."""
    settings = own.get("settings")
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"settings={settings!r} must be a dictionary of settings, such as dict(tolerance=0.01).")
    overrides = {n: own[n] for n in ("tolerance", "speedup", "threshold") if own.get(n) is not None}
    base = own["preset"] if own.get("preset") is not None else config
    for name, value in overrides.items():
        if not _is_number(value):
            raise ConfigError(f"{name}={value!r} must be a number.")
    return SpecaConfig.build(base, **{**overrides, **(settings or {})})


def _demand_counts(arguments: dict[str, Any]) -> None:
    """Refuse numbers of steps, pixels and pictures that cannot be; what pipelines say of these is hard to read."""
    for name in COUNTS:
        value = arguments.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1):
            raise InputError(f"{name}={value!r} is not valid; use a whole number from 1 on.")


def _demand_own(own: dict[str, Any]) -> None:
    """Refuse what a request says of itself that cannot be. Raises `InputError`."""
    seed, deadline, priority = own.get("generator_seed"), own.get("deadline"), own.get("priority", 0)
    scheduler, preview = own.get("scheduler"), own.get("preview")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise InputError(f"generator_seed={seed!r} is out of range; use a whole number from 0 to 2^63 - 1.")
    if deadline is not None and not (_is_number(deadline) and deadline > 0):
        raise InputError(f"deadline={deadline!r} is not valid; it is a number of seconds from now, more than 0.")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise InputError(f"priority={priority!r} must be a whole number.")
    if scheduler is not None and not (callable(getattr(scheduler, "step", None)) and hasattr(scheduler, "config")):
        raise InputError(
            f"scheduler={scheduler!r} is no scheduler of diffusers; pass an object such as pipe.scheduler."
        )
    if preview is not None and (not isinstance(preview, int) or preview < 0):
        raise InputError(f"preview={preview!r} is not valid; use True for latents, or a number of images.")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
