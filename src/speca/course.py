"""One run of a pipeline, shared by all its transformers: where it stands, what each sample did, what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from .branch import Branch, Spent
from .core.controller import Trajectory
from .core.corrector import Transition
from .core.generic import generic
from .core.prior import Prior
from .errors import NotEnabledError
from .model.calls import Branches, Call, Clock
from .model.sampler import noise_axis, step_arguments, transitions
from .report import Report, SampleReport
from .speculator import Speculator


class Course:
    """The run of one pipeline, or of one's own sampling loop, that is under way or was the last.

    Attributes:
        clock: places calls on the time axis of the scheduler in use.
        names: tells branches apart.
        branches: records and features of each branch, by name.
        spent: what the calls have cost.
        notes: what the user should know of this run.
        begin: index of the first step, above 0 where a run starts from an image.
        models: classes of the transformers that took part.
        speculator: of its own, where it is not played by that of its transformers.
    """

    def __init__(self, scheduler: Callable[[], Any] | None, num_inference_steps: int | None = None) -> None:
        """`scheduler` returns the scheduler in use at the moment of a call, as pipelines let users swap it."""
        self.clock, self.names = Clock(scheduler, num_inference_steps), Branches()
        self._scheduler = scheduler
        self.speculator: Speculator | None = None
        self._start()
        self.running = False

    def _start(self) -> None:
        self.branches: dict[str, Branch] = {}
        self.spent = Spent()
        self.notes: list[str] = []
        self.models: list[str] = []
        self._transitions: tuple[tuple[Transition, ...], str] | None = None
        self._prior: tuple[Prior | None] | None = None
        self.begin, self._peak, self._row_calls = 0, 0, 0
        self.names.reset()
        self.running, self._placed = True, False

    def place(self, given: Any, context: Any) -> Call | None:
        """Where a call stands, None if it cannot be told. Begins a new record where a run begins."""
        if not self.running:
            self._start()
        reads = self.clock.device_reads
        call = self.clock.place(given, context)
        if call is not None and call.fresh:
            if self._placed:  # the run before was broken off, or was a loop that tells of no end
                self._start()
            self.begin = call.position.index
        self._placed = self._placed or call is not None
        self.spent.host_reads += self.clock.device_reads - reads
        return call

    def transitions(self, total: int) -> tuple[tuple[Transition, ...], str]:
        """What the scheduler in use does at each of `total` steps, or nothing and the reason; found once a run."""
        if self._transitions is None:
            scheduler = self._scheduler() if self._scheduler else None
            known = scheduler is not None
            found = transitions(scheduler, **step_arguments()) if known else ((), "the scheduler is not known")
            if found[0] and len(found[0]) != total:
                found = (), f"{type(scheduler).__name__} has {len(found[0])} timesteps for {total} steps"
            self._transitions = found
        return self._transitions

    def prior(self, measured: Prior | None, linear: Sequence[Transition]) -> Prior | None:
        """What was measured as it is at the steps of this run, else the generic prior of the transitions `linear`;
        found once a run, as timesteps on a device are slow to read."""
        if self._prior is None:
            assert self._scheduler is not None
            noise = noise_axis(self._scheduler())
            self._prior = (measured.at(noise) if measured is not None else generic(noise, tuple(linear)),)
        return self._prior[0]

    def missed(self, step: int) -> None:
        """Begin branches anew that left out the step before `step`: their features are old and need not be kept."""
        for branch in self.branches.values():
            if 0 <= branch.last < step - 1:
                branch.restart()

    def note(self, text: str) -> None:
        """Keep a remark for the report."""
        if not self.running:
            self._start()
        if text not in self.notes:
            self.notes.append(text)

    def count(self, rows: int, model: str) -> None:
        """Take note of a finished call of `rows` rows."""
        self._row_calls += rows
        self._peak = max(self._peak, sum(branch.bytes() for branch in self.branches.values()))
        if model not in self.models:
            self.models.append(model)

    def end(self) -> None:
        """End of the run, or an exception: drop every feature; the records stay for the report."""
        self.clock.reset()
        self.running = False
        for branch in self.branches.values():
            branch.forget()

    def report(self, model: str, config: dict[str, Any]) -> Report:
        """Cost and savings. `model` is named where no transformer took part.

        Raises:
            NotEnabledError: nothing has run yet.
        """
        if not self.branches and not self.notes:
            raise NotEnabledError("nothing has run yet; call the pipeline first, then ask for the report.")
        records: dict[int, list[Trajectory]] = {}
        for branch in self.branches.values():
            for trajectory in branch.trajectories:
                records.setdefault(trajectory.sample, []).append(trajectory)
        samples = tuple(SampleReport.merge(i, records[i]) for i in sorted(records))
        spent = self.spent
        return Report(
            model=", ".join(self.models) or model,
            config=config,
            steps=max((len(s.decisions) for s in samples), default=0),
            samples=samples,
            flops=spent.flops,
            flops_full=spent.flops_full,
            seconds=spent.seconds,
            seconds_full=median(spent.full_rates) * self._row_calls if spent.full_rates else None,
            bytes_per_sample=self._peak // max(1, len(samples)),
            host_reads=spent.host_reads,
            notes=tuple(self.notes),
        )
