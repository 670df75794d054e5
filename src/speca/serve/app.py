"""The application: the server's state, its routes, and what stands before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from . import faults
from .guard import Guard
from .routes import images, jobs, operation
from .server import Server
from .settings import ServerConfig


def create_app(config: ServerConfig, pipes: Mapping[str, Any] | None = None) -> FastAPI:
    """Return the application of a server.

    Args:
        config: its settings.
        pipes: pipelines that are at hand already, by the name of their model; others are loaded when it starts.

    Raises:
        ConfigError: the file of API keys cannot be read.
        OSError: the folder of jobs cannot be written.
    """
    server = Server(config, pipes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await server.start()
        try:
            yield
        finally:
            await server.stop()

    app = FastAPI(title="speca", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    for router in (images.router, jobs.router, operation.router):
        app.include_router(router)
    if config.playground:
        app.include_router(operation.playground())
    faults.install(app)
    app.add_middleware(Guard, keys=server.keys, body=config.limits.body, metrics=server.metrics)
    if config.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors), allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    return app
