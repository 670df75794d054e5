"""A server in a thread of the test's process, on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from speca.serve.app import create_app
from speca.serve.server import Server
from speca.serve.settings import ServerConfig


@dataclass(frozen=True)
class Served:
    """A server that runs: its address and its state."""

    url: str
    server: Server


@contextmanager
def serving(config: ServerConfig, pipes: Mapping[str, Any] | None = None, seconds: float = 120) -> Iterator[Served]:
    """Run a server until the block ends; inside, its models are ready."""
    app = create_app(config, pipes)
    runner = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=runner.run, name="uvicorn")
    thread.start()
    try:
        server: Server = app.state.server
        until = time.monotonic() + seconds
        while not (runner.started and server.ready):
            errors = [backend.error for backend in server.backends.values() if backend.error]
            assert not errors, errors
            assert time.monotonic() < until and thread.is_alive(), "the server did not become ready"
            time.sleep(0.01)
        port = runner.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", server)
    finally:
        runner.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
