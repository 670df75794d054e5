"""Requests of an engine, the results they give, and the events that tell of their progress."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import inspect
import time
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import Config, SpecaConfig
from ..errors import InputError, nearest
from ..reports.report import Report

SETTINGS = ("preset", "tolerance", "speedup", "threshold", "settings")
OWN = (*SETTINGS, "generator_seed", "scheduler", "priority", "deadline", "preview", "id")
"""What a request may say besides the arguments of the pipeline."""


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
        preview: whether the event of each step carries a prediction of the finished sample.
        id: a name that the user gives it.
    """

    arguments: dict[str, Any]
    config: Config
    seed: int | None
    scheduler: Any = None
    priority: int = 0
    deadline: float | None = None
    preview: bool = False
    id: Any = None

    @classmethod
    def build(cls, asked: Mapping[str, Any], accepted: Iterable[str], config: Config) -> Request:
        """Return the request for some arguments: those of the pipeline, named in `accepted`, and those of `OWN`.

        A request without generator or seed is given a seed from torch's global generator.

        Raises:
            InputError: an argument that the pipeline does not take, or a deadline, priority or seed out of range.
            ConfigError: a wrong setting.
        """
        own = {n: v for n, v in asked.items() if n in OWN}
        arguments = {n: v for n, v in asked.items() if n not in OWN}
        names = list(accepted)
        for name in arguments:
            if name not in names:
                raise InputError(f"the pipeline takes no argument {name!r}; {nearest(name, [*names, *OWN])}")
        overrides = {n: own[n] for n in ("tolerance", "speedup", "threshold") if own.get(n) is not None}
        base = own["preset"] if own.get("preset") is not None else config
        seed, deadline, priority = own.get("generator_seed"), own.get("deadline"), own.get("priority", 0)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
            raise InputError(f"generator_seed={seed!r} is out of range; use a whole number from 0 to 2^63 - 1.")
        if seed is not None and arguments.get("generator") is not None:
            raise InputError("give either generator or generator_seed, not both.")
        if deadline is not None and not deadline > 0:
            raise InputError(f"deadline={deadline!r} is out of range; it is in seconds from now, more than 0.")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InputError(f"priority={priority!r} must be a whole number.")
        if seed is None and arguments.get("generator") is None:
            seed = int(torch.randint(2**31, ()).item())
        return cls(
            arguments=arguments,
            config=SpecaConfig.build(base, **{**overrides, **own.get("settings", {})}),
            seed=seed,
            scheduler=own.get("scheduler"),
            priority=priority,
            deadline=deadline,
            preview=bool(own.get("preview", False)),
            id=own.get("id"),
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
        """Return what is equal for requests that need equal memory: numbers, options, shapes of tensors."""
        c = self.config
        kept = (c.prior, c.corrector, c.speedup) if isinstance(c, SpecaConfig) else c.history_dtype
        parts: list[object] = [type(c), c.anchors, kept, type(self.scheduler)]
        for name, value in sorted(self.arguments.items()):
            if isinstance(value, torch.Tensor):
                parts.append((name, tuple(value.shape), value.dtype))
            elif isinstance(value, (list, tuple)):
                parts.append((name, len(value)))
            elif isinstance(value, (int, bool, type(None))):
                parts.append((name, value))
        return tuple(parts)


def arguments_of(pipe: Any) -> list[str]:
    """Return the names of the arguments that the pipeline's `__call__` takes."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in parameters.items() if p.kind in kinds and name != "self"]


@dataclass(frozen=True)
class Event:
    """Something that happened to a request.

    Attributes:
        kind: "queued", "started", "step", "done" or "failed".
        index: the number of the request.
        time: seconds since it was submitted.
        step, total: how many steps have begun, and how many there are (0 until known).
        error: why it failed.
        clean: after a step of a request with `preview`, the scheduler's prediction of the finished sample:
            latents as the pipeline holds them.
    """

    kind: Literal["queued", "started", "step", "done", "failed"]
    index: int
    time: float
    step: int = 0
    total: int = 0
    error: BaseException | None = None
    clean: torch.Tensor | None = None


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
    """A request on its way. Await it, or ask for `result()`; both raise what it failed with."""

    def __init__(self, index: int, request: Request, notify: Callable[[Event], None] | None = None) -> None:
        self.index, self.request = index, request
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.last = Event("queued", index, 0.0)
        self._done: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._listeners = [] if notify is None else [notify]
        self.wake: Callable[[], None] = lambda: None
        if notify is not None:
            notify(self.last)

    def cancel(self) -> None:
        """Give the request up, at the latest one tick from now. Harmless when it has ended."""
        self.wake()

    def done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self._done.done()

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result, at most `timeout` seconds.

        Raises:
            Exception: what the request failed with; `CancelledError` if it was cancelled or its deadline passed.
            TimeoutError: it has not ended yet.
        """
        return _good(self._done.result(timeout))

    def __await__(self) -> Generator[Any, None, Result]:
        return _good((yield from asyncio.wrap_future(self._done).__await__()))

    @property
    def progress(self) -> float:
        """The share of its steps that have begun, from 0 to 1."""
        return 1.0 if self.done() else self.last.step / self.last.total if self.last.total else 0.0

    @property
    def report(self) -> Report | None:
        """Which steps were forecast and what that saved; None until the request has ended."""
        return self._done.result().report if self.done() else None

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens to the request from now on, until it ends."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        self._listeners.append(listen)
        event = self.last
        yield event
        while event.kind not in ("done", "failed"):
            event = await queue.get()
            yield event

    # ---------------------------------------------------------------------------------------- for the engine
    @staticmethod
    def wait(futures: Iterable[Future]) -> None:
        """Wait until one of these futures has ended."""
        concurrent.futures.wait([f._done for f in futures], return_when=concurrent.futures.FIRST_COMPLETED)

    def begin(self) -> None:
        """Note that the request has started."""
        self.started = time.perf_counter()
        self.tell("started")

    def tell(self, kind: Literal["started", "step"], step: int = 0, total: int = 0) -> None:
        """Tell all who listen that something happened."""
        self._tell(Event(kind, self.index, time.perf_counter() - self.submitted, step, total))

    def show(self, clean: torch.Tensor) -> None:
        """Send an event with the predicted clean sample of the last step."""
        last = self.last
        now = time.perf_counter() - self.submitted
        self._tell(Event("step", self.index, now, last.step, last.total, clean=clean))

    def finish(self, output: Any = None, report: Report | None = None, error: BaseException | None = None) -> Result:
        """Note that the request has ended, with its output or an error."""
        now = time.perf_counter()
        began = now if self.started is None else self.started
        result = Result(
            index=self.index, id=self.request.id, output=output, report=report, error=error, seed=self.request.seed,
            waited=began - self.submitted, seconds=now - began,
        )  # fmt: skip
        self._done.set_result(result)
        last = self.last
        self._tell(Event("failed" if error else "done", self.index, now - self.submitted, last.step, last.total, error))
        return result

    @property
    def outcome(self) -> Result:
        """The result of a request that has ended, also of one that failed."""
        return self._done.result()

    def _tell(self, event: Event) -> None:
        self.last = event if event.clean is None else dataclasses.replace(event, clean=None)
        for listener in list(self._listeners):
            self._call(listener, event)

    def _call(self, listener: Callable[[Event], None], event: Event) -> None:
        try:
            listener(event)
        except Exception as error:  # an event loop that is gone, or a defect of a callback: no request suffers
            self._listeners.remove(listener)
            text = f"speca: a listener of request {self.index} raised {error!r}; it gets no more events."
            warnings.warn(text, stacklevel=2)


def _good(result: Result) -> Result:
    if result.error is not None:
        raise result.error
    return result
