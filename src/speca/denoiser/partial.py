"""Whether a model can be run on a part of the rows of a call, found by trying it once for each kind of call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .outputs import take, tensors
from .rows import Invocation, owners

MOST = 64


class PartialCalls:
    """Remembers what was found for the last kinds of call of one model."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, bool] = OrderedDict()

    def work(self, invocation: Invocation, rows: int, run: Callable[[Invocation], Any]) -> bool:
        """Return whether a row computed alone is what it is in its batch.

        Args:
            invocation: a call of `rows` rows.
            rows: their number.
            run: runs a call.
        """
        if rows == 1:
            return True
        kind = owners(invocation.arguments, rows)
        if kind not in self._known:
            self._known[kind] = self._try(invocation, rows, run)
            if len(self._known) > MOST:
                self._known.popitem(last=False)
        return self._known[kind]

    @staticmethod
    def _try(invocation: Invocation, rows: int, run: Callable[[Invocation], Any]) -> bool:
        try:
            alone = run(invocation.on([rows - 1], rows))
        except Exception:  # whatever a model raises that cannot be called so
            return False
        whole = run(invocation)
        return close(tensors(alone), take(whole, rows - 1, rows))


def close(many: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether tensors are equal within rounding, as another batch size may use another kernel."""
    return len(many) == len(others) and all(_close(a, b) for a, b in zip(many, others, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = max(1e-4, 4 * torch.finfo(a.dtype).eps)
    a, b = a.float(), b.float()
    return bool((a - b).norm() <= tolerance * b.norm())
