"""What has to be equal in calls of a model so that they may be run as one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..denoiser.arguments import ROW_DIMENSIONS
from ..denoiser.rows import one_each, owned, takes_lists

Token = Callable[[Tensor], Hashable]


def signature(arguments: dict[str, Any], total: int, token: Token) -> Hashable:
    """Return what has to be equal in calls that `join` may put together: all but the numbers that belong to rows.

    Args:
        arguments: of a call of `total` rows.
        token: equal for shared tensors of equal content, such as position ids.
    """
    listed = takes_lists(arguments)
    return tuple((n, _signature(v, total, listed, ROW_DIMENSIONS.get(n, 0), token)) for n, v in arguments.items())


def _signature(value: Any, total: int, listed: bool, dim: int | None, token: Token) -> Hashable:
    if isinstance(value, Tensor):
        if dim is None or not owned(value, total, dim):
            return "shared", token(value)
        return dim, (*value.shape[:dim], *value.shape[dim + 1 :]), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((k, _signature(v, total, listed, dim, token)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        if dim is not None and one_each(value, total, listed):  # items, which need not be all alike
            kinds = {(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else repr(v) for v in value}
            return "items", type(value), frozenset(kinds)
        return type(value), tuple(_signature(v, total, listed, dim, token) for v in value)
    return type(value), value if isinstance(value, Hashable) else id(value)


class Tokens:
    """Equal for tensors of equal content. A tensor is read once, when it is first seen."""

    def __init__(self) -> None:
        self._seen: Any = WeakTensorKeyDictionary()

    def __call__(self, tensor: Tensor) -> Hashable:
        """Of a tensor that calls share, such as position ids."""
        version = None if tensor.is_inference() else tensor._version
        kept = self._seen.get(tensor)
        if kept is None or kept[0] != version:
            digest = hashlib.blake2b(_content(tensor), digest_size=16).digest()
            kept = self._seen[tensor] = version, (tensor.shape, tensor.dtype, tensor.device, digest)
        token: Hashable = kept[1]
        return token


def _content(tensor: Tensor) -> bytes:
    """Return the numbers of a tensor as bytes, read from its device."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def form_of(tensor: Tensor) -> Hashable:
    """Of a tensor that calls share, all but its content."""
    return tensor.shape, tensor.dtype, tensor.device
