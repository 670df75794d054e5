"""Whether a model can be run on a part of the rows of a call, found by trying it once for each kind of call.

Nothing is concluded from a call that is not finite or for which memory did not suffice: the next one is tried again.
"""

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
            found = self._try(invocation, rows, run)
            if found is None:
                return False
            self._known[kind] = found
            if len(self._known) > MOST:
                self._known.popitem(last=False)
        return self._known[kind]

    @staticmethod
    def _try(invocation: Invocation, rows: int, run: Callable[[Invocation], Any]) -> bool | None:
        """Whether it works, None if this call does not tell."""
        try:
            alone = run(invocation.on([rows - 1], rows))
        except torch.OutOfMemoryError:
            return None
        except Exception:  # whatever a model raises that cannot be called so
            return False
        whole = run(invocation)
        if close(tensors(alone), take(whole, rows - 1, rows)):
            return True
        return False if finite(whole) else None


def finite(out: Any) -> bool:
    """Return whether all numbers of an output are finite."""
    return all(bool(t.isfinite().all()) for t in tensors(out) if t.is_floating_point())


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
