"""Who calls a model: one pipeline, or one's own sampling loop, and the run that it has under way or has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..calibration.knowledge import Knowledge
from ..config import Config, SpecaConfig
from ..core.controller import Planner
from ..denoiser.branch import Branch
from ..denoiser.executor import Executor
from ..denoiser.run import Run
from ..reports.costs import Costs
from ..reports.report import Report
from ..sampler.response import Response
from ..sampler.scheduler import scheduler_response
from .branches import Branches
from .clock import Clock, Position
from .stack import step_arguments
from .watch import watch


class Caller:
    """One pipeline, or loop, with its settings. All models that it calls share it.

    Attributes:
        clock: places calls on the time axis of the scheduler in use.
        names: tells branches apart.
        config: the settings.
        knowledge: what is known of the models.
        executor: runs the models, at once unless an engine gives its own.
        planner: in place of the one that the settings describe.
        run: the run under way or the last one, None before the first call that could be placed.
        running: whether a run is under way.
        begin: index of its first step on the scheduler's own list, above 0 where it starts from an image.
        models: classes of the models that took part.
    """

    def __init__(
        self,
        scheduler: Callable[[], Any],
        steps: int | None,
        config: Config,
        knowledge: Knowledge | None = None,
        executor: Executor | None = None,
    ) -> None:
        """`scheduler` and `steps` are for the clock, the others are attributes."""
        self.clock, self.names = Clock(scheduler, steps), Branches()
        self.config, self.knowledge = config, knowledge
        self.executor = executor or Executor()
        self.planner: Planner | None = None
        self.run: Run | None = None
        self._unwatch: Callable[[], None] = _nothing
        self._start()
        self.running = False

    def _start(self) -> None:
        self.run, self.running = None, True
        self.costs, self.notes = Costs(), list[str]()
        self.models: list[str] = []
        self.begin = 0
        self._unwatch()
        self._unwatch = _nothing
        self.names.reset()

    def place(self, given: Any, context: Any) -> Position | None:
        """Return where a call stands in its run, None if it cannot be found; a run begins where a new one is seen."""
        if not self.running:
            self._start()
        reads = self.clock.device_reads
        placed = self.clock.place(given, context)
        if placed is not None and placed.fresh:
            if self.run is not None:  # the run before was broken off, or was a loop that tells of no end
                self.run.end()
                self._start()
            self.begin, total = placed.index, placed.total - placed.index
            planned = self.config if isinstance(self.config, SpecaConfig) else None
            response = self._response(total) if planned else Response()
            config = planned or SpecaConfig(prior="none", corrector=False)
            self.run = Run(config, response, total, self.knowledge, self.executor, self.costs, self.planner)
            if self.run.recorder is not None and hasattr(scheduler := self.clock.scheduler(), "step"):
                self._unwatch = watch(scheduler, self.run)
            self.run.notes[:0] = self.notes
            self.notes = self.run.notes
        self.costs.host_reads += self.clock.device_reads - reads
        if placed is None:
            return None
        return replace(placed, index=placed.index - self.begin, total=placed.total - self.begin)

    def _response(self, total: int) -> Response:
        """What the scheduler in use does in the run that begins."""
        scheduler = self.clock.scheduler()
        if scheduler is None:
            return Response(reason="the scheduler is not known; pass scheduler= to speca.enable")
        options = step_arguments()  # read from the calling frames, so here
        found = self.executor.compute(lambda: scheduler_response(scheduler, self.begin, **options), "sampler")
        steps = len(found.transitions)
        if steps and steps != total:
            reason = f"{type(scheduler).__name__} has {steps} timesteps for {total} steps"
            return Response(noise=found.noise, times=found.times, reason=reason)
        return found

    def note(self, text: str) -> None:
        """Keep a remark on the run under way for the report, once."""
        if not self.running:
            self._start()
        if text not in self.notes:
            self.notes.append(text)

    def took_part(self, model: str) -> None:
        """Note the class of a model that was called."""
        if model not in self.models:
            self.models.append(model)

    @property
    def branches(self) -> dict[str, Branch]:
        """The branches of the run under way or of the last one, by name."""
        return self.run.branches if self.run is not None else {}

    def end(self) -> None:
        """End the run, also after an exception: what was kept is dropped, the records stay for the report."""
        self.clock.reset()
        self.running = False
        self._unwatch()
        self._unwatch = _nothing
        if self.run is not None:
            self.run.end()

    def report(self, model: str) -> Report:
        """Return what the last run cost and saved. `model` is named where none took part.

        Raises:
            NotEnabledError: nothing has run yet.
        """
        name = ", ".join(self.models) or model
        records = self.run.records if self.run is not None else []
        planned = self.run is not None and isinstance(self.config, SpecaConfig)
        config = self.run.config if planned and self.run is not None else self.config
        return Report.of(name, config.to_dict(), records, self.costs, self.notes)


def _nothing() -> None:
    return None
