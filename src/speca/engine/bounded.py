"""A dictionary of what was found of some kind of call, which clients can make ever new kinds of."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

MOST = 512


class Bounded(OrderedDict[K, V]):
    """Keeps the entries that were set, or read by their key in brackets, last: `most` of them."""

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self._most = most

    def __getitem__(self, key: K) -> V:
        found = super().__getitem__(key)
        self.move_to_end(key)
        return found

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._most:
            del self[next(iter(self))]
