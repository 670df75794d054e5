"""Context parallelism: numbers of the whole feature from those of the shard that this process holds.

Each process of a context-parallel model computes a part of the sequence, and with it a part of every block feature.
A draft must be accepted by all of them or by none, or they would wait for each other for ever.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import Total, whole


def total_of(model: nn.Module) -> Total:
    """How the parts of an error are put together for `model` as it is now; see `verified/errors.py`.

    Every process gets all parts and adds them in the same order, so all decide on the very same bits. A feature that
    is not spread is counted once per process, above and below the fraction, and its error stays what it is.
    """
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    if mesh is None or mesh.size() == 1:
        return whole
    group: Any = mesh.get_group()

    def total(parts: Tensor, how: Literal["sum", "max"]) -> Tensor:
        every = [torch.empty_like(parts) for _ in range(mesh.size())]
        dist.all_gather(every, parts.contiguous(), group=group)
        stacked = torch.stack(every)
        return stacked.sum(0) if how == "sum" else stacked.amax(0)  # amax keeps NaN, a maximum over processes may not

    return total
