"""What takes long and runs no model, such as the search for the best full steps, in threads beside the engine's."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

AT_ONCE = 0.005
"""Seconds that are waited for a result: most of what is asked for was found before."""


class Beside:
    """Runs functions in background threads, one for each lane, made when they are first needed.

    Attributes:
        wake: called in one of them whenever a function has ended.
    """

    def __init__(self) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._pools: dict[str, concurrent.futures.ThreadPoolExecutor] = {}
        self._under_way: dict[int, concurrent.futures.Future[Any]] = {}

    @property
    def busy(self) -> bool:
        """Whether anything is under way whose result was not taken."""
        return bool(self._under_way)

    @property
    def ready(self) -> bool:
        """Whether a result is there to be taken."""
        return any(future.done() for future in list(self._under_way.values()))

    def start(self, index: int, function: Callable[[], Any], lane: str) -> None:
        """Run a function for a request, after others of its lane: a short one does not wait for a long search."""
        try:
            if lane not in self._pools:
                self._pools[lane] = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f"speca-engine-{lane}")
            future = self._pools[lane].submit(function)
        except RuntimeError:  # the process is about to end, and takes no more work for other threads
            future = _called(function)
        self._under_way[index] = future
        concurrent.futures.wait([future], timeout=AT_ONCE)
        future.add_done_callback(lambda _: self.wake())

    def taken(self) -> list[tuple[int, Any, Exception | None]]:
        """Return what has ended since: for which request, its value, and what it raised."""
        ended = [(index, future) for index, future in self._under_way.items() if future.done()]
        for index, _ in ended:
            del self._under_way[index]
        return [(index, *_outcome(future)) for index, future in ended]

    def drop(self, index: int) -> None:
        """Forget what runs for a request that has ended."""
        future = self._under_way.pop(index, None)
        if future is not None:
            future.cancel()

    def close(self) -> None:
        """Let the threads end when they are done with what they do."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        self._pools.clear()
        self._under_way.clear()


def _called(function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
    return future


def _outcome(future: concurrent.futures.Future[Any]) -> tuple[Any, Exception | None]:
    error = future.exception()
    if error is None:
        return future.result(), None
    return None, error if isinstance(error, Exception) else RuntimeError(f"it was ended by {error!r}")
