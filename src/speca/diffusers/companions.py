"""What else a user has put on a model: caches of diffusers, compilation, offloading; and how it is copied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..verified.gate import GatedModuleList


def foreign_cache(model: nn.Module, *, thorough: bool = False) -> str:
    """Return the cache of diffusers that is enabled on the model and how to take it off; empty if there is none.

    It would skip blocks by itself, so full steps would not be full. `enable_cache` leaves its settings
    behind; a cache applied as a function leaves only its hooks, which a `thorough` look through all modules finds.
    """
    given = getattr(model, "_cache_config", None)
    if given is not None:
        return f"diffusers' own cache is enabled ({type(given).__name__}); call transformer.disable_cache() first"
    for name, module in model.named_modules() if thorough else ():
        registry = module.__dict__.get("_diffusers_hook")
        for key, hook in registry.hooks.items() if registry is not None else ():
            if hook._is_stateful and type(hook).__module__.startswith("diffusers.hooks."):
                return (
                    f"a cache of diffusers sits on {name or 'it'} ({type(hook).__name__}); take it off first, with "
                    f"HookRegistry.check_if_exists_or_initialize(transformer).remove_hook({key!r})"
                )
    return ""


def demand_alone(model: nn.Module) -> None:
    """Refuse what cannot work together with forecasts.

    Raises:
        ConfigError: with the remedy.
    """
    name, registry = type(bare(model)).__name__, bare(model).__dict__.get("_diffusers_hook")
    if cache := foreign_cache(bare(model), thorough=True):
        raise ConfigError(f"{name}: {cache}.")
    if registry is not None and bare(registry._module_ref) is not bare(model) and registry.hooks.keys() - {"speca"}:
        raise ConfigError(
            f"{name} is a copy.copy of a model with hooks of diffusers ({', '.join(registry.hooks)}), which act on "
            "that model; enable speca on that one, or copy before its hooks are put on."
        )


def bare(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile(module)` has wrapped, or the module itself."""
    return model._modules.get("_orig_mod") or model


def hookable(model: nn.Module) -> nn.Module:
    """Return the module whose forward is to be hooked: the compiled wrapper, so that what it wraps is compiled alone.

    Where other hooks of diffusers act inside of the wrapper already, ours has to stand beside them.
    """
    registry = bare(model).__dict__.get("_diffusers_hook")
    beside = registry is not None and registry._module_ref is bare(model) and registry.hooks.keys() - {"speca"}
    return bare(model) if beside else model


def is_compiled(model: nn.Module) -> bool:
    """Return whether the whole module was compiled, by `compile()` or `torch.compile(module)`; blocks do not count."""
    return bare(model)._compiled_call_impl is not None or bare(model) is not model


def is_compiled_above(model: nn.Module) -> bool:
    """Return whether the forward of an accelerated model was compiled after that, with the hook inside.

    The forward of a hook is a partial, and carries the marks of the forward it wraps, which may well be compiled.
    """
    forward = model.__dict__.get("forward")
    return hasattr(forward, "_torchdynamo_orig_callable") and not isinstance(forward, partial)


def is_wrapped_by(model: nn.Module, owner: Any) -> bool:
    """Return whether `torch.compile(module)` has wrapped the model since: its pipeline `owner` has the wrapper."""
    parts = [] if owner is None else [m for m in vars(owner).values() if isinstance(m, nn.Module)]
    return any(m is not model and bare(m) is model for m in parts)


def through_compiled(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return what computes a full step of a model that was compiled in place, by `model.compile()`.

    That compiles everything a call does, the hook included. So the compiled call is made from inside the hook, with
    the original `forward` in its place meanwhile. Of any other model it is `forward` itself.
    """
    compiled = bare(model).__dict__.get("_compiled_call_impl")
    if compiled is None or model._forward_hooks or model._forward_pre_hooks:  # which would be called twice
        return forward

    def run(*args: Any, **kwargs: Any) -> Any:
        own = model.__dict__["forward"]
        model.__dict__["forward"] = forward
        try:
            return compiled(*args, **kwargs)
        finally:
            model.__dict__["forward"] = own

    return run


def learns_order(model: nn.Module) -> bool:
    """Return whether group offloading with streams is about to learn, from one call, which weights to fetch when.

    It must see each block run once: a draft, or the passes of the self-test, would teach it to use weights before they
    have arrived, which no error tells.
    """
    registry = model.__dict__.get("_diffusers_hook")
    return registry is not None and "lazy_prefetch_group_offloading" in registry.hooks


def plain_copy(model: nn.Module, protocol: Any, before: dict[str, Any], ours: set[str]) -> tuple[Any, ...]:
    """Return what `copy` and `pickle` ask of an accelerated model: its parts as they would be without speca.

    A forward that diffusers has hooked keeps a reference to the original module, so a copy of it would compute with
    the weights of the original; and it cannot be pickled.

    Args:
        model: the accelerated model.
        protocol: of pickle.
        before: attributes of the instance that were there before, as they were.
        ours: names of attributes to leave out.

    Raises:
        ConfigError: another hook of diffusers sits beside ours.
    """
    if others := [name for name in model.__dict__["_diffusers_hook"].hooks if name != "speca"]:
        raise ConfigError(
            f"{type(model).__name__} cannot be copied: the copy would compute with the weights of the original, as "
            f"diffusers' hooks {others} refer to it. Remove them first, with "
            f"HookRegistry.check_if_exists_or_initialize(transformer).remove_hook({others[0]!r})."
        )
    reduced: tuple[Any, ...] = tuple(type(model).__reduce_ex__(model, protocol))
    made, arguments, state, *rest = reduced
    kept = {n: v for n, v in state.items() if n not in ours | {"_diffusers_hook"}}
    # A list that a shallow copy shared would skip blocks for the copy whenever the original drafts.
    kept["_modules"] = {n: _plain_list(m) for n, m in model._modules.items()}
    own = before.get("forward", MethodType(type(model).forward, model))
    if "_old_forward" in kept:  # accelerate's wrap is above ours; what it wraps is a plain method or nothing of ours
        kept["_old_forward"] = own
    elif "forward" in before and own != MethodType(type(model).forward, model):
        kept["forward"] = own
    else:
        kept.pop("forward", None)
    return made, arguments, kept, *rest


def _plain_list(module: Any) -> Any:
    """A gated list as a plain one of the same blocks, also inside a ModuleDict; anything else as it is."""
    if isinstance(module, GatedModuleList):
        return copy.copy(module)
    if isinstance(module, nn.ModuleDict) and any(isinstance(m, GatedModuleList) for m in module.values()):
        plain = copy.copy(module)
        plain.__dict__["_modules"] = {n: _plain_list(m) for n, m in module.items()}
        return plain
    return module
