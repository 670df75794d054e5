"""Per-row store of what was kept of full steps. Shapes: K kept steps, B rows, n selected rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers of the host, such as indices and weights, as a tensor on `device`, without waiting for it.

    A plain copy makes the host wait until a CUDA device has done all it was given before; one from pinned memory does
    not. Other devices are left alone: Apple's would read memory that is gone by then (pytorch/pytorch#189690).
    """
    found, ahead = torch.as_tensor(values, dtype=dtype), device.type == "cuda"
    return (found.pin_memory() if ahead else found).to(device, non_blocking=ahead)


class History:
    """The newest `depth` kept steps of each row, for a fixed number of streams (tensors kept at each step).

    Every row has its own ring, so rows may have been full at different steps. Features come rows first, `(n, ...)`;
    buffers are allocated at the first push and freed with the object. Weighted sums are accumulated in fp32.
    """

    def __init__(self, depth: int, rows: int, dtype: torch.dtype | None = None) -> None:
        """`dtype` is the storage type; None keeps the dtype the features come in."""
        self.depth, self.rows, self.dtype = depth, rows, dtype
        self.pushes = [0] * rows
        self._buffers: list[list[Tensor]] = []  # stream, slot -> (B, ...)
        self._given: list[torch.dtype] = []

    def push(self, rows: Sequence[int], features: Sequence[Tensor]) -> None:
        """Keep `features`, one tensor (n, ...) per stream, as the newest anchor of `rows`; the oldest one goes."""
        if not self._buffers:
            self._given = [f.dtype for f in features]
            self._buffers = [
                [f.new_zeros((self.rows, *f.shape[1:]), dtype=self.dtype) for _ in range(self.depth)] for f in features
            ]
        for slot in range(self.depth):
            at = [i for i, row in enumerate(rows) if self.pushes[row] % self.depth == slot]
            if not at:
                continue
            for buffer, feature in zip(self._buffers, features, strict=True):
                if len(at) == self.rows:
                    buffer[slot].copy_(feature)
                else:
                    index = on_device([rows[i] for i in at], feature.device)
                    part = feature if len(at) == len(rows) else feature[on_device(at, feature.device)]
                    buffer[slot].index_copy_(0, index, part.to(buffer[slot].dtype))
        for row in rows:
            self.pushes[row] += 1

    def count(self, row: int) -> int:
        """How many anchors `row` has, at most `depth`."""
        return min(self.pushes[row], self.depth)

    def forecast(self, rows: Sequence[int], weights: Sequence[Sequence[float]] | Tensor) -> list[Tensor]:
        """Return the weighted sums (n, ...), one for each stream, for weights (n, K), newest kept step first.

        Raises:
            IndexError: a row has nothing kept yet.
        """
        if any(self.pushes[row] == 0 for row in rows):
            raise IndexError("a row without a full step cannot be forecast; its first step must be full")
        given = weights.tolist() if isinstance(weights, Tensor) else weights
        by_slot = [self._by_slot(row, w) for row, w in zip(rows, given, strict=True)]
        used = [k for k in range(self.depth) if any(w[k] for w in by_slot)] or [0]
        device, whole = self._buffers[0][0].device, list(rows) == list(range(self.rows))
        index = None if whole else on_device(rows, device)
        # Rows with equal weights need no table of them on the device.
        alike = all(w == by_slot[0] for w in by_slot)
        scale = None if alike else on_device(by_slot, device, torch.float32)
        found = []
        for buffer, dtype in zip(self._buffers, self._given, strict=True):
            total: Tensor | None = None
            for k in used:
                kept = (buffer[k] if index is None else buffer[k].index_select(0, index)).float()
                if scale is None:
                    total = kept * by_slot[0][k] if total is None else total.add_(kept, alpha=by_slot[0][k])
                else:
                    w = scale[:, k].view(-1, *[1] * (kept.dim() - 1))
                    total = kept * w if total is None else total.addcmul_(kept, w)
            found.append(torch.as_tensor(total).to(dtype))
        return found

    def _by_slot(self, row: int, weights: Sequence[float]) -> list[float]:
        """The weights of a row, newest kept step first, in the order of its slots."""
        found = [0.0] * self.depth
        for age, weight in enumerate(weights):
            found[(self.pushes[row] - 1 - age) % self.depth] += weight
        return found

    def bytes(self) -> int:
        """Bytes held, all rows and streams together."""
        return sum(slot.numel() * slot.element_size() for buffer in self._buffers for slot in buffer)
