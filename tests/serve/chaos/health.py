"""Asks a server for its health all the time, from a process of its own, so that only the server can be slow."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

EVERY_S = 0.02


@dataclass
class Health:
    """What was seen: seconds of each answer, and how many failed."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0

    def quantile(self, share: float) -> float:
        """Seconds that so large a share of the answers took at most."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def poll(port: int) -> Health:
    """Ask until standard input ends."""
    over, found = threading.Event(), Health()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while not over.wait(EVERY_S):
        began = time.perf_counter()
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            found.failed += answer.status != 200
        except (OSError, http.client.HTTPException):
            found.failed += 1
            connection.close()
        found.seconds.append(time.perf_counter() - began)
    return found


@contextmanager
def polled(port: int) -> Iterator[Health]:
    """Poll until the block ends; what was seen is there afterwards."""
    command, pipe = [sys.executable, __file__, str(port)], subprocess.PIPE
    process, found = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True), Health()
    try:
        yield found
    finally:
        out, _ = process.communicate("", timeout=60)
        seen = json.loads(out)
        found.seconds, found.failed = seen["seconds"], seen["failed"]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(vars(poll(int(sys.argv[1])))))
