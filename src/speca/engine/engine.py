"""The class `Engine`: `generate` runs a list of requests, `submit` and `post` take one request at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..config import Config, SpecaConfig
from ..denoiser.executor import Executor
from ..diffusers.accelerator import Accelerator
from ..errors import ConfigError, InputError, QueueFullError, nearest
from .driver import Driver
from .future import Event, Future, Result
from .loop import Loop
from .play import play
from .records import plot
from .request import Request, arguments_of
from .scheduler import Scheduler
from .turn import Direct

MODES = ("continuous", "lock-step", "one-at-a-time")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
AHEAD = 2
"""`generate` keeps as many requests queued as may be live, times this."""
_DRIVERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Driver]] = weakref.WeakKeyDictionary()
"""Of the engine of each model: two would run it at the same time."""


class Engine:
    """Runs many requests of one pipeline together, each with settings of its own, and each as it would run alone.

        engine = speca.Engine(pipe, max_batch=16, memory="8GiB")
        for result in engine.generate([dict(prompt="a red apple", generator_seed=7), dict(prompt="a boat", speedup=4)]):
            result.images[0].save(f"{result.index}.png")

        future = await engine.submit(prompt="a red apple", num_inference_steps=50, generator_seed=7)
        result = await future

    A request is a dictionary of the pipeline's own arguments, and of `preset`, `tolerance`, `speedup`, `threshold` or
    `settings` (any fields of `SpecaConfig`), `generator_seed`, `scheduler`, `priority`, `deadline` (seconds),
    `preview` (True for latents at each step, or how many images), `id`, and `pipe`: another pipeline of the same
    models, such as `StableDiffusionImg2ImgPipeline.from_pipe(pipe)`, whose requests run together with the others.

    The pipeline is accelerated as by `speca.enable` until `close`. A direct call of it runs its model between the
    rounds of the engine, and slows it; it is refused if a round takes longer than a minute.
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
            max_queue: most requests that wait because they cannot start at once; one more is refused. 0: none may
                wait. Default: no limit.
            memory: what all requests under way may hold together, in bytes or as "8GiB". Default: no limit.
            mode: "continuous"; "lock-step": requests start in batches and stay at one step, each with its own
                decisions; "one-at-a-time": a plain loop over the pipeline, without batches.
            on_event: called with what happens to each request, in the thread that runs the engine.

        Raises:
            ConfigError: a value out of range, no greenlet, no pipeline, one that offloads whole models, or one that has
                an engine already.
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
        _demand_free(pipe)
        enabled = not accelerators_of(pipe)
        if enabled:
            enable(pipe, self.config)
        self._loop, self._names, self._on_event = Loop(pipe, scheduler), arguments_of(pipe), on_event
        self._driver = Driver(self._loop, partial(_released, pipe, self._loop.accelerators, enabled))
        self._numbers = itertools.count()
        weakref.finalize(self, self._driver.leave).atexit = False
        for accelerator in self._loop.accelerators:
            _DRIVERS[accelerator.model] = weakref.ref(self._driver)
            accelerator.caller(pipe).executor = Direct(self._driver.turn)

    # ---------------------------------------------------------------------------------------------- requests
    def generate(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[Result]:
        """Run requests, and yield each result when it is there. One that failed has an `error`; the others go on.

        `requests` may be endless: as many are taken as are needed. Leaving the loop early cancels the rest.

        Raises:
            InputError, ConfigError: a request asks for what cannot be; those before it are finished first.
            EngineClosedError: the engine was closed, or takes no more requests.
        """
        self._driver.demand_open()
        if self.mode == "one-at-a-time":
            for number, asked in enumerate(requests):
                yield self._alone(Future(number, self._request(asked), self._on_event))
            return
        feed = _Feed(enumerate(requests), self._room, lambda asked: self._take(self._request(asked), thread=False))
        try:
            while feed.fill():
                self._driver.advance(feed.futures)
                yield from feed.results()
            if feed.trouble is not None:
                raise feed.trouble
        finally:
            for future in feed.futures:
                future.cancel()
            if feed.futures:
                self._driver.advance(feed.futures)

    async def submit(self, **asked: Any) -> Future:
        """Queue a request and return at once. It runs in a thread of the engine, until `close`.

        Raises:
            QueueFullError: `max_queue` requests wait already; its `retry_after` says for how long.
            InputError, ConfigError: it asks for what cannot be.
            EngineClosedError: the engine was closed, drains, or has failed.
        """
        await asyncio.sleep(0)
        return self.post(**asked)

    def post(self, **asked: Any) -> Future:
        """`submit` for code that is not asynchronous."""
        if self.mode == "one-at-a-time":
            raise ConfigError("mode 'one-at-a-time' is a plain loop; use engine.generate, or another mode.")
        return self._take(self._request(asked), thread=True)

    def warm(self, **asked: Any) -> Result:
        """Run a request like those to come, so that these are not slowed by what is done once: learning from a full
        run, tests of whether calls can be put together, the search for full steps, memory. Returns its result.

        It is run twice at the same time with different seeds, as tests need two requests that meet.

        Raises:
            Exception: what it failed with.
        """
        first = self._request(asked).seed
        twice = [asked] if first is None else [{**asked, "generator_seed": first + n} for n in range(2)]
        results = sorted(self.generate(twice), key=lambda result: result.index)
        for result in results:
            if result.error is not None:
                raise result.error
        return results[0]

    def estimate(self, **asked: Any) -> float:
        """Return about how many seconds a request posted now would take until it is done: the full steps that it and
        those before it need, times what a full step took of late. 0 before anything was measured, see `warm`.

        Raises:
            InputError, ConfigError: it asks for what cannot be.
        """
        return self._loop.pace.estimate(self._request(asked), self._driver.under_way)

    def backlog(self, priority: int = 0) -> float:
        """Return about how many seconds the requests of this priority, or a higher one, that are under way or queued
        still need; 0 before any was measured."""
        return self._loop.pace.backlog(f for f in self._driver.under_way if f.request.priority >= priority)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those under way, at most `timeout` seconds; returns whether all ended."""
        return self._driver.drain(timeout)

    def close(self) -> None:
        """Cancel what is under way, end the thread, and undo `speca.enable`. Harmless when closed; in a callback it
        returns at once, and the engine closes when the round that called it is over."""
        self._driver.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- figures
    @property
    def alive(self) -> bool:
        """Whether the engine goes on: not closed, not broken by a defect, and in the process that made it."""
        return self._driver.alive

    @property
    def statistics(self) -> dict[str, Any]:
        """Return counts since the engine was made: requests, steps, rounds, device reads, waits, and how full the
        batches of drafts, of full steps and of other components were."""
        scheduler = self._loop.scheduler
        now = {"live": scheduler.live, "queued": self._driver.waiting, "bytes": scheduler.bytes}
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
        return ahead if scheduler.max_queue is None else min(ahead, scheduler.max_live + scheduler.max_queue)

    def _request(self, asked: Mapping[str, Any]) -> Request:
        pipe, names = self.pipe, self._names
        if (other := asked.get("pipe")) is not None and other is not pipe:
            parts = getattr(other, "components", {}).values()
            if not all(any(a.model is part for part in parts) for a in self._loop.accelerators):
                raise InputError(
                    f"the {type(other).__name__} of this request has another model than the engine's "
                    f"{type(pipe).__name__}; make it from that: {type(other).__name__}.from_pipe(pipe)."
                )
            pipe, names = other, arguments_of(other)
        if asked.get("scheduler") is not None and "scheduler" not in pipe.components:
            raise InputError(f"{type(pipe).__name__} has no component `scheduler` that could be replaced.")
        return Request.build(asked, names, self.config)

    def _take(self, request: Request, *, thread: bool) -> Future:
        scheduler = self._loop.scheduler

        def check(taken: int) -> None:
            if thread and scheduler.is_full(taken, request.size):
                after = self._loop.pace.until_room(self._driver.under_way)
                raise QueueFullError(
                    f"{taken - scheduler.live} requests are waiting, as many as may; try again in {after:.1f} s.", after
                )

        future = Future(next(self._numbers), request, self._on_event)
        self._driver.take(future, check, thread=thread)
        return future

    def _alone(self, future: Future) -> Result:
        """Run one request by a plain call of the pipeline, with nothing beside it."""
        self._driver.demand_open()
        future.begin()
        try:
            output, report = play(self.pipe, self._loop.accelerators, future, Executor(), lambda mine, caller: None)
        except Exception as error:
            return future.finish(error=error)
        return future.finish(output, report)


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


def _demand_free(pipe: Any) -> None:
    """Refuse a pipeline whose models another engine runs. Raises `ConfigError`."""
    for model in pipe.components.values():
        other = _DRIVERS[model]() if isinstance(model, nn.Module) and model in _DRIVERS else None
        if other is not None and other.alive:
            raise ConfigError(
                f"an engine runs the {type(model).__name__} of this {type(pipe).__name__} already, and two would "
                "disturb each other; post requests to that one, or close it first."
            )


def _released(pipe: Any, accelerators: Sequence[Accelerator], enabled: bool) -> None:
    """Leave the pipeline as it was before its engine, which has `enabled` it or not."""
    from ..diffusers.enable import disable

    for accelerator in accelerators:
        _DRIVERS.pop(accelerator.model, None)
        accelerator.caller(pipe).executor = Executor()
    if enabled:
        disable(pipe)


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
