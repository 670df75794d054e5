"""A device that is not there: tensors on "far" compute on the CPU, but as strangers to the CPU's own.

Three things that only a GPU would show can be seen here: an operation that mixes devices fails; every value that the
host reads, for which it would wait until a GPU has caught up, is noted with the line that asked for it; and so is every
tensor of double precision, which not all devices have.

Importing this registers a device with torch for the rest of the process, so tests run it in a process of their own.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

MOVING = {"aten::_to_copy", "aten::copy_"}
INDEXING = {"aten::index", "aten::index_put_"}
"""Operations that take tensors of both devices: copies, and indexing by a host tensor."""

FACTORIES = ("arange.start_step", "arange.start", "arange", "linspace", "randperm", "randperm.generator")
"""Operations that would resize a tensor made before, which a wrapper cannot follow."""


class Module:
    """What torch looks for in `torch.far`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None:
        return None

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        return None

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend("far", Module())
torch.accelerator.synchronize = lambda device=None: None  # there is nothing to wait for
torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="far")` is made near and moved
DEVICE = torch.device("far", 0)
reads: list[str] = []
"""The lines, outside of torch, that had a value brought to the host."""
puts: list[str] = []
"""The lines that had values brought to the device in a way for which the host waits: not `non_blocking`."""
doubles: list[str] = []
"""The lines that made a tensor of double precision on the device; that of Apple has none."""


class Far(Tensor):
    """A tensor on the device; `near` holds its values and shares memory with its views."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        made: Far = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device=DEVICE
        )
        made.near = near.detach()
        if near.dtype == torch.float64:
            doubles.append(_who())
        return made

    def __init__(self, near: Tensor) -> None:
        super().__init__()

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.near!r})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "tolist":
            return args[0].cpu().tolist()
        if name in ("untyped_storage", "data_ptr"):
            return getattr(args[0].near, name)()
        if name in ("item", "__float__", "__int__", "__bool__", "__index__"):  # `torch.tensor([x])` asks where nothing
            reads.append(_who())  # may be dispatched
            return getattr(args[0].near, name)()
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert a far tensor to numpy; use Tensor.cpu() first")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: devices checked, reads noted, computed near, wrapped again where it belongs on the device."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far, near = [x for x in tensors if isinstance(x, Far)], [x for x in tensors if not isinstance(x, Far)]
    name, asked = func.overloadpacket._qualified_op_name, kwargs.get("device")
    if far and name not in MOVING | INDEXING and any(x.dim() for x in near):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found far and cpu")
    there = bool(far) if asked is None else asked.type == DEVICE.type
    if name == "aten::copy_":
        there = isinstance(args[0], Far)
    if far and (name == "aten::_local_scalar_dense" or (name in MOVING and not there)):
        reads.append(_who())
    if name in MOVING and there and near and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
        puts.append(_who())
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    made = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    known = {id(x.near): x for x in far} | {id(x): x for x in near}  # what is changed in place stays what it is
    return tree_map(lambda x: known.get(id(x), Far(x) if there else x) if isinstance(x, Tensor) else x, made)


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def _who() -> str:
    asked = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__][-1]
    return f"{asked.filename.rsplit('/', 1)[-1]}: {asked.line}"


def _anywhere(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(func, args, kwargs)


LIBRARY, FALLBACK = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
FALLBACK.fallback(_anywhere, "PrivateUse1")
FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _name in FACTORIES:
    _packet, _, _overload = _name.partition(".")
    _op = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
    LIBRARY.impl(_name, lambda *args, op=_op, **kwargs: _run(op, args, kwargs), "PrivateUse1")


def move(value: Any) -> Any:
    """The same on the device: a tensor, a container of tensors, or a module, whose parameters are replaced."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for kind in (module._parameters, module._buffers):
                for name, kept in kind.items():
                    if kept is not None:
                        kind[name] = nn.Parameter(Far(kept.data), False) if kind is module._parameters else Far(kept)
        return value
    return tree_map(lambda x: Far(x) if isinstance(x, Tensor) else x, value)
