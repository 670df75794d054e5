"""Context parallelism: compute errors of the whole feature from the shards of all processes.

Each process of a context-parallel model computes a part of the sequence, and with it a part of every block feature.
All processes must accept or reject the same drafts, else they deadlock.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import Total, whole


def total_of(model: nn.Module) -> Total:
    """Return the function that combines the parts of an error over the processes of `model`; see `verified/errors.py`.

    Every process adds all parts in the same order, so all get bitwise equal results. A feature that is not sharded is
    counted once per process in numerator and denominator, so its error does not change.
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
