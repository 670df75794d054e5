"""Where an engine says what its user should know: a warning, and the log `speca.engine` for processes that keep one."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("speca.engine")

_THREADS: set[int] = set()
"""Threads whose warnings are written to the log."""


def warn(text: str) -> None:
    """Warn the user, and write it to the log each time, also where Python shows a warning only once."""
    logger.warning(text)
    with _unlogged():
        warnings.warn(f"speca: {text}", stacklevel=3)


@contextmanager
def logged() -> Iterator[None]:
    """Inside, warnings that are shown in the calling thread are written to the log as well."""
    _install()
    _THREADS.add(threading.get_ident())
    try:
        yield
    finally:
        _THREADS.discard(threading.get_ident())


@contextmanager
def _unlogged() -> Iterator[None]:
    me = threading.get_ident()
    logs = me in _THREADS
    _THREADS.discard(me)
    try:
        yield
    finally:
        if logs:
            _THREADS.add(me)


def _install() -> None:
    """Put a function in front of the one that shows warnings, as `logging.captureWarnings` does; it stays there."""
    shown: Any = warnings.showwarning
    if getattr(shown, "writes_log", False):
        return

    def show(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
        if file is None and threading.get_ident() in _THREADS:
            logger.warning("%s: %s", category.__name__, message)
        shown(message, category, filename, lineno, file, line)

    show.writes_log = True  # type: ignore[attr-defined]
    warnings.showwarning = show
