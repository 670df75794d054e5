"""What is calibrated: a pipeline, or one's own loop around a `Denoiser`, with the seeds of one half of the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..config import SpecaConfig
from ..core.prior import Prior
from ..denoiser.denoiser import Denoiser
from ..diffusers.companions import bare
from ..diffusers.components import denoisers_of
from ..errors import InputError, NotEnabledError
from ..reports.measure import generate, joined, run_once, split
from ..reports.report import Report
from .knowledge import Knowledge, Learner
from .recording import Recording, record, recorded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Generate = Callable[[list[int]], Tensor]
"""One's own loop: from seeds to the samples (n, ...) that it draws with them."""


class Subject(Protocol):
    """What calibration needs: full runs, what they show, and runs with a prior."""

    model: str
    scheduler: str

    def full(self) -> Tensor:
        """Return the samples (n, ...) of full runs."""
        ...

    def record(self) -> Recording:
        """Return what full runs show."""
        ...

    def attempt(self, config: SpecaConfig, prior: Prior) -> tuple[Tensor, Report]:
        """Return the samples (n, ...) with these settings and this prior, and what was done."""
        ...


class PipelineSubject:
    """A pipeline and the arguments of its calls."""

    def __init__(self, pipe: DiffusionPipeline, call: dict[str, Any], seeds: list[int], batch: int) -> None:
        self.pipe, self.call, self.seeds, self.batch = pipe, call, seeds, batch
        self.model = type(bare(denoisers_of(pipe)[0])).__name__
        self.scheduler = type(pipe.scheduler).__name__

    def full(self) -> Tensor:
        """Return the images of full runs, in [0, 1]."""
        return joined([run_once(self.pipe, *part, None) for part in split(self.call, self.seeds, self.batch)]).images

    def record(self) -> Recording:
        """Return what full runs show."""
        return record(self.pipe, self.call, self.seeds, self.batch)

    def attempt(self, config: SpecaConfig, prior: Prior) -> tuple[Tensor, Report]:
        """Return the images with these settings and this prior, and the report."""
        made = generate(self.pipe, self.call, self.seeds, config, batch=self.batch, calibration=prior)
        assert made.report is not None
        return made.images, made.report


class LoopSubject:
    """A denoiser and the loop that is run with it.

    Samples are scaled by the range of the full runs, so that their PSNR is that of pictures in [0, 1].
    """

    def __init__(self, denoise: Denoiser, loop: Generate, seeds: list[int], batch: int) -> None:
        self.denoise, self.loop, self.seeds, self.batch = denoise, loop, seeds, batch
        self.model, self.scheduler = denoise.name, denoise.sampler_name
        self._scale = 1.0

    def full(self) -> Tensor:
        """Return the samples of full runs."""
        return self.record().images

    def record(self) -> Recording:
        """Return what full runs show.

        Raises:
            InputError: the sampler is not linear, or the loop called the denoiser in another way than it does.
        """
        learner, response = Learner(), self.denoise.response
        with self._settings(SpecaConfig(), learner):
            images = torch.cat([self._drawn(part) for part in self._parts()])
            report = self._report()
        self._scale = float(images.max() - images.min()) or 1.0
        return recorded(learner, response, images / self._scale, report)

    def attempt(self, config: SpecaConfig, prior: Prior) -> tuple[Tensor, Report]:
        """Return the samples with these settings and this prior, and the report of the last batch."""
        with self._settings(config, Knowledge(prior)):
            samples = torch.cat([self._drawn(part) for part in self._parts()])
            return samples / self._scale, self.denoise.report()

    def _report(self) -> Report | None:
        try:
            return self.denoise.report()
        except NotEnabledError:  # the loop did not call the denoiser
            return None

    @contextmanager
    def _settings(self, config: SpecaConfig, knowledge: Knowledge) -> Iterator[None]:
        before = self.denoise.config, self.denoise.knowledge
        self.denoise.config, self.denoise.knowledge = config, knowledge
        self.denoise.reset()
        try:
            yield
        finally:
            self.denoise.config, self.denoise.knowledge = before
            self.denoise.reset()

    def _parts(self) -> list[list[int]]:
        return [self.seeds[begin : begin + self.batch] for begin in range(0, len(self.seeds), self.batch)]

    def _drawn(self, seeds: list[int]) -> Tensor:
        with torch.no_grad():
            found = self.loop(seeds)
        if not isinstance(found, Tensor) or len(found) != len(seeds):
            raise InputError(f"the loop must return a tensor with one sample for each of {len(seeds)} seeds.")
        return found.detach().float().cpu()
