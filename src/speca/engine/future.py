"""What a request gives to its user: a future, the events that tell of its progress, and the result."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import CancelledError
from ..reports.report import Report
from .log import warn
from .request import Request

KEPT = 64
"""Events that are kept for a consumer of `Future.events` that does not fetch them; older ones are dropped."""

ENDS = ("done", "failed")


@dataclass(frozen=True)
class Event:
    """Something that happened to a request.

    Attributes:
        kind: "queued", "started", "step", "done" or "failed".
        index: the number of the request.
        time: seconds since it was submitted.
        step, total: how many steps of the sampler are done, computed in full or drafted, and how many there are (0
            until known).
        error: why it failed.
        clean: after a step of a request with `preview=True`, the scheduler's prediction of the finished sample:
            latents as the pipeline holds them.
        image: with `preview=N`, that prediction of an earlier step as the pipeline would return it; `step` is
            the step that it belongs to. It comes in events of its own.
    """

    kind: Literal["queued", "started", "step", "done", "failed"]
    index: int
    time: float
    step: int = 0
    total: int = 0
    error: BaseException | None = None
    clean: torch.Tensor | None = None
    image: Any = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a request has given, or why it failed.

    Attributes:
        index: its number, counted from 0 in the order of submission to one `generate` or engine.
        id: the name that the user gave it.
        output: what the pipeline returned, None if it failed.
        report: which steps were forecast and what that saved; None where no step was taken.
        error: why it failed, with its traceback.
        seed: the seed of its random generator.
        waited, seconds: seconds from submission to its start, and from there to its end.
    """

    index: int
    id: Any = None
    output: Any = None
    report: Report | None = None
    error: BaseException | None = None
    seed: int | None = None
    waited: float = 0.0
    seconds: float = 0.0

    @property
    def images(self) -> Any:
        """The pipeline's images. Raises the request's error if it failed."""
        return self._part("images")

    @property
    def frames(self) -> Any:
        """The pipeline's frames. Raises the request's error if it failed."""
        return self._part("frames")

    def _part(self, name: str) -> Any:
        if self.error is not None:
            raise self.error
        if not hasattr(self.output, name):
            raise AttributeError(f"the pipeline's output has no {name}; see result.output.")
        return getattr(self.output, name)


