"""The class `Engine`: `generate` runs a list of requests, `submit` and `post` take one request at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..config import Config, SpecaConfig
from ..denoiser.executor import Executor
from ..errors import ConfigError, InputError, QueueFullError, SpecaError, nearest
from .loop import Loop
from .play import play
from .records import plot
from .request import Event, Future, Request, Result, arguments_of
from .scheduler import Scheduler

MODES = ("continuous", "lock-step", "one-at-a-time")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
AHEAD = 2
"""`generate` keeps as many requests queued as may be live, times this."""


class Engine:
    """Runs many requests of one pipeline together, each with settings of its own, and each as it would run alone.

        engine = speca.Engine(pipe, max_batch=16, memory="8GiB")
        for result in engine.generate([dict(prompt="a red apple", generator_seed=7), dict(prompt="a boat", speedup=4)]):
            result.images[0].save(f"{result.index}.png")

        future = await engine.submit(prompt="a red apple", num_inference_steps=50, generator_seed=7)
        result = await future

    A request is a dictionary of the pipeline's own arguments, and of `preset`, `tolerance`, `speedup`, `threshold` or
    `settings` (any fields of `SpecaConfig`), `generator_seed`, `scheduler`, `priority`, `deadline` (seconds),
    `preview` and `id`.

    The pipeline is accelerated as by `speca.enable` until `close`. It must not be called directly while requests run.
    """

    def __init__(
        self,
        pipe: Any,
        preset: str | Config = "balanced",
        *,
        max_batch: int = 16,
        component_batch: int = 4,
        max_wait: int = 8,
        max_live: int | None = None,
        max_queue: int | None = None,
        memory: int | str | None = None,
        mode: Literal["continuous", "lock-step", "one-at-a-time"] = "continuous",
        on_event: Callable[[Event], None] | None = None,
        **overrides: Any,
    ) -> None:
        """
        Args:
            pipe: a pipeline with one or more diffusion transformers.
            preset, **overrides: settings of requests that bring none, as of `speca.enable`.
            max_batch: most rows that one call of the model may have, 1 or more. An image has two rows where guidance
                computes the conditional and the unconditional output in one call.
            component_batch: the same for text encoders and autoencoders, which need more memory for more rows.
            max_wait: rounds of the engine's loop that a full step waits for others to fill its batch, 0 or more.
            max_live: most requests under way at a time; default four times `max_batch`, one batch in "lock-step".
            max_queue: most requests that wait to start; one more is refused. Default: no limit.
            memory: what all requests under way may hold together, in bytes or as "8GiB". Default: no limit.
            mode: "continuous"; "lock-step": requests start in batches and stay at one step, each with its own
                decisions; "one-at-a-time": a plain loop over the pipeline, without batches.
            on_event: called with what happens to each request, in the thread that runs the engine.

        Raises:
            ConfigError: a value out of range, no greenlet, no pipeline, or one that offloads whole models.
            UnsupportedModelError: the pipeline has no diffusion transformer.
        """
        from ..diffusers.enable import accelerators_of, enable

        if mode not in MODES:
            raise ConfigError(f"mode={mode!r} is not valid; {nearest(mode, MODES)}")
        if isinstance(pipe, nn.Module):
            raise ConfigError(f"an engine runs whole pipelines, not a bare {type(pipe).__name__}; pass the pipeline.")
        if getattr(pipe, "_all_hooks", None):
            raise ConfigError(
                f"{type(pipe).__name__} offloads whole models, which moves them at the end of each call, in the middle "
                "of others; call pipe.remove_all_hooks() first, or use group offloading."
            )
        self.pipe, self.mode, self.config = pipe, mode, SpecaConfig.build(preset, **overrides)
        lockstep = mode == "lock-step"
        scheduler = Scheduler(
            max_batch=max_batch, component_batch=component_batch, max_wait=max_wait, max_queue=max_queue,
            memory=_bytes(memory), lockstep=lockstep,
            max_live=max_live if max_live is not None else max_batch if lockstep else 4 * max_batch,
        )  # fmt: skip
        self._enabled = not accelerators_of(pipe)
        if self._enabled:
            enable(pipe, self.config)
        self._loop, self._names, self._on_event = Loop(pipe, scheduler), arguments_of(pipe), on_event
        self._numbers = itertools.count()
        self._inbox: deque[Future] = deque()
        self._thread: threading.Thread | None = None
        self._condition = threading.Condition()
        self._closing = False

    # ---------------------------------------------------------------------------------------------- requests
    def generate(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[Result]:
        """Run requests, and yield each result when it is there. One that failed has an `error`; the others go on.

        `requests` may be endless: as many are taken as are needed. Leaving the loop early cancels the rest.

        Raises:
            InputError, ConfigError: a request asks for what cannot be; those before it are finished first.
        """
        if self.mode == "one-at-a-time":
            for number, asked in enumerate(requests):
                yield self._alone(Future(number, self._request(asked), self._on_event))
            return
        feed = _Feed(enumerate(requests), self._room, lambda asked: self._submit(self._request(asked)))
        try:
            while feed.fill():
                self._advance(feed.futures)
                yield from feed.results()
            if feed.trouble is not None:
                raise feed.trouble
        finally:
            for future in feed.futures:
                future.cancel()
            if feed.futures:
                self._advance(feed.futures)

    async def submit(self, **asked: Any) -> Future:
        """Queue a request and return at once. It runs in a thread of the engine, until `close`.

        Raises:
            QueueFullError: `max_queue` requests wait already.
            InputError, ConfigError: it asks for what cannot be.
        """
        await asyncio.sleep(0)
        return self.post(**asked)

    def post(self, **asked: Any) -> Future:
        """`submit` for code that is not asynchronous."""
        if self.mode == "one-at-a-time":
            raise ConfigError("mode 'one-at-a-time' is a plain loop; use engine.generate, or another mode.")
        request = self._request(asked)
        self._start_thread()
        return self._submit(request)

    def close(self) -> None:
        """Cancel what is under way, end the thread, and undo `speca.enable`. Harmless when closed."""
        from ..diffusers.enable import disable

        if self._thread is not None:
            with self._condition:
                self._closing = True
                self._condition.notify_all()
            self._thread.join()
            self._thread = None
        elif self._loop.busy or self._inbox:
            self._stop()
        if self._enabled:
            disable(self.pipe)
            self._enabled = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- figures
    @property
    def statistics(self) -> dict[str, Any]:
        """Return counts since the engine was made: requests, steps, rounds, device reads, waits, and how full the
        batches of drafts, of full steps and of other components were."""
        scheduler = self._loop.scheduler
        now = {"live": scheduler.live, "queued": len(scheduler.queue) + len(self._inbox), "bytes": scheduler.bytes}
        return {**now, **self._loop.records.to_dict(scheduler)}

    def timeline(self, path: str | Path, title: str = "") -> None:
        """Write a picture of what each request did when, and how full the batches were (PNG, SVG or PDF)."""
        plot(self._loop.records, self._loop.scheduler.max_batch, path, title)

    # ---------------------------------------------------------------------------------------------- inside
    @property
    def _room(self) -> int:
        """How many requests `generate` takes before the first ends: those that may run, and as many that wait."""
        scheduler = self._loop.scheduler
        ahead = AHEAD * scheduler.max_live
        return ahead if scheduler.max_queue is None else min(ahead, max(1, scheduler.max_queue))

    def _request(self, asked: Mapping[str, Any]) -> Request:
        if asked.get("scheduler") is not None and "scheduler" not in self.pipe.components:
            raise InputError(f"{type(self.pipe).__name__} has no component `scheduler` that could be replaced.")
        return Request.build(asked, self._names, self.config)

    def _submit(self, request: Request) -> Future:
        limit = self._loop.scheduler.max_queue
        waiting = len(self._inbox) + len(self._loop.scheduler.queue)
        if limit is not None and waiting >= max(1, limit):
            raise QueueFullError(f"{waiting} requests are waiting, as many as may; try again later.")
        future = Future(next(self._numbers), request, self._on_event)
        future.wake = lambda: self._cancel(future.index)
        with self._condition:
            self._inbox.append(future)
            self._condition.notify_all()
        return future

    def _cancel(self, index: int) -> None:
        with self._condition:
            self._loop.cancelled.append(index)
            self._condition.notify_all()

    def _advance(self, futures: list[Future]) -> None:
        """Go on until one of the futures may have ended."""
        if self._thread is not None:
            Future.wait(futures)
        else:
            self._tick()

    def _tick(self) -> None:
        while self._inbox:
            future = self._inbox.popleft()
            try:
                self._loop.submit(future)
            except SpecaError as refused:
                future.finish(error=refused)
        self._loop.tick()

    def _alone(self, future: Future) -> Result:
        """Run one request by a plain call of the pipeline, with nothing beside it."""
        future.begin()
        try:
            output, report = play(self.pipe, self._loop.accelerators, future, Executor(), lambda mine, caller: None)
        except Exception as error:
            return future.finish(error=error)
        return future.finish(output, report)

    def _start_thread(self) -> None:
        with self._condition:
            if self._closing:
                raise ConfigError("the engine is closed; make a new one.")
            if self._thread is None and (self._loop.busy or self._inbox):
                raise ConfigError("a loop over engine.generate is under way; finish it first, or submit before it.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="speca-engine", daemon=True)
                self._thread.start()

    def _serve(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._inbox or self._loop.busy or self._closing)
                if self._closing:
                    break
            try:
                self._tick()
            except BaseException as error:  # a defect of the engine: nobody shall wait for ever
                self._loop.abandon(error)
        self._stop()

    def _stop(self) -> None:
        """Cancel all requests, and return when they have ended."""
        for future in [*self._inbox, *self._loop.futures()]:
            future.cancel()
        while self._inbox or self._loop.busy:
            self._tick()


class _Feed:
    """Requests taken from a list as they are needed, and their results in the order in which they end."""

    def __init__(
        self, source: Iterator[tuple[int, Mapping[str, Any]]], room: int, submit: Callable[[Mapping[str, Any]], Future]
    ) -> None:
        self.trouble: Exception | None = None
        self._source, self._room, self._submit = source, room, submit
        self._numbers: dict[Future, int] = {}

    @property
    def futures(self) -> list[Future]:
        """Of requests that have not ended."""
        return list(self._numbers)

    def fill(self) -> bool:
        """Take requests while there is room; whether any is under way. After a wrong one no more are taken."""
        try:
            while self.trouble is None and len(self._numbers) < self._room:
                number, asked = next(self._source)
                self._numbers[self._submit(asked)] = number
        except StopIteration:
            pass
        except Exception as error:  # to be raised when what came before it is done
            self.trouble = error
        return bool(self._numbers)

    def results(self) -> Iterator[Result]:
        """Of those that have ended since."""
        for future in [future for future in self._numbers if future.done()]:
            yield dataclasses.replace(future.outcome, index=self._numbers.pop(future))


def _bytes(memory: int | str | None) -> int | None:
    """Bytes from a number or a text such as "8GiB"."""
    if memory is None or (isinstance(memory, int) and not isinstance(memory, bool)):
        return memory
    text = str(memory).strip()
    unit = next((u for u in sorted(UNITS, key=len, reverse=True) if text.endswith(u)), None)
    try:
        return int(float(text[: -len(unit)]) * UNITS[unit]) if unit else int(text)
    except ValueError:
        raise ConfigError(f"memory={memory!r} is no size; give bytes, or a text such as '8GiB'.") from None
