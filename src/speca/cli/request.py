"""Options of the command line, checked and turned into settings, a pipeline and the arguments it is called with."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..config import MIN_STEPS, PRESETS, Config, SpecaConfig
from ..errors import ConfigError, InputError, SpecaError, nearest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..reports.check import CheckReport

LISTED = 20  # more valid names than this are not spelt out in a message


@dataclass(frozen=True)
class Request:
    """The images that are asked for; labels or prompts take turns until there are `n` images.

    Raises InputError for options that are invalid for all models, and in `call` for those invalid for this model.
    """

    model: str
    labels: Sequence[str]
    prompts: Sequence[str]
    n: int | None
    steps: int
    seed: int
    guidance: float | None

    def __post_init__(self) -> None:
        if bool(self.labels) == bool(self.prompts):
            raise InputError(
                "give either --label or --prompt, "
                + ("not both." if self.labels else "for example --label sneaker or --prompt 'a red boat'.")
            )
        if self.steps < MIN_STEPS:
            raise InputError(f"--steps {self.steps} leaves nothing to forecast; use {MIN_STEPS} steps or more.")
        at_least(1, n=self.n)
        if self.n is not None and self.n < len(self._conditions):
            raise InputError(
                f"--n {self.n} is fewer than the {len(self._conditions)} labels or prompts given; "
                "raise --n or leave it away for one image each."
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed} is out of range; use a whole number from 0 to 2^63 - 1.")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise InputError(f"--guidance {self.guidance} is out of range; use 0 or more, for example 4.")

    @property
    def _conditions(self) -> Sequence[str]:
        return self.labels or self.prompts

    @property
    def seeds(self) -> list[int]:
        """Return one seed per image: `seed`, `seed + 1`, and so on."""
        return [self.seed + k for k in range(len(self._conditions) if self.n is None else self.n)]

    def call(self, pipe: DiffusionPipeline) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return the arguments of the pipeline, with a label or prompt for each image, and the images' captions."""
        accepted = inspect.signature(pipe.__call__).parameters
        longest = getattr(getattr(pipe, "scheduler", None), "config", {}).get("num_train_timesteps", math.inf)
        if self.steps > longest:
            raise InputError(
                f"--steps {self.steps} is more than {self.model} was trained with; use {longest} or fewer."
            )
        call: dict[str, Any] = {**zoo.call_arguments(self.model), "num_inference_steps": self.steps}
        if self.guidance is not None:
            if "guidance_scale" not in accepted:
                raise InputError(f"{type(pipe).__name__} has no guidance scale; leave --guidance away.")
            call["guidance_scale"] = self.guidance
        name, option = ("class_labels", "--label") if self.labels else ("prompt", "--prompt")
        if name not in accepted:
            what = f"{self.model} ({type(pipe).__name__})"
            if not {"class_labels", "prompt"} & accepted.keys():
                raise InputError(f"{what} takes neither labels nor prompts; call it from Python.")
            raise InputError(f"{what} does not take {option}; try {'--prompt' if self.labels else '--label'}.")
        values, captions = self._values(pipe)
        turns = [k % len(values) for k in range(len(self.seeds))]
        return {**call, name: [values[k] for k in turns]}, tuple(captions[k] for k in turns)

    def _values(self, pipe: DiffusionPipeline) -> tuple[Sequence[int] | Sequence[str], Sequence[str]]:
        """Return the argument of the pipeline for each label or prompt, and its caption."""
        if self.prompts:
            return self.prompts, self.prompts
        numbers = class_numbers(pipe, self.model, self.labels)
        return numbers, class_names(pipe, numbers)


def class_numbers(pipe: DiffusionPipeline, model: str, labels: Sequence[str]) -> list[int]:
    """Return the number of each class, given by name (in any case) or number. Raises InputError for an unknown one."""
    numbers: dict[str, int] = {name.casefold(): number for name, number in pipe.labels.items()}
    valid = set(numbers.values()) or set(range(pipe.transformer.config.num_embeds_ada_norm))
    found = []
    for label in labels:
        number = numbers.get(label.strip().casefold())
        if number is None:
            number = _whole(label)
            if number is None:
                raise InputError(f"{model} has no class {label!r}; {_closest(label, numbers, valid)}")
            if number not in valid:
                raise InputError(f"label {number} is out of range; {model} has classes {min(valid)} to {max(valid)}.")
        found.append(number)
    return found