class Future:
    """A request on its way. Await it, or ask for `result()`; both raise what it failed with.

    A task that is cancelled while it awaits a future cancels that request, and no other.
    """

    def __init__(self, index: int, request: Request, notify: Callable[[Event], None] | None = None) -> None:
        self.index, self.request = index, request
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.last = Event("queued", index, 0.0)
        self.wake: Callable[[], None] = lambda: None
        self.shown: tuple[int, torch.Tensor] | None = None  # the newest step to be decoded, and its predicted sample
        self._cancelled = False
        self._lock = threading.Lock()  # of `last` and the listeners, which belong together
        self._listeners = [] if notify is None else [notify]
        self._done: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._done.set_running_or_notify_cancel()  # so that nobody who waits for it can cancel it and spoil its end

    def cancel(self) -> None:
        """Give the request up, at the latest one tick from now. Harmless when it has ended."""
        self._cancelled = True
        self.wake()

    def done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self._done.done()

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result, at most `timeout` seconds.

        Raises:
            Exception: what the request failed with; `CancelledError` if it was cancelled or its deadline passed,
                `NonFiniteError` if what it gives holds NaN or infinity.
            TimeoutError: it has not ended yet.
        """
        return _good(self._done.result(timeout))

    def __await__(self) -> Generator[Any, None, Result]:
        try:
            result = yield from asyncio.wrap_future(self._done).__await__()
        except (asyncio.CancelledError, GeneratorExit):  # who waited has left, or its event loop has ended
            self.cancel()
            raise
        return _good(result)

    @property
    def progress(self) -> float:
        """The share of its steps that are done, from 0 to 1."""
        return 1.0 if self.done() else self.last.step / self.last.total if self.last.total else 0.0

    @property
    def report(self) -> Report | None:
        """Which steps were forecast and what that saved; None until the request has ended."""
        return self._done.result().report if self.done() else None

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens to the request from now on, until it ends.

        Of events that are not fetched the last ones are kept, the end among them. Leaving the loop changes nothing
        for the request.
        """
        loop, arrived, kept = asyncio.get_running_loop(), asyncio.Event(), deque[Event](maxlen=KEPT)

        def listen(event: Event) -> None:
            kept.append(event)
            if len(kept) > 1:  # then its consumer has been woken already
                return
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the event loop has ended, and its consumer with it
                self._leave(listen)

        with self._lock:
            self._listeners.append(listen)
            event = self.last
        try:
            yield event
            while event.kind not in ENDS:
                await arrived.wait()
                arrived.clear()
                while kept and event.kind not in ENDS:
                    event = kept.popleft()
                    yield event
        finally:
            self._leave(listen)

    # ---------------------------------------------------------------------------------------- for the engine
    @staticmethod
    def wait(futures: Iterable[Future]) -> None:
        """Wait until one of these futures has ended."""
        concurrent.futures.wait([f._done for f in futures], return_when=concurrent.futures.FIRST_COMPLETED)

    def on_end(self, call: Callable[[], None]) -> None:
        """Call a function once the request has ended, at once if it has."""
        self._done.add_done_callback(lambda _: call())

    @property
    def heard(self) -> bool:
        """Whether anybody listens to its events."""
        return bool(self._listeners)

    @property
    def trouble(self) -> CancelledError | None:
        """Why it must not go on: it was cancelled, or its deadline has passed; else None."""
        if self._cancelled:
            return CancelledError("the request was cancelled.")
        deadline = self.request.deadline
        if deadline is not None and time.perf_counter() >= self.submitted + deadline:
            return CancelledError(f"the deadline of {deadline} s has passed.")
        return None

    def begin(self) -> None:
        """Note that the request has started."""
        self.started = time.perf_counter()
        self.tell("started")

    def tell(self, kind: Literal["queued", "started", "step"], step: int = 0, total: int = 0, **more: Any) -> None:
        """Tell all who listen that something happened; `more` are other fields of the event."""
        self._tell(Event(kind, self.index, time.perf_counter() - self.submitted, step, total, **more))

    def reach(self, step: int, total: int) -> None:
        """Note that so many steps are done, and tell of it if that is new."""
        if step > self.last.step:
            self.tell("step", step, total)
        elif total != self.last.total:
            self.last = dataclasses.replace(self.last, total=total)

    def finish(self, output: Any = None, report: Report | None = None, error: BaseException | None = None) -> Result:
        """Note that the request has ended, with its output or an error. One that had ended stays as it is."""
        now = time.perf_counter()
        began = now if self.started is None else self.started
        result = Result(
            index=self.index, id=self.request.id, output=output, report=report, error=error, seed=self.request.seed,
            waited=began - self.submitted, seconds=now - began,
        )  # fmt: skip
        try:
            self._done.set_result(result)
        except concurrent.futures.InvalidStateError:
            return self.outcome
        self.shown, last = None, self.last
        self._tell(Event("failed" if error else "done", self.index, now - self.submitted, last.step, last.total, error))
        return result

    @property
    def outcome(self) -> Result:
        """The result of a request that has ended, also of one that failed."""
        return self._done.result()

    def _tell(self, event: Event) -> None:
        with self._lock:
            if event.image is None:  # one with a picture tells of a step that is past
                self.last = event if event.clean is None else dataclasses.replace(event, clean=None)
            listeners = list(self._listeners)
        for listener in listeners:
            self._call(listener, event)

    def _call(self, listener: Callable[[Event], None], event: Event) -> None:
        try:
            listener(event)
        except BaseException as error:  # an event loop that is gone, or a defect of a callback: no request suffers
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise
            self._leave(listener)
            warn(f"a listener of request {self.index} raised {error!r}; it gets no more events.")

    def _leave(self, listener: Callable[[Event], None]) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)


def _good(result: Result) -> Result:
    if result.error is not None:
        raise result.error
    return result
