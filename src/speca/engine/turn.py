"""Whose turn it is to run the models: the engine's, for one tick, or that of a direct call of its pipeline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..denoiser.executor import Executor
from ..errors import ConfigError

PATIENCE = 60.0
"""Seconds that a direct call of a pipeline waits for a tick of its engine to end."""


class Turn:
    """A lock that is handed over in the order in which it is asked for, so that nobody waits for more than one turn of
    each other. Whoever has it may take it again."""

    def __init__(self) -> None:
        self._door, self._room = threading.Lock(), threading.Lock()
        self._holder: int | None = None

    @property
    def mine(self) -> bool:
        """Whether the calling thread has it."""
        return self._holder == threading.get_ident()

    @contextmanager
    def taken(self, patience: float = -1) -> Iterator[bool]:
        """Wait for the turn, at most `patience` seconds (-1 for ever), and have it inside; yields whether it came."""
        if self.mine:
            yield True
            return
        if not self._door.acquire(timeout=patience):
            yield False
            return
        try:
            came = self._room.acquire(timeout=patience)
        finally:
            self._door.release()
        if not came:
            yield False
            return
        self._holder = threading.get_ident()
        try:
            yield True
        finally:
            self._holder = None
            self._room.release()


class Direct(Executor):
    """Runs the calls of a model that come from a direct call of the pipeline, between the ticks of its engine."""

    joins = True  # what is found of a model is shared with the engine, which joins rows

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def run(self, evaluation: Any) -> Any:
        """Return what an evaluation gives."""
        return self._between(evaluation.run)

    def plain(self, forward: Callable[[], Any]) -> Any:
        """Return what a call of the model gives, without forecasts."""
        return self._between(forward)

    def first(self, run: Callable[[], Any], rows: int) -> Any:
        """Return what the first call of its kind gives."""
        return self._between(run)

    def _between(self, what: Callable[[], Any]) -> Any:
        with self._turn.taken(PATIENCE) as came:
            if not came:
                raise ConfigError(
                    f"the pipeline was called directly while its engine runs, which did not end a tick in {PATIENCE:g} "
                    "s; post the call to the engine, or close the engine first."
                )
            return what()
