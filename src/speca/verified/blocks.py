"""Return inputs of skipped blocks as outputs, and load the offloaded weights of a block that runs in a draft."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn


def quick_pass(
    is_tuple: bool, names: Sequence[str | None], positional: Sequence[str]
) -> Callable[[Sequence[Any], dict[str, Any]], Any] | None:
    """Return a fast `StandIn.pass_through` for calls that give the same arguments by position, else None."""
    if None in names or is_tuple == (len(names) == 1):
        return None
    # Special cases for one and two outputs, which most blocks have; torch.compile can trace them.
    if all(name in positional for name in names):
        places = [positional.index(str(name)) for name in names]
        i, j = places[0], places[-1]
        if len(places) < 3:
            return (lambda args, kwargs: (args[i], args[j])) if is_tuple else lambda args, kwargs: args[i]
        return lambda args, kwargs: tuple([args[place] for place in places])
    if not any(name in positional for name in names):
        keys = [str(name) for name in names]
        n, m = keys[0], keys[-1]
        if len(keys) < 3:
            return (lambda args, kwargs: (kwargs[n], kwargs[m])) if is_tuple else lambda args, kwargs: kwargs[n]
        return lambda args, kwargs: tuple([kwargs[key] for key in keys])
    return None


def tensors_of(out: Any) -> list[Tensor]:
    """Return the tensors among a block's outputs, in order."""
    return [o for o in ([out] if isinstance(out, Tensor) else out) if isinstance(o, Tensor)]


def onloaded(block: nn.Module) -> AbstractContextManager[None]:
    """Context manager that loads the group-offloaded weights of a block that runs in a draft.

    Group offloading of diffusers loads the weights of several blocks when the first of them runs, and unloads them
    after the last. A draft skips these blocks, so the weights are loaded and unloaded here.
    """
    registry: Any = getattr(block, "_diffusers_hook", None)
    hook = registry.hooks.get("group_offloading") if registry is not None else None
    return nullcontext() if hook is None else _onloaded(hook.group, registry._module_ref)


@contextmanager
def _onloaded(group: Any, block: nn.Module) -> Iterator[None]:
    if group.onload_leader is not None and group.onload_leader is not block:
        group.onload_()
    try:
        yield
    finally:
        if group.offload_leader is not block:
            group.offload_()


def version_of(value: Any) -> int | None:
    """Return the number of in-place writes to a tensor, None if torch does not count them; 0 for other objects."""
    if not isinstance(value, Tensor):
        return 0
    return None if value.is_inference() else value._version
