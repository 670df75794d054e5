"""How calls, contexts and resets of diffusers reach an accelerator: one hook in diffusers' own registry. Imports
diffusers."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, HookFunctionReference, StateManager
from torch import nn

from .accelerator import Accelerator
from .companions import bare, through_compiled
from .stack import calling_pipeline


class _State(BaseState):
    """Holds nothing: its manager is only there to be given the cache context."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        return None


_HERE: ContextVar[dict[int, Any]] = ContextVar("speca_cache_contexts", default={})  # noqa: B039, never changed in place


class _Contexts(StateManager):
    """The cache context that a pipeline has set, each thread and greenlet its own: two may share a model."""

    def __init__(self) -> None:
        super().__init__(_State)

    def set_context(self, context: Any) -> None:
        """Called by `cache_context` on entry, and with None on exit."""
        others = {key: kept for key, kept in _HERE.get().items() if key != id(self)}
        _HERE.set(others if context is None else {**others, id(self): context})

    @property
    def here(self) -> Any:
        """The context of the calling thread or greenlet, None outside of any."""
        return _HERE.get().get(id(self))


class RootHook(ModelHook):
    """Replaces the forward of one model; the original one is called by the accelerator."""

    _is_stateful = True

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self.accelerator = accelerator
        self.contexts = _Contexts()

    # Decisions are not for a compiler; what the accelerator calls may be compiled nevertheless.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = through_compiled(module, self.fn_ref.original_forward)
        return self.accelerator.call(forward, args, kwargs, self.contexts.here, calling_pipeline())

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.accelerator.end(calling_pipeline())
        return module


class ControlNetHook(ModelHook):
    """Returns the outputs of the step before where the denoiser's coming call is forecast, and so does not use them."""

    _is_stateful = False

    def __init__(self, is_drafted: Callable[[Any, Any], bool], time: Callable[..., Any]) -> None:
        """
        Args:
            is_drafted: from a pipeline and a time to whether its denoiser's call then is forecast.
            time: from the arguments of a call of the ControlNet to its time.
        """
        super().__init__()
        self.is_drafted, self.time = is_drafted, time
        self.kept: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by pipeline, its last outputs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        pipeline = calling_pipeline()
        kept = None if pipeline is None else self.kept.get(pipeline)
        if kept is not None and self.is_drafted(pipeline, self.time(*args, **kwargs)):
            return kept
        out = self.fn_ref.original_forward(*args, **kwargs)
        if pipeline is not None:
            self.kept[pipeline] = out
        return out


class _Reference(HookFunctionReference):
    """Says what our hook calls. diffusers, when it removes the hook before ours, overwrites `forward` with what is to
    be called next; for a hook that replaces the forward, as ours does, that would drop the hook."""

    @property
    def forward(self) -> Any:
        """Our own forward, whatever is called next."""
        return self.__dict__["forward"]

    @forward.setter
    def forward(self, following: Any) -> None:
        self.original_forward = following


def register(model: nn.Module, hook: ModelHook, name: str) -> None:
    """Let a hook answer the calls of a model."""
    registry = HookRegistry.check_if_exists_or_initialize(model)
    if registry._module_ref is not model:  # a copy.copy has that of the original, a compiled wrapper what it wraps has
        registry = bare(model).__dict__["_diffusers_hook"] = HookRegistry(model)
    registry.register_hook(hook, name)
    hook.fn_ref.__class__ = _Reference
    registry.invalidate_child_registries_cache()


def unregister(model: nn.Module, name: str) -> None:
    """Take a hook off again, and leave one that was registered after it working, see `_Reference`."""
    registry = bare(model).__dict__["_diffusers_hook"]
    after = registry._fn_refs[registry._hook_order.index(name) + 1 :][:1]
    replaced = [(ref, ref.forward) for ref in after if ref.original_forward is not None]
    registry.remove_hook(name, recurse=False)
    for ref, own in replaced:
        if not isinstance(ref, _Reference):
            ref.original_forward, ref.forward = ref.forward, own
