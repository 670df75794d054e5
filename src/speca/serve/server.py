"""All that one server holds: its models, what is under way, its jobs and its counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..engine import Engine
from ..errors import nearest
from .backend import Backend
from .faults import Fault, closing, wrong
from .jobs import JobStore
from .metrics import Metrics
from .running import Running
from .settings import ServerConfig
from .workers import Workers

log = logging.getLogger("speca.serve")


class Server:
    """The state of one server.

    Attributes:
        config: its settings.
        keys: API keys; empty where none is asked for.
        backends: the models, by the name that clients use.
        running: requests under way.
        jobs: durable requests.
        workers: runs the jobs.
        metrics: counts.
    """

    def __init__(self, config: ServerConfig, pipes: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            config: the settings.
            pipes: pipelines that are at hand already, by the name of their model; the others are loaded in `start`.

        Raises:
            ConfigError: the file of API keys cannot be read.
            OSError: the folder of jobs cannot be written.
        """
        self.config, self.keys = config, config.keys()
        models = [config.of_model(model) for model in config.models]
        self.backends = {m.served_name: Backend(m, config.limits) for m in models}
        self._pipes = dict(pipes or {})
        self.running = Running(config.limits.per_key)
        self.jobs = JobStore(config.jobs, config.keep_s)
        self.metrics = Metrics(self.engines)
        self.workers = Workers(self.jobs, self.backend, self.metrics, config.limits.upload_pixels)
        self._loader = ThreadPoolExecutor(1, "speca-load")
        self._tasks: list[asyncio.Task[None]] = []

    def engines(self) -> Iterator[tuple[str, Engine]]:
        """Return name and engine of all models that are loaded."""
        for name, backend in self.backends.items():
            if backend.engine is not None:
                yield name, backend.engine

    def backend(self, name: str | None) -> Backend:
        """Return a model that is ready; without a name the only one.

        Raises:
            Fault: 404 for an unknown model, 400 where one has to be named, 503 while it is being loaded.
        """
        if name is None:
            if len(self.backends) != 1:
                raise wrong(f"name a model; {nearest('', self.backends)}", "model", "missing_required_parameter")
            name = next(iter(self.backends))
        if name not in self.backends:
            raise Fault(404, f"there is no model {name!r}; {nearest(name, self.backends)}", param="model",
                        code="model_not_found")  # fmt: skip
        self.backends[name].demand_ready()
        return self.backends[name]

    def demand_open(self) -> None:
        """Raise `Fault` 503 while the server ends."""
        if self.running.draining:
            self.metrics.refused.labels("draining").inc()
            raise closing()

    @property
    def ready(self) -> bool:
        """Whether all models are warm and run, and the server does not end."""
        return not self.running.draining and all(b.ready and b.alive for b in self.backends.values())

    async def start(self) -> None:
        """Begin to load the models, one after the other; then take up unfinished jobs."""
        self._tasks = [asyncio.create_task(self._load()), asyncio.create_task(self._expire())]

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()
        if self.config.threads is not None:
            import torch

            torch.set_num_threads(self.config.threads)
        for name in self.backends:
            await loop.run_in_executor(self._loader, self._load_one, name)
        self.workers.resume()

    def _load_one(self, name: str) -> None:
        """Load a model; if that fails, its requests are told why, and the other models are served all the same."""
        try:
            self.backends[name].load(self._pipes.get(name))
            log.info("model is ready", extra={"model": name})
        except Exception as error:
            self.backends[name].error = f"{type(error).__name__}: {error}"
            log.exception("model could not be loaded", extra={"model": name})

    async def _expire(self) -> None:
        while True:
            await asyncio.to_thread(self.jobs.expire)
            await asyncio.sleep(min(60.0, self.config.keep_s))

    async def drain(self, seconds: float) -> None:
        """Take nothing new, and return when nothing is under way; after so many seconds cancel what is."""
        self.running.draining = True
        until = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < until and (self.running.counts or self.workers.busy):
            await asyncio.sleep(0.02)
        self.running.give_up()

    async def stop(self) -> None:
        """Cancel what is under way and end the engines; unfinished jobs are taken up by the next server."""
        self.running.draining = True
        for task in self._tasks:
            task.cancel()
        await self.workers.stop()
        for backend in self.backends.values():
            await asyncio.to_thread(backend.close)
        self._loader.shutdown(wait=False, cancel_futures=True)
        self.jobs.close()
