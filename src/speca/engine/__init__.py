"""Continuous batching of unmodified pipelines: requests drift apart in steps, and their forwards are run together."""

from .engine import Engine
from .future import Event, Future, Result

__all__ = ["Engine", "Event", "Future", "Result"]
