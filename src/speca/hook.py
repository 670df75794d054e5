"""The root hook: how diffusers' own hook registry hands calls, contexts and resets to a run. Imports diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn


class Run(Protocol):
    """What the hook hands calls to."""

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any: ...

    def end(self) -> None: ...


class _State(BaseState):
    """Nothing: the manager is only there to be told the cache context."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        return None


class _RootHook(ModelHook):
    """Replaces the forward of one transformer; the original one is called by the run."""

    _is_stateful = True

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.contexts = StateManager(_State)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = getattr(self.contexts, "_context", None) or getattr(self.contexts, "_current_context", None)
        return self.run.call(self.fn_ref.original_forward, args, kwargs, context)

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.run.end()
        return module


def root_hook(run: Run) -> ModelHook:
    """The hook that answers a transformer's calls through `run`."""
    return _RootHook(run)
