"""enable, disable, enabled, report: the public functions, and how a run is attached to a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .calibration import Calibration
from .config import MIN_STEPS, SpecaConfig
from .core.prior import Prior
from .errors import ConfigError, NotEnabledError, UnsupportedModelError
from .model.companions import demand_alone, plain_copy
from .model.gate import block_lists, demand_free
from .report import Report
from .run import ATTRIBUTE, Run

HOOK = "speca"


def enable(
    target: Any,
    preset: str | SpecaConfig = "balanced",
    *,
    scheduler: Any = None,
    num_inference_steps: int | None = None,
    calibration: Calibration | Prior | str | Path | Literal[False] | None = None,
    **overrides: Any,
) -> Any:
    """Accelerate a diffusers pipeline, or a bare transformer, in place.

        speca.enable(pipe)                                   # preset "balanced"
        speca.enable(pipe, "fast", max_draft=10)             # a preset with one number changed
        speca.enable(pipe, tolerance=0.005)                  # the error that drafts may add up to
        speca.enable(pipe, speedup=4)                        # no sample takes more than a quarter of its steps in full
        speca.enable(pipe, calibration="flux-35.json")       # what speca.calibrate found for a quality
        speca.enable(transformer, scheduler=scheduler, num_inference_steps=50)   # one's own sampling loop

    Enabling again replaces the settings. The object itself is returned.

    Args:
        target: a pipeline with one or more diffusion transformers, or such a transformer.
        preset: "faithful", "balanced", "fast" or "paper", or a `SpecaConfig`.
        scheduler: for a bare transformer, the scheduler whose timesteps it is given.
        num_inference_steps: for a bare transformer without scheduler, the number of steps, at least 4.
        calibration: what `speca.calibrate` found, its file, or a `Prior` alone. It gives the prior and, for a preset
            without `tolerance` or `speedup`, the tolerance. By default the one in the folder that the
            pipeline came from, `speca.json`, if it is there and fits; False: none.
        **overrides: any field of `SpecaConfig`.

    Raises:
        ConfigError: an unknown preset or setting, a value out of range, a calibration of another model, a
            cache of diffusers that is enabled, or block lists that another accelerated model shares.
        UnsupportedModelError: no diffusion transformer here, for instance a UNet.
    """
    models = transformers_of(target)
    config = SpecaConfig.build(preset, **overrides)
    known = _known(calibration, target, models[0])
    if isinstance(target, nn.Module) and scheduler is None and num_inference_steps is None:
        raise ConfigError(
            "a bare transformer does not know where a step stands; pass scheduler= (the one you step) "
            "or num_inference_steps=."
        )
    if num_inference_steps is not None and num_inference_steps < MIN_STEPS:
        raise ConfigError(
            f"num_inference_steps={num_inference_steps} leaves nothing to forecast; use at least {MIN_STEPS} steps, "
            "or run without speca."
        )
    for model in _modules(target).values():
        demand_alone(model)
    for model in models:
        demand_free(model)
    disable(target)
    try:
        for model in models:
            _attach(model, Run(model, config, target, scheduler, num_inference_steps, known))
    except ConfigError:  # two of them share their blocks
        disable(target)
        raise
    return target


def _known(calibration: Any, target: Any, model: nn.Module) -> Calibration | Prior | None:
    """The calibration that was given, which has to fit, or the one that the pipeline came with."""
    if calibration is None:
        return Calibration.beside(target)
    if calibration is False or isinstance(calibration, Prior):
        return calibration or None
    found = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
    found.demand_fit(type(model).__name__)
    return found


def disable(target: Any) -> Any:
    """Undo `enable` exactly: forward, classes, attributes and `state_dict` are as before. Harmless if not enabled."""
    for model in transformers_of(target):
        if ATTRIBUTE in model.__dict__:
            _detach(model)
    return target


@contextmanager
def enabled(target: Any, preset: str | SpecaConfig = "balanced", **settings: Any) -> Iterator[Session]:
    """`enable` on entry and `disable` on exit, also after an exception.

    with speca.enabled(pipe, "fast") as run:
        images = pipe(...).images
    print(run.report())
    """
    session = Session(enable(target, preset, **settings))
    try:
        yield session
    finally:
        session.close()


class Session:
    """What `enabled` yields: the reports of the runs inside the block, also after its end."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._last: Report | None = None

    def report(self) -> Report:
        """Report of the last run inside the block. Raises `NotEnabledError` if nothing ran."""
        return self._last if self._last is not None else report(self._target)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the target is exactly as without speca; afterwards it goes on with what is known of the model."""
        runs = [(m, m.__dict__[ATTRIBUTE]) for m in transformers_of(self._target)]
        for model, _ in runs:
            _detach(model)
        try:
            yield
        finally:
            for model, run in runs:
                _attach(model, run)

    def close(self) -> None:
        """Keep the last report and disable."""
        try:
            self._last = report(self._target)
        except NotEnabledError:
            self._last = None
        disable(self._target)


def report(target: Any) -> Report:
    """Per sample: full, accepted, rejected, checked, worst error; in all: FLOPs and time against full.

    Of a pipeline: its last run, all its transformers together. Of a transformer: the last run it took part in.

    Raises:
        NotEnabledError: not enabled, or nothing has run yet.
    """
    runs: list[Run] = [m.__dict__[ATTRIBUTE] for m in transformers_of(target) if ATTRIBUTE in m.__dict__]
    if not runs:
        raise NotEnabledError("speca is not enabled on this object; call speca.enable(...) first.")
    return next((run for run in runs if run.last), runs[0]).report(target)


def transformers_of(target: Any) -> list[nn.Module]:
    """The diffusion transformers of a pipeline, or the transformer itself.

    Raises:
        UnsupportedModelError: none found.
    """
    found = [m for m in map(_uncompiled, _modules(target).values()) if block_lists(m)]
    if isinstance(target, nn.Module):
        if not found:
            raise UnsupportedModelError(f"{type(target).__name__} has no list of transformer blocks to skip.")
        return found
    if not isinstance(getattr(target, "components", None), dict):
        raise UnsupportedModelError(
            f"expected a diffusers pipeline or a transformer module, got {type(target).__name__}."
        )
    if not found:
        unet = " Its denoiser is a UNet, which has no stack of blocks to forecast;" if hasattr(target, "unet") else ""
        raise UnsupportedModelError(
            f"{type(target).__name__} has no diffusion transformer.{unet} speca works on pipelines with a "
            "`transformer` component, such as DiTPipeline, FluxPipeline or HunyuanVideoPipeline."
        )
    return found


def _modules(target: Any) -> dict[str, nn.Module]:
    """Where the diffusion transformers of a pipeline are looked for, or the module itself."""
    if isinstance(target, nn.Module):
        return {"": target}
    components = getattr(target, "components", None)
    named = components.items() if isinstance(components, dict) else ()
    return {n: m for n, m in named if "transformer" in n and isinstance(m, nn.Module)}


def _uncompiled(model: nn.Module) -> nn.Module:
    """What `torch.compile(module)` has wrapped."""
    return model._modules.get("_orig_mod") or model


def _attach(model: nn.Module, run: Run) -> None:
    from .hook import calling_pipeline, register

    run.gate.attach()
    with _beneath_offloading(model):
        # What must be put back exactly, as diffusers leaves a registry and a forward on the instance.
        run.before = {
            n: model.__dict__[n] for n in ("forward", "_diffusers_hook", "_reset_stateful_cache") if n in model.__dict__
        }
        register(model, run, HOOK)
    if not hasattr(model, "_reset_stateful_cache"):  # classes without CacheMixin: pipelines reset what has the name
        model.__dict__["_reset_stateful_cache"] = lambda recurse=True: run.end(calling_pipeline())
    model.__dict__[ATTRIBUTE] = run
    ours = {ATTRIBUTE, "__reduce_ex__"} | ({"_reset_stateful_cache"} - run.before.keys())
    model.__dict__["__reduce_ex__"] = lambda protocol: plain_copy(model, protocol, run.before, ours)


def _detach(model: nn.Module) -> None:
    from .hook import unregister

    run: Run = model.__dict__.pop(ATTRIBUTE)
    del model.__dict__["__reduce_ex__"]
    run.gate.detach()
    registry = model.__dict__["_diffusers_hook"]
    with _beneath_offloading(model):
        unregister(model, HOOK)
        if "_reset_stateful_cache" not in run.before:
            model.__dict__.pop("_reset_stateful_cache", None)
        if not registry.hooks:
            if "_diffusers_hook" not in run.before:
                del model.__dict__["_diffusers_hook"]
            if "forward" not in run.before:
                model.__dict__.pop("forward", None)


@contextmanager
def _beneath_offloading(model: nn.Module) -> Iterator[None]:
    """Inside, the forward that can be wrapped or unwrapped is the one that accelerate has wrapped, if it has.

    Pipelines with model offload take accelerate's wrap off and put it on anew at the end of every call. What lies above
    it would be gone after the first call; and it would go itself with a hook that was registered before it.
    """
    outer = model.__dict__.get("forward") if "_old_forward" in model.__dict__ else None
    if outer is not None:
        model.__dict__["forward"] = model.__dict__["_old_forward"]
    try:
        yield
    finally:
        if outer is not None:
            model.__dict__["_old_forward"], model.__dict__["forward"] = model.forward, outer
