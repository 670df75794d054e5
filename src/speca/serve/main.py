"""Runs the server in this process until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType

import uvicorn

from .app import create_app
from .logs import configure
from .protocol import Impatient
from .server import Server
from .settings import ServerConfig

log = logging.getLogger("speca.serve")


class _Draining(uvicorn.Server):
    """Ends in two steps: the first signal lets requests under way finish, the second one does not."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._speca, self._draining = server, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn at SIGINT and SIGTERM."""
        if self._draining:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        grace = self._speca.config.grace_s
        log.info("ending", extra={"signal": signal.Signals(sig).name, "grace_s": grace})
        asyncio.get_event_loop().call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain(grace)))

    async def _drain(self, grace: float) -> None:
        await self._speca.drain(grace)
        self.should_exit = True


def run(config: ServerConfig) -> None:
    """Serve until SIGINT or SIGTERM; then take nothing new, finish what is under way within `grace_s`, and return."""
    configure(config.log)
    app = create_app(config)
    settings = uvicorn.Config(
        app, host=config.host, port=config.port, log_config=None, access_log=False, timeout_graceful_shutdown=2,
        server_header=False, http=Impatient,
    )  # fmt: skip
    _Draining(settings, app.state.server).run()
