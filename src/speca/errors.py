"""The errors a user can meet. Each message says what was given, where, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpecaError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(SpecaError, ValueError):
    """A setting is unknown or out of range."""


class InputError(SpecaError, ValueError):
    """An argument that is no setting is wrong: a model name, a label, a folder."""


class UnsupportedModelError(SpecaError, TypeError):
    """The object has no diffusion transformer that can be accelerated."""


class NotEnabledError(SpecaError, LookupError):
    """A report was asked of an object that is not enabled, or has not run yet."""


class EngineClosedError(ConfigError):
    """An engine takes no requests: it was closed, drains, has failed, or belongs to another process."""


class QueueFullError(SpecaError, RuntimeError):
    """An engine has as many requests waiting as `max_queue` allows; try again later.

    Attributes:
        retry_after: seconds after which there is likely to be room, estimated from recent requests.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NonFiniteError(SpecaError, ValueError):
    """The result of a request holds NaN or infinity, so there is no picture."""


class CancelledError(SpecaError, RuntimeError):
    """A request was cancelled, or its deadline passed."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A phrase that names the valid name closest to `name` and lists all of them."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Valid: {', '.join(names)}."
