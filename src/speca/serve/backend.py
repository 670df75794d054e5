"""One model that is served: its pipeline, what it takes, and how a request of a client becomes one of the engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from ..config import PRESETS, SpecaConfig
from ..engine import Engine
from ..errors import InputError, SpecaError, nearest
from .faults import Fault, wrong
from .schema import QUALITIES, Asked, EditRequest, ImageRequest, Pictures, VideoRequest
from .settings import Limits, ModelConfig

Task = Literal["generate", "edit", "inpaint"]
FULL = SpecaConfig(tolerance=0.0, threshold=0.0)
"""The preset "full": every step is computed."""

LEAST_WAIT = 0.5
"""Seconds of work that may always lie before a new image."""

OWN = {"num_inference_steps", "preset", "speedup", "tolerance", "seed", "priority", "deadline_s", "size", "prompt"}
"""Fields that need no argument of the pipeline's own by that name."""


@dataclass
class Backend:
    """A model that is served.

    Attributes:
        config: its settings.
        limits: what a request may ask for.
        engine: runs its requests, once it is loaded.
        pipes: the pipeline of each task; they share their models.
        base: arguments that every request of this model is given.
        classes: names of a class-conditional model's classes and their numbers; empty for others.
        alone: seconds that an image with the default settings took on the idle engine.
        error: why it could not be loaded.
        ready: whether it takes requests.
    """

    config: ModelConfig
    limits: Limits
    engine: Engine | None = None
    pipes: dict[Task, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    alone: float = 0.0
    error: str = ""
    ready: bool = False

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.config.served_name

    # ------------------------------------------------------------------------------------------- life
    def load(self, pipe: Any = None) -> None:
        """Load the pipeline, or take `pipe`, make its engines, and run each once, so that no client waits for it.

        Raises:
            SpecaError: there is no such model, or it cannot be served.
        """
        from .. import zoo
        from ..engine.request import arguments_of

        c = self.config
        pipe = _load(c) if pipe is None else pipe
        pipe.set_progress_bar_config(disable=True)
        self.pipes["generate"] = pipe
        if c.edits:
            self.pipes |= _edits_of(pipe)
        self.takes = {task: set(arguments_of(p)) for task, p in self.pipes.items()}
        self.base = dict(zoo.call_arguments(c.model))
        self.classes = {str(n): int(i) for n, i in (getattr(pipe, "labels", None) or {}).items()}
        self.engine = Engine(
            pipe, SpecaConfig.build(c.preset, **({} if c.speedup is None else {"speedup": c.speedup})),
            max_batch=c.max_batch, max_live=c.max_live if c.max_live is not None else c.max_batch, memory=c.memory,
        )  # fmt: skip
        self.warm()
        self.ready = True

    def warm(self) -> None:
        """Run a request of default settings, from which is learnt what the model allows and what its outputs look like;
        if it was computed in full, as nothing was known of the model, run it again for its time, unless it is a video.
        """
        prompt = next(iter(self.classes), "0" if "prompt" not in self.takes["generate"] else "warm-up")
        shape = VideoRequest if self.task == "video" else ImageRequest
        request = shape(prompt=prompt, num_inference_steps=min(self.config.steps, self.limits.steps))
        result = self.running.warm(**self.asked(request, "generate", 0))
        samples = result.report.samples if result.report is not None else ()
        if self.task == "image" and all(sample.full == len(sample.decisions) for sample in samples):
            result = self.running.warm(**self.asked(request, "generate", 0))
        self.alone = result.seconds

    def close(self) -> None:
        """Cancel what is under way, and end the engine."""
        self.ready = False
        if self.engine is not None:
            self.engine.close()

    @property
    def running(self) -> Engine:
        """The engine of a model that is loaded."""
        assert self.engine is not None, "requests come only once the model is ready"
        return self.engine

    @property
    def alive(self) -> bool:
        """Whether its engine runs."""
        return self.engine is not None and self.engine.alive

    # ------------------------------------------------------------------------------------------- what it is
    @property
    def task(self) -> Literal["image", "video"]:
        """What it makes."""
        return "video" if "num_frames" in self.takes["generate"] else "image"

    @property
    def schedulers(self) -> dict[str, Any]:
        """Samplers that clients may choose, by name of their class."""
        own = self.pipes["generate"].scheduler
        return {cls.__name__: cls for cls in [type(own), *getattr(own, "compatibles", [])]}

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height where a request says none, None where the model has no choice."""
        if "height" not in self.takes["generate"]:
            return None
        if "height" in self.base:
            return self.base["width"], self.base["height"]
        pipe = self.pipes["generate"]
        side = getattr(pipe, "default_sample_size", None)
        factor = getattr(pipe, "vae_scale_factor", 8)
        return (side * factor, side * factor) if isinstance(side, int) else None

    def about(self) -> dict[str, Any]:
        """Return what /v1/models says of it."""
        if not self.ready:
            return {"task": None, "error": self.error or None}
        takes = [n for n in [*Asked.model_fields, "strength", "num_frames"] if self._takes(n, "generate")]
        limits = self.limits
        return {
            "task": self.task,
            "edits": "edit" in self.pipes,
            "inpainting": "inpaint" in self.pipes,
            "takes": takes,
            "classes": list(self.classes) or None,
            "size": None if self.size is None else "{}x{}".format(*self.size),
            "schedulers": list(self.schedulers),
            "presets": [*PRESETS, "full"],
            "defaults": {"num_inference_steps": self.config.steps, "preset": self.config.preset,
                         "guidance_scale": self.base.get("guidance_scale")},
            "limits": {"num_inference_steps": [1, limits.steps], "n": limits.images, "pixels": limits.pixels,
                       "frames": limits.frames, "prompt": limits.prompt},
        }  # fmt: skip

    def _takes(self, name: str, task: Task) -> bool:
        takes = self.takes[task]
        if name == "size":
            return "height" in takes
        if name == "scheduler":
            return "scheduler" in self.pipes[task].components
        return name in OWN or name in takes

    # ------------------------------------------------------------------------------------------- requests
    @property
    def lowest(self) -> int:
        """The priority of jobs, below all that clients may ask for."""
        return -self.limits.priority - 1

    def most_wait(self, request: Asked) -> float:
        """Return how many seconds of work may lie before a new image."""
        alone = self.alone * (request.num_inference_steps or self.config.steps) / self.config.steps
        return min(self.limits.wait_s, max(LEAST_WAIT, (self.limits.slowdown - 1) * alone))

    def demand_ready(self) -> None:
        """Raise `Fault` 503 if the model takes no requests."""
        if not self.ready:
            text = f"{self.name} could not be loaded: {self.error}" if self.error else f"{self.name} is being loaded."
            headers = {"x-should-retry": "false"} if self.error else {"retry-after": "5"}
            raise Fault(503, text, code="not_ready", headers=headers)

    def check(self, request: Asked, task: Task) -> None:
        """Raise `Fault` 400 for what this model does not take, or what goes beyond the limits; it names the field."""
        if task not in self.pipes:
            raise wrong(f"{self.name} cannot {task} pictures; it only generates them.", "model")
        given = request.model_fields_set - {n for n in request.model_fields_set if getattr(request, n) is None}
        passed = set(Asked.model_fields) | {"strength", "num_frames"}
        for name in sorted(given & passed - {"model", "user"}):
            if not self._takes(name, task) and not (name == "size" and request.size == "auto"):
                known = [n for n in passed if self._takes(n, task)]
                raise wrong(f"{self.name} does not take {name}; {nearest(name, sorted(known))}", name)
        self._check_limits(request)
        if request.scheduler is not None and request.scheduler not in self.schedulers:
            raise wrong(
                f"scheduler={request.scheduler!r} is not known; {nearest(request.scheduler, self.schedulers)}",
                "scheduler",
            )

    def _check_limits(self, request: Asked) -> None:
        limits, size = self.limits, request.width_height
        if len(request.prompt) > limits.prompt:
            raise wrong(f"the prompt has {len(request.prompt)} characters; at most {limits.prompt}.", "prompt")
        if request.num_inference_steps is not None and request.num_inference_steps > limits.steps:
            raise wrong(
                f"num_inference_steps={request.num_inference_steps}: at most {limits.steps}.", "num_inference_steps"
            )
        if size is not None and (size[0] * size[1] > limits.pixels or not all(size)):
            raise wrong(
                f"size={request.size} has {size[0] * size[1]} pixels; 1 to {limits.pixels} are allowed.", "size"
            )
        if isinstance(request, Pictures) and request.n > limits.images:
            raise wrong(f"n={request.n}: at most {limits.images}.", "n")
        if request.deadline_s is not None and request.deadline_s > limits.deadline_s:
            raise wrong(f"deadline_s={request.deadline_s}: at most {limits.deadline_s}.", "deadline_s")
        if isinstance(request, VideoRequest) and (frames := self.frames(request)) and frames > limits.frames:
            raise wrong(f"{frames} frames: at most {limits.frames}.", "seconds")

    def frames(self, request: VideoRequest) -> int | None:
        """Return how many frames a request asks for, None for the model's own number.

        Video models take 4 k + 1 frames, the nearest to the length that was asked for.
        """
        if request.num_frames is not None or request.seconds is None:
            return request.num_frames
        return 4 * max(0, round((request.seconds * request.fps - 1) / 4)) + 1

    def asked(self, request: Asked, task: Task, number: int, pictures: Sequence[Image.Image] = ()) -> dict[str, Any]:
        """Return what the engine is asked for image `number` of a request. Raises `Fault` 400 for an unknown class.

        Args:
            request: that of the client.
            task: see `Task`.
            number: from 0.
            pictures: of an edit the picture to begin with; of an inpainting its mask as well.
        """
        found: dict[str, Any] = dict(self.base)
        found["num_inference_steps"] = request.num_inference_steps or self.config.steps
        found |= self._condition(request, task)
        for name in ("negative_prompt", "guidance_scale", "true_cfg_scale", "strength"):
            if (value := getattr(request, name, None)) is not None:
                found[name] = value
        if (size := request.width_height) is not None:
            found["width"], found["height"] = size
        if isinstance(request, VideoRequest) and (frames := self.frames(request)) is not None:
            found["num_frames"] = frames
        if task != "generate":
            found["image"] = pictures[0]
            if task == "inpaint":
                found["mask_image"] = pictures[1]
            if "height" in self.takes[task] and size is None:
                found["width"], found["height"] = pictures[0].size
        if "height" in self.takes[task] and "width" in found:
            self._demand_sides(found["width"], found["height"], "size" if size is not None else "image")
        found = {n: v for n, v in found.items() if n in self.takes[task]}
        if request.scheduler is not None:
            cls = self.schedulers[request.scheduler]
            found["scheduler"] = cls.from_config(self.pipes[task].scheduler.config)
        found |= self._settings(request)
        seed = request.seed if request.seed is not None else random.SystemRandom().randrange(2**31)
        most = self.limits.priority
        if task != "generate":
            found["pipe"] = self.pipes[task]
        return {
            **found, "generator_seed": seed + number, "priority": max(-most, min(most, request.priority)),
            "deadline": request.deadline_s or self.limits.deadline_s,
        }  # fmt: skip

    def _demand_sides(self, width: int, height: int, param: str) -> None:
        """Raise `Fault` 400 for a picture with fewer pixels than one token of the model stands for."""
        least = 2 * int(getattr(self.pipes["generate"], "vae_scale_factor", 1))  # transformers take patches of two
        if min(width, height) < least:
            raise wrong(f"{width}x{height} is too small; {self.name} draws sides of {least} pixels or more.", param)

    def _condition(self, request: Asked, task: Task) -> dict[str, Any]:
        if "prompt" in self.takes[task]:
            return {"prompt": request.prompt}
        numbers = {name.casefold(): number for name, number in self.classes.items()}
        text = request.prompt.strip().casefold()
        number = numbers.get(text, int(text) if text.isdecimal() else None)
        if number is None or (numbers and number not in numbers.values()):
            known = nearest(request.prompt, self.classes) if len(self.classes) <= 40 else "give its number."
            raise wrong(f"{self.name} has no class {request.prompt!r}; {known}", "prompt")
        return {"class_labels": [number]}

    def _settings(self, request: Asked) -> dict[str, Any]:
        preset: str | None = request.preset
        if preset is None and isinstance(request, Pictures) and request.quality is not None:
            preset = QUALITIES.get(request.quality)
        if preset == "full":
            return {"preset": FULL}
        found = {"preset": preset, "speedup": request.speedup, "tolerance": request.tolerance}
        return {n: v for n, v in found.items() if v is not None}

    def task_of(self, request: Asked, pictures: int) -> Task:
        """Return the task of a request with so many pictures."""
        if isinstance(request, EditRequest):
            return "inpaint" if pictures > 1 else "edit"
        return "generate"


def _load(config: ModelConfig) -> Any:
    import torch

    from .. import zoo

    return zoo.resolve(config.model, getattr(torch, config.dtype)).to(zoo.usable_device(config.device))


def _edits_of(pipe: Any) -> dict[Task, Any]:
    """Pipelines that start from a picture, with the parts of `pipe`; of tasks that diffusers knows one for."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    found: dict[Task, Any] = {}
    tasks: dict[Task, Any] = {"edit": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting}
    for task, auto in tasks.items():
        try:
            made = auto.from_pipe(pipe)
        except (ValueError, InputError, SpecaError):  # diffusers knows none for this model
            continue
        if type(made) is not type(pipe):
            made.set_progress_bar_config(disable=True)
            found[task] = made
    return found
