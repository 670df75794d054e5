"""Runs jobs: videos, and images that need not be waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from ..engine import Result
from .backend import Backend
from .draw import Drawing, told
from .faults import of_error
from .jobs import Job, JobStore
from .metrics import Metrics
from .pictures import clip, decode, encode
from .schema import Asked, EditRequest, ImageRequest, Pictures, VideoRequest

AT_ONCE = 8
"""Jobs that are handed to the engines at a time; they have the lowest priority there."""

TOLD_S = 0.5
"""Seconds between two notes of a job's progress."""

SHAPES: dict[str, type[Asked]] = {"video": VideoRequest, "image": ImageRequest, "edit": EditRequest}
"""Which form the request of a job has, by its `form`."""


class Workers:
    """The jobs that run, and those that wait for their turn."""

    def __init__(self, jobs: JobStore, backend: Callable[[str], Backend], metrics: Metrics, upload_pixels: int) -> None:
        """
        Args:
            jobs: where they are kept.
            backend: returns a model by its name, or raises `Fault`.
            metrics: where they are counted.
            upload_pixels: most pixels of a picture that came with a job.
        """
        self._jobs, self._backend, self._metrics, self._pixels = jobs, backend, metrics, upload_pixels
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turn: asyncio.Semaphore | None = None

    @property
    def busy(self) -> bool:
        """Whether any job has not ended."""
        return bool(self._tasks)

    def count(self, caller: str) -> int:
        """Return how many jobs of a caller have not ended."""
        return sum(job.caller == caller for job in self._jobs.unfinished())

    def resume(self) -> None:
        """Take up the jobs that an earlier server has left unfinished."""
        for job in self._jobs.unfinished():
            self.begin(job)

    def begin(self, job: Job) -> None:
        """Run a job when its turn comes."""
        if job.id not in self._tasks:
            task = self._tasks[job.id] = asyncio.get_running_loop().create_task(self._run(job))
            task.add_done_callback(lambda _: self._tasks.pop(job.id, None))

    async def delete(self, job: Job) -> None:
        """Cancel a job that has not ended, and forget it."""
        if (task := self._tasks.get(job.id)) is not None:
            task.cancel()
            self._metrics.cancelled.labels("deleted").inc()
        await asyncio.to_thread(self._jobs.delete, job.id)

    async def stop(self) -> None:
        """Cancel the jobs that run; they stay unfinished."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: Job) -> None:
        if self._turn is None:
            self._turn = asyncio.Semaphore(AT_ONCE)
        async with self._turn:
            try:
                await asyncio.to_thread(self._jobs.change, job.id, status="in_progress", started=time.time())
                files, found = await self._results(job)
                await asyncio.to_thread(self._jobs.keep, job.id, files, found)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                body = of_error(error).body["error"]
                change = dict(status="failed", ended=time.time(), error=body)
                await asyncio.to_thread(self._jobs.change, job.id, **change)

    async def _results(self, job: Job) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
        """Draw what a job asks for: files by name, and what is told of each."""
        backend = self._backend(job.model)
        form = job.request["form"]
        request = SHAPES[form].model_validate(job.request["fields"])
        uploads = await asyncio.to_thread(self._jobs.uploads, job)
        pictures = [decode(data, self._pixels, "image") for data in uploads]
        drawing = Drawing(backend, backend.task_of(request, len(pictures)), request, pictures, self._metrics, None)
        results: dict[int, Result] = {}
        shares = [0.0] * drawing.count
        told_at = 0.0
        async with aclosing(drawing.events(drawing.post())) as events:
            async for number, what in events:
                if isinstance(what, Result):
                    results[number] = what
                elif what.total:
                    shares[number] = what.step / what.total
                    if (now := time.monotonic()) - told_at > TOLD_S:
                        told_at = now
                        await asyncio.to_thread(self._jobs.change, job.id, progress=sum(shares) / len(shares))
        ordered = [results[k] for k in sorted(results)]
        return await asyncio.to_thread(_files, request, ordered), [told(result) for result in ordered]


def _files(request: Asked, results: list[Result]) -> dict[str, bytes]:
    """The files of the results: a clip, or a picture of each."""
    if isinstance(request, VideoRequest):
        return {"video.mp4": clip(results[0].frames[0], request.fps)}
    assert isinstance(request, Pictures)
    form, pressed = request.output_format, request.output_compression
    return {f"image-{k}.{form}": encode(result.images[0], form, pressed) for k, result in enumerate(results)}
