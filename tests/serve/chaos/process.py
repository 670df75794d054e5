"""A server in a process of its own, which tells what it holds when it is asked on its standard input."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from speca.serve.settings import Limits, ModelConfig, ServerConfig

from .wrong import BODY, BODY_S

ROOT = Path(__file__).resolve().parents[3]
MODELS = ("emoji-flux", "fashion-dit")
GRACE_S = 4.0
"""Seconds after SIGTERM that the server waits for what is under way."""


def settings(folder: Path, port: int) -> ServerConfig:
    """Settings under which no good request is refused, however many come."""
    limits = Limits(steps=250, body=BODY, wait_s=3600, slowdown=1e6, per_key=100_000)
    models = tuple(ModelConfig(model=name) for name in MODELS)
    return ServerConfig(
        models=models, steps=12, jobs=folder, port=port, threads=1, limits=limits, log="json", grace_s=GRACE_S
    )


# ------------------------------------------------------------------------------------------------ the server's side
def main(config: ServerConfig) -> None:
    """Serve; print what the server holds for each line of standard input."""
    from speca.serve import guard, protocol
    from speca.serve import main as serve

    guard.BODY_S = protocol.HEAD_S = BODY_S
    make = serve.create_app

    def kept(config: ServerConfig) -> Any:
        app = make(config)
        threading.Thread(target=_tell, args=(app.state.server,), daemon=True).start()
        return app

    serve.create_app = kept
    serve.run(config)


def _tell(server: Any) -> None:
    for _ in sys.stdin:
        sys.stdout.write(json.dumps(figures(server)) + "\n")
        sys.stdout.flush()


def figures(server: Any) -> dict[str, int]:
    """What a server holds. Memory that nobody uses is given back before it is looked at."""
    import greenlet
    import torch

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    objects = gc.get_objects()
    engines = [engine.statistics for _, engine in server.engines()]
    running = server.running
    return {
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "tasks": len(asyncio.all_tasks(server._tasks[0].get_loop())) if server._tasks else 0,
        "tensors": sum(type(one) is torch.Tensor for one in objects),
        "greenlets": sum(type(one) is greenlet.greenlet for one in objects),
        **{name: sum(int(s[name]) for s in engines) for name in ("live", "queued", "bytes")},
        "counts": sum(running.counts.values()),
        "cancels": len(running.cancels),
        "jobs": len(server.workers._tasks),
    }


# ------------------------------------------------------------------------------------------------ the test's side
@dataclass
class Process:
    """A server that runs.

    Attributes:
        port: where it listens.
        log: file with what it has written.
        popen: its process.
    """

    port: int
    log: Path
    popen: subprocess.Popen[str]

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def figures(self) -> dict[str, int]:
        """What it holds now."""
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()
        found: dict[str, int] = json.loads(self.popen.stdout.readline())
        return found

    def settled(self, seconds: float = 30) -> dict[str, int]:
        """What it holds once nothing is under way any more; after so many seconds what it holds then."""
        until, idle = time.monotonic() + seconds, ("live", "queued", "counts", "cancels", "jobs")
        while any((found := self.figures())[name] for name in idle) or found["tasks"] > RESTING_TASKS:
            if time.monotonic() > until:
                break
        return found

    def leaks(self, before: Mapping[str, int]) -> list[str]:
        """What it holds more of than before, beyond `SLACK`, once nothing is under way any more."""
        now = self.settled()
        return [f"{n}: {before[n]}, then {now[n]}" for n in now if now[n] > before[n] + SLACK.get(n, 0)]

    def errors(self) -> list[str]:
        """What it has logged as an error, and tracebacks."""
        found = []
        for line in self.log.read_text().splitlines():
            logged: Mapping[str, Any] = json.loads(line) if line.startswith("{") else {}
            if logged.get("level") in ("error", "critical") or "Traceback" in line or "never retrieved" in line:
                found.append(line)
        return found


SLACK = {"rss": 48 * 2**20, "threads": 6, "files": 4, "tensors": 32, "greenlets": 2}
"""How much more a server may hold after many requests: asyncio's pool of threads grows as it is needed, the engine
keeps what it has learnt of each kind of call, and memory is given back in pieces. Of everything else nothing."""

RESTING_TASKS = 4
"""Tasks of a server at rest: uvicorn, its lifespan, the loop that deletes old jobs, and one that loaded the models."""


def start(folder: Path, port: int, seconds: float = 180) -> Process:
    """Start a server, and return when it is ready."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"log-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "serve.chaos.process", settings(folder, port).model_dump_json()]
    path = os.pathsep.join(str(ROOT / name) for name in ("src", "tests"))
    env = {**os.environ, "PYTHONPATH": path, "SPECA_CACHE": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        pipe = subprocess.PIPE
        popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=file, text=True, env=env)
    found, until = Process(port, log, popen), time.monotonic() + seconds
    while not _is_ready(found.url):
        if popen.poll() is not None or time.monotonic() > until:
            popen.kill()
            raise AssertionError(f"the server did not become ready: {log.read_text()[-2000:]}")
        time.sleep(0.05)
    return found


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False


@dataclass
class Keeper:
    """Has a server run whenever one is needed: on the same folder and port also after it was killed."""

    folder: Path
    port: int
    process: Process | None = None

    def up(self) -> Process:
        """The server that runs; it is started if none does."""
        if self.process is None or self.process.popen.poll() is not None:
            self.process = start(self.folder, self.port)
        return self.process

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self.process is not None:
            self.process.popen.kill()
            self.process.popen.wait()


@contextlib.contextmanager
def keeping(folder: Path) -> Iterator[Keeper]:
    """A keeper, whose server is killed when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        keeper = Keeper(folder, free.getsockname()[1])
    try:
        yield keeper
    finally:
        keeper.kill()


if __name__ == "__main__":
    main(ServerConfig.model_validate_json(sys.argv[1]))
