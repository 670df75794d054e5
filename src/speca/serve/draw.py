"""Run a client's request on an engine: the only place that touches the engine's futures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..engine import Event, Future, Result
from .backend import Backend, Task
from .faults import Fault, busy, of_error
from .metrics import Metrics
from .schema import Asked, Pictures


@dataclass(frozen=True)
class Drawing:
    """A request to be run.

    Attributes:
        backend: the model.
        task: what it shall do.
        request: what the client has asked for.
        pictures: those that came with it.
        metrics: where it is counted.
        most_wait: seconds that it may be expected to wait; None for jobs, which may wait as long as it takes, and let
            all others go first.
    """

    backend: Backend
    task: Task
    request: Asked
    pictures: Sequence[Image.Image]
    metrics: Metrics
    most_wait: float | None

    @property
    def count(self) -> int:
        """How many images or clips."""
        return self.request.n if isinstance(self.request, Pictures) else 1

    def post(self, previews: int = 0) -> list[Future]:
        """Hand all its images to the engine; `previews` of each are wanted.

        Raises:
            Fault: 429 if they would wait too long, 400 if the engine refuses what they ask for.
        """
        engine = self.backend.running
        asked = [self.backend.asked(self.request, self.task, k, self.pictures) for k in range(self.count)]
        if self.request.seed is None:  # one seed was drawn for each; they shall follow each other
            first = asked[0]["generator_seed"]
            asked = [{**one, "generator_seed": first + k} for k, one in enumerate(asked)]
        if self.most_wait is None:
            late = self.request.deadline_s  # a job may take as long as it takes, unless it says otherwise
            asked = [{**one, "priority": self.backend.lowest, "deadline": late} for one in asked]
        futures: list[Future] = []
        with _refusals(self.metrics):
            self._demand_room(asked[0]["priority"])
            try:
                futures.extend(engine.post(**one, preview=previews) for one in asked)
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        return futures

    def _demand_room(self, priority: int) -> None:
        wait = self.backend.running.backlog(priority)
        if self.most_wait is not None and wait > self.most_wait:
            self.metrics.refused.labels("wait").inc()
            text = f"the image would have to wait about {wait:.0f} s, more than {self.most_wait:g} s."
            raise busy(wait - self.most_wait, text)

    async def results(self) -> list[Result]:
        """Return the results of all its images.

        Raises:
            Fault: what one of them failed with; the others are cancelled then, as all are if nobody waits any more.
        """
        events = self.events(self.post())
        async with aclosing(events):
            found = {number: what async for number, what in events if isinstance(what, Result)}
        return [found[number] for number in range(self.count)]

    async def events(self, futures: Sequence[Future]) -> AsyncGenerator[tuple[int, Event | Result], None]:
        """Yield what happens to each image, by its number, and its result at its end; `futures` are those of `post`.

        Raises:
            Fault: what one of them failed with; the others are cancelled then.
        """
        queue: asyncio.Queue[tuple[int, Event | Result | BaseException]] = asyncio.Queue()

        async def follow(number: int, future: Future) -> None:
            try:
                async for event in future.events():
                    if event.kind in ("started", "step"):
                        queue.put_nowait((number, event))
                queue.put_nowait((number, await future))
            except Exception as error:
                queue.put_nowait((number, error))

        async with AsyncExitStack() as stack:
            tasks = [asyncio.create_task(follow(k, future)) for k, future in enumerate(futures)]
            stack.callback(_give_up, futures, tasks, self.metrics)
            left = len(futures)
            while left:
                number, what = await queue.get()
                if isinstance(what, BaseException):
                    raise of_error(what)
                if isinstance(what, Result):
                    left -= 1
                    self.metrics.ended(self.backend.name, what)
                elif what.kind == "step" and what.step == 1 and what.image is None:
                    self.metrics.first_step.labels(self.backend.name).observe(what.time)
                yield number, what


def _give_up(futures: Sequence[Future], tasks: Sequence[asyncio.Task[None]], metrics: Metrics) -> None:
    """Cancel what has not ended, when its client has left or another image of its request has failed."""
    for future, task in zip(futures, tasks, strict=True):
        if not future.done():
            metrics.cancelled.labels("client").inc()
            future.cancel()
        task.cancel()


@contextmanager
def _refusals(metrics: Metrics) -> Iterator[None]:
    """Turn what the engine refuses into a fault."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        fault = of_error(error)
        if fault.status == 429:
            metrics.refused.labels("queue").inc()
        raise fault from error


def told(result: Result) -> dict[str, Any]:
    """Return the `speca` object of an image: what it cost, and which steps were computed in full."""
    sample = result.report.samples[0] if result.report is not None and result.report.samples else None
    found: dict[str, Any] = {
        "seed": result.seed,
        "waited": round(result.waited, 4),
        "seconds": round(result.seconds, 4),
    }
    if sample is None or result.report is None:
        return found
    speedup = result.report.flops_speedup
    return found | {
        "steps": len(sample.decisions), "full": sample.full, "accepted": sample.accepted, "rejected": sample.rejected,
        "decisions": sample.decisions, "flops_speedup": None if speedup is None else round(speedup, 3),
        "notes": list(result.report.notes),
    }  # fmt: skip
