"""Who drives the loop of an engine: a thread of its own, or whoever goes through `generate`; and how that ends."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from ..errors import CancelledError, ConfigError, EngineClosedError
from .future import Future
from .log import logged, logger
from .loop import Loop
from .turn import Turn

CLOSED = "the engine is closed; make a new one."
DRAINING = "the engine finishes what is under way and takes no more requests; make a new one, or ask another."
FORKED = "the engine belongs to another process, from which this one was forked; make a new engine here."


class Driver:
    """Hands requests to the loop, and lets it go on round by round, always in one thread at a time.

    Attributes:
        turn: held during each round.
    """

    def __init__(self, loop: Loop, gone: Callable[[], None]) -> None:
        """`gone` is called once, after the last round, in the thread that did it."""
        self.turn = Turn()
        self._loop, self._gone = loop, gone
        self._inbox: deque[Future] = deque()
        self._under_way: dict[int, Future] = {}
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._owner: int | None = None  # the thread that goes through `generate`
        self._refusal = ""  # why no more requests are taken
        self._closing = self._ended = self._left = False
        self._process = os.getpid()
        wake = weakref.WeakMethod(self._wake)  # so that nothing but its engine, or its thread, keeps it
        loop.beside.wake = lambda: (found := wake()) and found()
        _OPEN.add(self)

    # ---------------------------------------------------------------------------------------------- requests
    @property
    def alive(self) -> bool:
        """Whether it goes on: not closed, not broken, and in the process that made it."""
        broken = self._thread is not None and not self._thread.is_alive()
        return os.getpid() == self._process and not self._closing and not self._ended and not broken

    @property
    def under_way(self) -> list[Future]:
        """Requests that were taken and have not ended."""
        with self._condition:
            return list(self._under_way.values())

    @property
    def waiting(self) -> int:
        """How many requests have not started."""
        return len(self._inbox) + len(self._loop.queued)

    def take(self, future: Future, check: Callable[[int], None], *, thread: bool) -> None:
        """Take a request, unless `check`, which is given how many are under way, refuses it.

        Args:
            future: of the request.
            check: raises what it is refused with.
            thread: whether to run it in the engine's own thread, started if need be.

        Raises:
            EngineClosedError: no more are taken.
            ConfigError: a loop over `generate` is under way, whose thread alone can go on with it.
        """
        self.demand_open()
        with self._condition:
            self.demand_open()
            check(len(self._under_way))
            if thread:
                self._start()
            future.wake = lambda: self._cancel(future.index)
            self._under_way[future.index] = future
            self._inbox.append(future)
            self._condition.notify_all()
        future.on_end(lambda: self._forget(future.index))

    def demand_open(self) -> None:
        """Raise `EngineClosedError` where no more requests are taken."""
        if os.getpid() != self._process:  # before any lock, which may have been held when the process was forked
            raise EngineClosedError(FORKED)
        if self._refusal:
            raise EngineClosedError(self._refusal)

    def _start(self) -> None:
        if self._thread is not None:
            return
        if self._loop.busy or self._inbox:
            raise ConfigError("a loop over engine.generate is under way; finish it first, or submit before it.")
        self._thread = threading.Thread(target=logged()(self._serve), name="speca-engine", daemon=True)
        self._thread.start()

    def _cancel(self, index: int) -> None:
        self._loop.cancelled.append(index)
        self._wake()

    def _forget(self, index: int) -> None:
        with self._condition:
            self._under_way.pop(index, None)
            self._condition.notify_all()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    # ---------------------------------------------------------------------------------------------- rounds
    def advance(self, futures: list[Future]) -> None:
        """Go on until one of the futures may have ended.

        Raises:
            ConfigError: another thread goes through `generate`.
        """
        if self._thread is not None:
            Future.wait(futures)
            return
        with self._condition:
            if self._owner not in (None, threading.get_ident()) and self._loop.busy:
                raise ConfigError(
                    "another thread goes through engine.generate; post requests from several threads, or go through "
                    "one loop after the other."
                )
            self._owner = threading.get_ident()
        self._loop.interruptible = True
        self._round()
        if self._closing:  # by a callback
            self._stop()

    def _round(self) -> None:
        """One round of the loop; where it found nothing to do, wait until there is."""
        with self.turn.taken():
            while self._inbox:
                self._loop.submit(self._inbox.popleft())
            self._loop.tick()
        if not self._loop.moved and self._loop.busy:
            self._pause()

    def _pause(self) -> None:
        """Wait for what is computed beside, a request that comes, one that is given up, or a deadline."""
        loop, deadline = self._loop, self._loop.deadline
        left = None if deadline is None else max(0.0, deadline - time.perf_counter())
        with self._condition:
            self._condition.wait_for(
                lambda: self._inbox or self._closing or loop.cancelled or loop.beside.ready or not loop.beside.busy,
                left,
            )

    def _serve(self) -> None:
        """What the engine's thread does."""
        self._loop.interruptible = False
        try:
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._inbox or self._loop.busy or self._closing or self._left)
                    if self._closing or not (self._inbox or self._loop.busy):
                        break
                self._guarded_round()
            self._stop()
        except BaseException as error:  # whatever it is, nobody shall wait for ever
            self._die(error)

    def _guarded_round(self) -> None:
        try:
            self._round()
        except BaseException as error:  # a defect of the engine: those under way fail, later ones need not
            logger.exception("a round of the engine failed; all requests under way fail with it")
            self._loop.abandon(error)
            if isinstance(error, KeyboardInterrupt) and self._loop.interruptible:
                raise

    # ---------------------------------------------------------------------------------------------- ends
    def drain(self, timeout: float | None) -> bool:
        """Take no more requests, and wait until those that were taken have ended; returns whether they have."""
        self.demand_open_or_draining()
        with self._condition:
            self._refusal = self._refusal or DRAINING
        until = None if timeout is None else time.perf_counter() + timeout
        if self.turn.mine:
            return not self._under_way
        mine = self._thread is None and self._owner in (None, threading.get_ident())
        while mine and self._under_way and (until is None or time.perf_counter() < until):
            self.advance(self.under_way)
        left = None if until is None else max(0.0, until - time.perf_counter())
        with self._condition:
            return self._condition.wait_for(lambda: not self._under_way, left)

    def leave(self) -> None:
        """Let the thread end once it has nothing to do: nobody has the engine any more, but for futures of it."""
        with self._condition:
            self._refusal, self._left = self._refusal or CLOSED, True
            self._condition.notify_all()

    def demand_open_or_draining(self) -> None:
        """Raise `EngineClosedError` where there is nothing that could end."""
        if self._refusal != DRAINING:
            self.demand_open()

    def close(self) -> None:
        """Cancel what is under way, and return when it has ended; at once if called in the middle of a round, which
        is then the last."""
        if os.getpid() != self._process:
            return
        with self._condition:
            if not self._closing:
                self._refusal, self._closing = CLOSED, True
            self._condition.notify_all()
            thread = self._thread
        if self.turn.mine or thread is threading.current_thread():
            return
        if thread is not None:
            thread.join()
        elif not self._ended:
            self._stop()

    def _stop(self) -> None:
        """Cancel all requests, and return when they have ended."""
        if self._loop.live and self._owner not in (None, threading.get_ident()) and self._thread is None:
            self._finish_all(
                CancelledError("the engine was closed.")
            )  # its stack is in another thread, and stays there
        for future in self.under_way:
            future.cancel()
        while self._under_way and (self._inbox or self._loop.busy):
            self._guarded_round()
        self._finish_all(CancelledError("the engine was closed."))
        self._end()

    def _end(self) -> None:
        with self._condition:
            if self._ended:
                return
            self._ended = True
        self._loop.beside.close()
        _OPEN.discard(self)
        with self.turn.taken():  # another thread may be in the middle of a round
            self._gone()

    def _die(self, error: BaseException) -> None:
        """Fail everything with the reason, and refuse what comes."""
        reason = f"the engine's thread has ended with {error!r}; make a new engine."
        with self._condition:
            self._refusal, self._closing = reason, True
        logger.critical(reason, exc_info=error)
        failure = EngineClosedError(reason)
        failure.__cause__ = error
        self._finish_all(failure)
        _try(self._end)

    def _finish_all(self, error: Exception) -> None:
        for future in self.under_way:
            _try(lambda f=future: f.finish(error=error))  # type: ignore[misc]


def _try(what: Callable[[], object]) -> None:
    """Call `what`, whose errors shall not keep the rest from being ended."""
    try:
        what()
    except BaseException:
        logger.exception("a part of an engine could not be ended")


_OPEN: weakref.WeakSet[Driver] = weakref.WeakSet()


def _close_all() -> None:
    """At the end of the process: a thread that is in the middle of a model then would end it with an abort."""
    for driver in list(_OPEN):
        _try(driver.close)


atexit.register(_close_all)
