"""The root hook: how diffusers' own hook registry hands calls, contexts and resets to a run. Imports diffusers."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, HookFunctionReference, StateManager
from torch import nn

from .model.stack import callers

PIPELINE_CLASSES = frozenset({"DiffusionPipeline", "ModularPipeline"})


class Run(Protocol):
    """What the hook hands calls to."""

    def call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any, caller: Any
    ) -> Any: ...

    def end(self, caller: Any = None) -> None: ...


class _State(BaseState):
    """Nothing: the manager is only there to be told the cache context."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        return None


_HERE: ContextVar[dict[int, Any]] = ContextVar("speca_cache_contexts", default={})  # noqa: B039, never changed in place


class _Contexts(StateManager):
    """The cache context that a pipeline has set, each thread and greenlet its own: two may share a transformer."""

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


class _RootHook(ModelHook):
    """Replaces the forward of one transformer; the original one is called by the run."""

    _is_stateful = True

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.contexts = _Contexts()

    # Decisions are not for a compiler; what the run calls may be compiled nevertheless.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.run.call(self.fn_ref.original_forward, args, kwargs, self.contexts.here, calling_pipeline())

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.run.end(calling_pipeline())
        return module


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


def register(model: nn.Module, run: Run, name: str) -> None:
    """Let `run` answer the calls of the transformer."""
    registry, hook = HookRegistry.check_if_exists_or_initialize(model), _RootHook(run)
    registry.register_hook(hook, name)
    hook.fn_ref.__class__ = _Reference
    registry.invalidate_child_registries_cache()


def unregister(model: nn.Module, name: str) -> None:
    """Take the hook off again, and leave one that was registered after it working, see `_Reference`."""
    registry = model.__dict__["_diffusers_hook"]
    after = registry._fn_refs[registry._hook_order.index(name) + 1 :][:1]
    replaced = [(ref, ref.forward) for ref in after if ref.original_forward is not None]
    registry.remove_hook(name, recurse=False)
    for ref, own in replaced:
        if not isinstance(ref, _Reference):
            ref.original_forward, ref.forward = ref.forward, own


def calling_pipeline() -> Any:
    """The pipeline whose method is calling the transformer, None where there is none, as in one's own sampling loop.

    Pipelines share transformers, and nothing in a call says whose it is. But the step can only be told from the
    scheduler of the pipeline that is calling, so the caller is looked up on the stack, as a debugger would.
    """
    for frame in callers():
        code = frame.f_code
        # Frames of torch are passed over: they hold modules as `self`, and there are many of them.
        if not str(frame.f_globals.get("__name__")).startswith("torch."):
            for name in ("self", "components"):  # blocks of modular pipelines are handed their pipeline
                if name in code.co_varnames[: code.co_argcount]:
                    value = frame.f_locals.get(name)
                    if PIPELINE_CLASSES & {c.__name__ for c in type(value).__mro__}:
                        return value
    return None
