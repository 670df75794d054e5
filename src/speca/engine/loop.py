"""The loop of an engine. In each round it starts requests, runs what they ask for in batches, and answers them."""

from __future__ import annotations

import heapq
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..denoiser.executor import Evaluation
from ..diffusers.caller import Caller
from ..errors import CancelledError, SpecaError
from ..verified.evaluation import GatedEvaluation
from ..verified.gate import Mode
from .beside import Beside
from .components import Call, adopt
from .executor import Compute, Plain, Question, Read, RequestExecutor
from .forwards import Forwards
from .future import Future
from .pace import Pace
from .play import kinds_of, play, report_of
from .preview import decoded
from .records import Kind, Records
from .rendezvous import Ambient, Ended, Rendezvous
from .request import STEPS, arguments_of
from .scheduler import Batch, Lane, Scheduler


@dataclass
class Live:
    """A request that has started.

    Attributes:
        future: whom it is for.
        caller: its copy of the pipeline, with the run that is under way.
        step: index of the last step that it has asked for, -1 before the first.
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
        pace: how long it takes.
        interruptible: whether Ctrl-C in a request is the user's, who drives the loop, and not that request's.
        moved: whether anything happened in the last round.
    """

    pipe: Any
    scheduler: Scheduler
    records: Records = field(default_factory=Records)
    live: dict[int, Live] = field(default_factory=dict)
    queued: dict[int, Future] = field(default_factory=dict)
    cancelled: deque[int] = field(default_factory=deque)  # filled by whoever cancels, from any thread
    interruptible: bool = True
    moved: bool = True

    def __post_init__(self) -> None:
        from ..diffusers.enable import accelerators_of

        self.accelerators = accelerators_of(self.pipe)
        self.meet, self.beside = Rendezvous(kinds_of(self.accelerators)), Beside()
        self.forwards = Forwards(self.scheduler, self.meet.devices)
        self.pace = Pace(int(arguments_of(self.pipe).get(STEPS) or 1))
        self._deadlines: list[tuple[float, int]] = []
        self._readings: dict[int, Read] = {}
        self._shown = -1  # the request whose preview was decoded last
        self._full = 0  # requests that had a full step in this round

    @property
    def busy(self) -> bool:
        """Whether any request is under way or waits to start."""
        return bool(self.live or self.queued)

    @property
    def deadline(self) -> float | None:
        """The next moment, by `time.perf_counter`, at which a request is given up; None if there is none."""
        return self._deadlines[0][0] if self._deadlines else None

    def submit(self, future: Future) -> None:
        """Queue a request, or end it where the scheduler refuses it, or where it was given up meanwhile."""
        request = future.request
        refused: SpecaError | None = future.trouble
        try:
            if refused is None:
                self.scheduler.submit(future.index, size=request.size, priority=request.priority)
        except SpecaError as problem:
            refused = problem
        if refused is not None:
            self.records.ended(future.finish(error=refused))
            return
        self.queued[future.index] = future
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (future.submitted + request.deadline, future.index))
        future.tell("queued")

    def tick(self) -> None:
        """Do one round: cancel requests, start others, run one set of batches, read numbers from the device."""
        began, self.moved, self._full = time.perf_counter(), False, 0
        self._give_up()
        for index, value, error in self.beside.taken():
            self._answer(index, (value, 0.0) if error is None else error)
        admitted = self._planning(self.scheduler.admit)
        for index in admitted:
            self._start(index)
        batches = self._planning(self.scheduler.plan)
        for batch in batches:
            self._run(batch)
        self.moved |= bool(admitted or batches or self._readings)
        self._read()
        if all(batch.lane is Lane.FULL for batch in batches) and not self.scheduler.queue:
            self._show()
        seconds = time.perf_counter() - began
        self.records.ticked(self.scheduler, seconds)
        self.pace.ticked(seconds, self._full)

    def _planning(self, what: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = what()
        self.records.planning += time.perf_counter() - began
        return found

    # ---------------------------------------------------------------------------------------------- requests
    def _give_up(self) -> None:
        """End requests that were cancelled, or whose deadline has passed."""
        now = time.perf_counter()
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            late.append(heapq.heappop(self._deadlines)[1])
        while self.cancelled:
            late.append(self.cancelled.popleft())
        for index in late:
            live = self.live.get(index)
            future = self.queued.get(index) if live is None else live.future
            if future is not None and (trouble := future.trouble) is not None:
                self._stop(index, trouble)

    def _stop(self, index: int, error: CancelledError) -> None:
        self.moved = True
        self._readings.pop(index, None)
        self.beside.drop(index)
        if index in self.queued:
            self.scheduler.end(index)
            self.records.ended(self.queued.pop(index).finish(error=error))
        else:
            self.scheduler.waiting.pop(index, None)
            self._answer(index, error)

    def _start(self, index: int) -> None:
        future = self.queued.pop(index)
        live = self.live[index] = Live(future)
        future.begin()
        self.records.started(future.last.time)

        executor = RequestExecutor(self.meet, self.scheduler)

        def begun(mine: Any, caller: Caller) -> None:
            live.caller = caller
            if self.scheduler.component_batch > 1:
                adopt(mine, self.forwards.components, executor.component, [a.model for a in self.accelerators])

        self._go(
            index, lambda: self.meet.start(index, lambda: play(self.pipe, self.accelerators, future, executor, begun))
        )

    def _answer(self, index: int, answer: Any) -> None:
        """Let a request go on with an answer, or with the exception that it is."""
        self.moved = True
        if isinstance(answer, Exception):
            self._go(index, lambda: self.meet.throw(index, answer))
        else:
            self._go(index, lambda: self.meet.answer(index, answer))

    def _go(self, index: int, onward: Callable[[], None]) -> None:
        """Let a request go on, and take up what it asks for next, or its end."""
        onward()
        while self.meet.ended:
            self._end(self.meet.ended.pop())
        if index in self.meet.asked:
            self._take(index, *self.meet.asked[index])

    def _end(self, ended: Ended) -> None:
        live, error = self.live.pop(ended.key), ended.error
        if live.inputs and error is None:  # one full step may have been all that it asked for
            self.scheduler.weigh(ended.key, self._bytes(live))
        self.scheduler.end(ended.key)
        if isinstance(error, KeyboardInterrupt) and self.interruptible:
            live.future.finish(error=error)
            raise error  # Ctrl-C is not one request's
        output, report = (None, None) if ended.value is None else ended.value
        if report is None and live.caller is not None:
            report = report_of(live.caller, self.accelerators)
        if error is not None and not isinstance(error, Exception):  # which would end the thread that asks for it
            error, cause = (
                RuntimeError(f"the request was ended by {error!r}, which one of its callbacks raised."),
                error,
            )
            error.__cause__ = cause
        result = live.future.finish(output, report, error)
        self.records.ended(result)
        self.pace.ended(result)

    def _take(self, index: int, question: Question, ambient: Ambient) -> None:
        """Sort what a request asks for: numbers to be read, or a forward, which goes to the scheduler."""
        if isinstance(question, Read):
            self._readings[index] = question
        elif isinstance(question, Compute):
            self.beside.start(index, question.function, question.lane)
        elif isinstance(question, Plain):
            self.live[index].kind = "full"
            self.scheduler.post(index, Lane.FULL, ("alone", index), step=-1)
        elif isinstance(question, Call):
            self._take_component(index, question, ambient)
        else:
            self._take_evaluation(index, question, ambient)

    def _take_evaluation(self, index: int, question: Evaluation, ambient: Ambient) -> None:
        live, step = self.live[index], question.step
        live.future.reach(step, question.total)
        if step > live.step:
            live.step = step
            if self.scheduler.memory is not None:
                live.inputs = _bytes_of_inputs(question)
                if step >= 1:
                    self.scheduler.weigh(index, self._bytes(live))
        inputs = tuple(id(value) for value in question.arguments.values())
        mode = question.mode if isinstance(question, GatedEvaluation) else Mode.FULL
        live.kind = "draft" if mode.drafts else "redone" if inputs == live.drafted else "full"
        live.drafted = inputs if mode is Mode.CHECKED else ()
        bucket = self._planning(lambda: self.forwards.bucket(question, ambient))
        lane = Lane.DRAFT if mode.drafts else Lane.FULL
        named = ("alone", index) if bucket is None else (ambient, bucket)
        self.scheduler.post(index, lane, named, rows=question.rows, step=step)

    def _take_component(self, index: int, call: Call, ambient: Ambient) -> None:
        live = self.live[index]
        live.kind = "component"
        bucket = self._planning(lambda: self.forwards.components.bucket(call))
        named = ("alone", index) if bucket is None else (ambient, bucket)
        self.scheduler.post(index, Lane.COMPONENT, named, rows=max(1, call.rows), step=live.step + 1)

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
            self.beside.drop(future.index)
            future.finish(error=error)
        for place in (self.queued, self.live, self._readings, self.meet.asked):
            place.clear()
        self.meet.forget()

    # ---------------------------------------------------------------------------------------------- forwards
    def _run(self, batch: Batch) -> None:
        """Run forwards as one, and answer those who asked. A batch that fails is halved: it may have been too large, or
        one of it is to blame, which shall fail alone."""
        asked = [(t, *self.meet.asked[t.request]) for t in batch.tickets]
        began, found = time.perf_counter(), list[Any]()
        problem: Exception | None = None
        try:
            found = self.forwards.answers([question for _, question, _ in asked], asked[0][2])
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold what the next try needs room for
            problem = error
        if problem is not None and len(asked) > 1:
            del asked
            middle = len(batch.tickets) // 2
            for part in (batch.tickets[:middle], batch.tickets[middle:]):
                self._run(Batch(batch.lane, part))
            return
        if problem is not None:
            found = [problem]
        seconds = time.perf_counter() - began
        kinds = [self.live[ticket.request].kind for ticket in batch.tickets]
        self.records.ran(batch, kinds, began, seconds, self.scheduler.tick)
        self._full += len(batch.tickets) * (batch.lane is Lane.FULL)
        for ticket, answer in zip(batch.tickets, found, strict=True):
            share = seconds * ticket.rows / batch.rows
            self._answer(ticket.request, answer if isinstance(answer, Exception) else (answer, share))

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
            self._answer(index, (answer, 0.0))

    def _show(self) -> None:
        """Decode one preview, of each request in turn."""
        waiting = [index for index, live in self.live.items() if live.future.shown is not None]
        if not waiting:
            return
        self._shown = min(waiting, key=lambda index: (index <= self._shown, index))
        future = self.live[self._shown].future
        shown, future.shown = future.shown, None
        if shown is None or not future.heard:
            return
        step, clean = shown
        pipe = self.pipe if future.request.pipe is None else future.request.pipe
        if (image := decoded(pipe, clean, future.request.arguments)) is not None:
            future.tell("step", step, future.last.total, image=image)


def _bytes_of_inputs(asked: Evaluation) -> int:
    """Bytes of the inputs of a call, and of the corrections that may be pending, which are as large as its sample."""
    given = [v for v in asked.arguments.values() if isinstance(v, torch.Tensor)]
    pending = 4 * given[0].numel() if given else 0  # kept from the first correction on
    return sum(v.numel() * v.element_size() for v in given) + pending
