"""The loop of an engine. In each round it starts requests, runs what they ask for in batches, and answers them."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..denoiser.arguments import kind_of
from ..denoiser.executor import Evaluation
from ..diffusers.caller import Caller
from ..errors import CancelledError
from ..verified.evaluation import GatedEvaluation
from ..verified.gate import Mode
from .activations import Peak
from .components import Call, Components, adopt
from .executor import Plain, Question, Read, RequestExecutor
from .packing import Packer
from .play import kinds_of, play, report_of
from .records import Kind, Records
from .rendezvous import Ambient, Ended, Rendezvous
from .request import Future
from .scheduler import Batch, Lane, Scheduler


@dataclass
class Live:
    """A request that has started.

    Attributes:
        future: whom it is for.
        caller: its copy of the pipeline, with the run that is under way.
        step: index of the last step that it has begun, -1 before the first.
        kind: the kind of forward that it waits for.
        drafted: the inputs of its last checked draft, by identity: a full forward of the same ones redoes it.
        inputs: bytes of the inputs of its last evaluation, and of what may be pending of corrections.
    """

    future: Future
    caller: Caller | None = None
    step: int = -1
    kind: Kind = "full"
    drafted: tuple[int, ...] = ()
    inputs: int = 0


@dataclass
class Loop:
    """Owns the live requests of an engine. All its methods are called in one thread.

    Attributes:
        pipe: the pipeline whose models all requests share.
        scheduler: who starts, and what runs together.
        records: what has happened.
    """

    pipe: Any
    scheduler: Scheduler
    records: Records = field(default_factory=Records)
    live: dict[int, Live] = field(default_factory=dict)
    queued: dict[int, Future] = field(default_factory=dict)
    cancelled: deque[int] = field(default_factory=deque)  # filled by whoever cancels, from any thread

    def __post_init__(self) -> None:
        from ..diffusers.enable import accelerators_of

        self.accelerators = accelerators_of(self.pipe)
        self.meet, self.packer = Rendezvous(kinds_of(self.accelerators)), Packer()
        self._measured: set[object] = set()  # kinds of forwards whose memory is known
        weighing = self.scheduler.memory is not None
        self.components = Components(self.packer.tokens, self.meet.devices, weighing=weighing)
        self._deadlines: list[tuple[float, int]] = []
        self._readings: dict[int, Read] = {}

    @property
    def busy(self) -> bool:
        """Whether any request is under way or waits to start."""
        return bool(self.live or self.queued)

    def submit(self, future: Future) -> None:
        """Queue a request. Raises what the scheduler refuses it with."""
        request = future.request
        self.scheduler.submit(future.index, size=request.size, priority=request.priority)
        self.queued[future.index] = future
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (future.submitted + request.deadline, future.index))

    def tick(self) -> None:
        """Do one round: cancel requests, start others, run one set of batches, read numbers from the device."""
        began = time.perf_counter()
        self._give_up()
        planning = time.perf_counter()
        admitted = self.scheduler.admit()
        self.records.planning += time.perf_counter() - planning
        for index in admitted:
            self._start(index)
        planning = time.perf_counter()
        batches = self.scheduler.plan()
        self.records.planning += time.perf_counter() - planning
        for batch in batches:
            self._run(batch)
        self._read()
        self.records.ticked(self.scheduler, time.perf_counter() - began)

    # ---------------------------------------------------------------------------------------------- requests
    def _give_up(self) -> None:
        """End requests that were cancelled, or whose deadline has passed."""
        now = time.perf_counter()
        while self._deadlines and self._deadlines[0][0] <= now:
            index = heapq.heappop(self._deadlines)[1]
            future = self._future(index)
            if future is not None:
                self._stop(index, CancelledError(f"the deadline of {future.request.deadline} s has passed."))
        while self.cancelled:
            index = self.cancelled.popleft()
            if self._future(index) is not None:
                self._stop(index, CancelledError("the request was cancelled."))

    def _future(self, index: int) -> Future | None:
        live = self.live.get(index)
        return self.queued.get(index) if live is None else live.future

    def _stop(self, index: int, error: CancelledError) -> None:
        self._readings.pop(index, None)
        if index in self.queued:
            self.scheduler.end(index)
            self.records.ended(self.queued.pop(index).finish(error=error))
        else:
            self.scheduler.waiting.pop(index, None)
            self._go(index, lambda: self.meet.throw(index, error))

    def _start(self, index: int) -> None:
        future = self.queued.pop(index)
        live = self.live[index] = Live(future)
        future.begin()
        self.records.started(future.last.time)

        executor = RequestExecutor(self.meet, self.scheduler)

        def begun(mine: Any, caller: Caller) -> None:
            live.caller = caller
            if self.scheduler.component_batch > 1:
                adopt(mine, self.components, executor.component, [a.model for a in self.accelerators])

        self._go(
            index, lambda: self.meet.start(index, lambda: play(self.pipe, self.accelerators, future, executor, begun))
        )

    def _go(self, index: int, onward: Callable[[], None]) -> None:
        """Let a request go on, and take up what it asks for next, or its end."""
        onward()
        while self.meet.ended:
            self._end(self.meet.ended.pop())
        if index in self.meet.asked:
            self._take(index, *self.meet.asked[index])

    def _end(self, ended: Ended) -> None:
        live = self.live.pop(ended.key)
        if live.inputs and ended.error is None:  # one full step may have been all that it asked for
            self.scheduler.weigh(ended.key, self._bytes(live))
        self.scheduler.end(ended.key)
        if ended.error is not None and not isinstance(ended.error, Exception):
            live.future.finish(error=ended.error)
            raise ended.error  # Ctrl-C, and the like, is not one request's
        output, report = (None, None) if ended.value is None else ended.value
        if report is None and live.caller is not None:
            report = report_of(live.caller, self.accelerators)
        self.records.ended(live.future.finish(output, report, ended.error))

    def _take(self, index: int, question: Question, ambient: Ambient) -> None:
        """Sort what a request asks for: numbers to be read, or a forward, which goes to the scheduler."""
        if isinstance(question, Read):
            self._readings[index] = question
            return
        if isinstance(question, Plain):
            self.live[index].kind = "full"
            self.scheduler.post(index, Lane.FULL, ("alone", index), step=-1)
            return
        if isinstance(question, Call):
            self._take_component(index, question, ambient)
            return
        live, step = self.live[index], question.step
        if step > live.step:
            live.step = step
            live.future.tell("step", step, question.total)
            if self.scheduler.memory is not None:
                live.inputs = _bytes_of_inputs(question)
                if step >= 1:
                    self.scheduler.weigh(index, self._bytes(live))
        inputs = tuple(id(value) for value in question.arguments.values())
        mode = question.mode if isinstance(question, GatedEvaluation) else Mode.FULL
        live.kind = "draft" if mode.drafts else "redone" if inputs == live.drafted else "full"
        live.drafted = inputs if mode is Mode.CHECKED else ()
        planning = time.perf_counter()
        bucket = self._within(ambient, lambda: self.packer.bucket(question))  # which may try the model
        lane = Lane.DRAFT if mode.drafts else Lane.FULL
        named = ("alone", index) if bucket is None else (ambient, bucket)
        self.scheduler.post(index, lane, named, rows=question.rows, step=step)
        self.records.planning += time.perf_counter() - planning

    def _take_component(self, index: int, call: Call, ambient: Ambient) -> None:
        live, planning = self.live[index], time.perf_counter()
        live.kind = "component"
        bucket = self.components.bucket(call)
        named = ("alone", index) if bucket is None else (ambient, bucket)
        self.scheduler.post(index, Lane.COMPONENT, named, rows=max(1, call.rows), step=live.step + 1)
        self.records.planning += time.perf_counter() - planning

    def _bytes(self, live: Live) -> int:
        """Return the bytes that a request holds between its steps: what it keeps of earlier ones, and its inputs."""
        assert live.caller is not None
        branches = live.caller.branches.values()
        return max(sum(b.bytes() for b in branches), live.caller.costs.peak) + len(branches) * live.inputs

    def futures(self) -> list[Future]:
        """Return the futures of all requests that have not ended."""
        return [*self.queued.values(), *(live.future for live in self.live.values())]

    def abandon(self, error: BaseException) -> None:
        """End every request with an error that none of them has caused."""
        for future in self.futures():
            self.scheduler.end(future.index)
            future.finish(error=error)
        for place in (self.queued, self.live, self._readings, self.meet.asked):
            place.clear()
        self.meet.forget()

    # ---------------------------------------------------------------------------------------------- forwards
    def _run(self, batch: Batch) -> None:
        """Run forwards as one, and answer those who asked."""
        asked = [(t, *self.meet.asked[t.request]) for t in batch.tickets]
        began = time.perf_counter()
        found: list[Any]
        try:
            found = self._answers([question for _, question, _ in asked], asked[0][2])
        except Exception as error:
            if len(asked) > 1:  # one of them is to blame, and it shall fail alone
                for ticket in batch.tickets:
                    self._run(Batch(batch.lane, (ticket,)))
                return
            found = [error]
        seconds = time.perf_counter() - began
        kinds = [self.live[ticket.request].kind for ticket in batch.tickets]
        self.records.ran(batch, kinds, began, seconds, self.scheduler.tick)
        for ticket, answer in zip(batch.tickets, found, strict=True):
            index, share = ticket.request, seconds * ticket.rows / batch.rows
            if isinstance(answer, Exception):
                self._go(index, lambda i=index, e=answer: self.meet.throw(i, e))  # type: ignore[misc]
            else:
                self._go(index, lambda i=index, a=(answer, share): self.meet.answer(i, a))  # type: ignore[misc]

    def _answers(self, questions: Sequence[Any], ambient: Ambient) -> list[Any]:
        if isinstance(questions[0], Plain):
            return [self._within(ambient, questions[0].forward)]
        if isinstance(questions[0], Call):
            found = self._within(ambient, lambda: self.components.run(questions))
            self.scheduler.component = self.components.most
            return list(found)
        return list(self._within(ambient, lambda: self._evaluate(questions)))

    def _evaluate(self, asked: Sequence[Evaluation]) -> list[Any]:
        """Return what each evaluation of a batch gives. Where memory is limited, that of each new kind is measured."""
        first = asked[0]
        kind = first.kind, kind_of(first.arguments, None)
        if self.scheduler.memory is None or kind in self._measured or isinstance(first, GatedEvaluation):
            return self.packer.run(asked)
        self._measured.add(kind)
        with Peak() as peak:
            found = self.packer.run(asked)
        self.scheduler.forward = max(self.scheduler.forward, peak.most // sum(a.rows for a in asked))
        return found

    def _within(self, ambient: Ambient, what: Callable[[], Any]) -> Any:
        """Call `what` with the settings of the request that has asked: whether gradients are recorded, and autocast."""
        here = Ambient.here(self.meet.devices)
        ambient.restore()
        try:
            return what()
        finally:
            here.restore()

    def _read(self) -> None:
        """Read the numbers that requests wait for, all at once, and answer."""
        if not self._readings:
            return
        readings, self._readings = self._readings, {}
        with torch.no_grad():
            numbers = torch.cat([r.numbers.detach().reshape(-1).float() for r in readings.values()]).tolist()
        self.records.reads += 1
        at = 0
        for index, reading in readings.items():
            count = reading.numbers.numel()
            answer, at = numbers[at : at + count], at + count
            self._go(index, lambda i=index, a=(answer, 0.0): self.meet.answer(i, a))  # type: ignore[misc]


def _bytes_of_inputs(asked: Evaluation) -> int:
    """Bytes of the inputs of a call, and of the corrections that may be pending, which are as large as its sample."""
    given = [v for v in asked.arguments.values() if isinstance(v, torch.Tensor)]
    pending = 4 * given[0].numel() if given else 0  # kept from the first correction on
    return sum(v.numel() * v.element_size() for v in given) + pending