def class_names(pipe: DiffusionPipeline, numbers: Sequence[int]) -> list[str]:
    """Return the name of each class, or "class 7" where the model has no names."""
    names = {number: name for name, number in reversed(pipe.labels.items())}  # the first of several names stays
    return [names.get(number, f"class {number}") for number in numbers]


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _closest(label: str, names: dict[str, int], valid: set[int]) -> str:
    if not names:
        return f"it knows its classes by number only, {min(valid)} to {max(valid)}."
    if len(names) <= LISTED:
        return nearest(label, names)
    return f"the nearest are {', '.join(get_close_matches(label, names, n=3, cutoff=0))}."


# ------------------------------------------------------------------------------------------------ settings
def configuration(preset: str, settings: Sequence[str]) -> Config:
    """Return the preset with some settings replaced, each given as "key=value".

    Raises:
        ConfigError: no such preset or key (the nearest is named), or a value out of range.
    """
    base = PRESETS.get(preset, PRESETS["balanced"])
    hints = typing.get_type_hints(type(base))
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, not {setting!r}; for example --set threshold=0.2.")
        overrides[key.strip()] = _parsed(text.strip(), hints.get(key.strip()))
    return SpecaConfig.build(preset, **overrides)


def _parsed(text: str, hint: Any) -> Any:
    """Convert `text` to the type `hint`; return it unchanged if invalid, as the configuration then raises the error."""
    if typing.get_origin(hint) is tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else text
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            return text
    return text


def at_least(low: int, **options: int | None) -> None:
    """Raise InputError if an option is below `low`; None stands for an option that was not given."""
    for name, value in options.items():
        if value is not None and value < low:
            raise InputError(f"--{name} {value} is out of range; use {low} or more.")


# ------------------------------------------------------------------------------------------------ pipelines
def load(model: str, dtype: str, device: str | None, threads: int | None) -> DiffusionPipeline:
    """Return the pipeline that `model` names, on its device; diffusers and transformers print nothing from then on.

    Raises:
        InputError: there is no such pipeline.
        UnsupportedModelError: it has no denoising model.
    """
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from ..diffusers.components import denoisers_of

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    place = zoo.usable_device(device)
    pipe = zoo.resolve(model, getattr(torch, dtype))
    denoisers_of(pipe)  # refused before anything else is said about its arguments
    return pipe.to(place)


def examine(pipe: DiffusionPipeline, model: str, config: Config) -> tuple[CheckReport, str]:
    """Return what `speca.check` finds in one short call of the pipeline, and that call as text."""
    from .. import check
    from ..reports.measure import ticking

    call = _short_call(pipe) | zoo.call_arguments(model)
    words = f"{type(pipe).__name__}({', '.join(f'{name}={value!r}' for name, value in call.items())})"

    def run() -> object:
        try:
            return pipe(**call)
        except SpecaError:
            raise
        except Exception as error:  # the pipeline may need other arguments than this example call
            raise InputError(
                f"{model} did not run as {words} ({error}); from Python, give speca.check(pipe, call) your own call."
            ) from error

    with ticking(pipe, None, 0):
        return check(pipe, run, config), words


def _short_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return arguments of a short call of a pipeline: 4 steps, small pictures."""
    accepted = inspect.signature(pipe.__call__).parameters
    small = {"height": 256, "width": 256, "num_frames": 5}
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    call: dict[str, Any] = {"prompt": "a photo"} if "prompt" in accepted else {}
    if not call and ("class_labels" in accepted or anything):
        call = {"class_labels": [0, 1]}
    call |= {name: value for name, value in small.items() if name in accepted}
    return {**call, "num_inference_steps": MIN_STEPS}
