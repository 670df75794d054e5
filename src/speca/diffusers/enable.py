"""enable, disable, enabled, report: the public functions, and how an accelerator is attached to a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from ..calibration.cache import PriorCache, default_folder, fingerprint
from ..calibration.file import Calibration, Given, known_from
from ..calibration.knowledge import Knowledge
from ..config import MIN_STEPS, Config, SpecaConfig, VerifiedConfig
from ..errors import ConfigError, NotEnabledError, UnsupportedModelError
from ..reports.report import Report
from ..verified.gate import block_lists, demand_free
from .accelerator import ATTRIBUTE, Accelerator
from .companions import bare, demand_alone, hookable, plain_copy
from .components import controlnets_of, denoisers_of, time_of_call

HOOK = "speca"
CONTROLNET = "_speca_controlnet"
"""Attribute that marks a ControlNet whose calls are skipped."""


def enable(
    target: Any,
    preset: str | Config = "balanced",
    *,
    scheduler: Any = None,
    num_inference_steps: int | None = None,
    calibration: Given | Knowledge | Literal["auto", "online", False] | None = "auto",
    time: str | None = None,
    branches: int = 1,
    **overrides: Any,
) -> Any:
    """Accelerate a diffusers pipeline, or a single denoising model, in place.

        speca.enable(pipe)                                   # preset "balanced"
        speca.enable(pipe, tolerance=0.005)                  # the error that drafts may cause
        speca.enable(pipe, speedup=4)                        # no sample takes more than a quarter of its steps in full
        speca.enable(pipe, calibration="flux-35.json")       # what speca.calibrate found for a quality
        speca.enable(model, scheduler=scheduler)             # one's own sampling loop

    Enabling again replaces the settings. The object itself is returned.

    Args:
        target: a pipeline with a transformer or a U-Net, or such a model.
        preset: "faithful", "balanced", "fast" or "paper", or a `SpecaConfig` or `VerifiedConfig`.
        scheduler: for a single model, the scheduler whose timesteps it is given and whose `step` is given its output;
            `speca/sampler/scheduler.py` says what one of your own must offer.
        num_inference_steps: for a single model without scheduler, the number of its calls in a run, at least 4.
        calibration: what is known of the model. "auto": the calibration in the folder that the pipeline came from,
            `speca.json`, if it is there and fits; else what earlier runs on this machine have taught; else the first
            run is computed in full, and later ones use what it shows (docs/method.md). "online": the same, but of
            that first run every third step is computed, which teaches a little less. None: the same without
            learning. False: nothing. Or what `speca.calibrate` found, its file, or a `Prior`. A calibration gives the
            tolerance too, for a preset without `tolerance` or `speedup`.
        time: for a single model, the name of the argument that carries the time, if it is none of the usual ones; one
            inside a dictionary is written with a dot, "cond.sigma".
        branches: for a single model in one's own loop, how many guidance branches it stacks in one call: 2 where the
            first half of the rows is cond and the second uncond. Pipelines tell this themselves.
        **overrides: any field of the preset's configuration.

    Raises:
        ConfigError: an unknown preset or setting, a value out of range, a calibration of another model, or a cache of
            diffusers that is enabled.
        UnsupportedModelError: there is no denoising model here.
    """
    models = [hookable(model) for model in denoisers_of(target)]
    config = SpecaConfig.build(preset, **overrides)
    knowledge = _knowledge(calibration, target, models)
    _demand_placed(target, scheduler, num_inference_steps, branches)
    for model in models:
        demand_alone(model)
        if isinstance(config, VerifiedConfig):
            _demand_blocks(bare(model))
    disable(target)
    try:
        for model in models:
            accelerator = Accelerator(
                bare(model), config, target, scheduler=scheduler, steps=num_inference_steps, knowledge=knowledge,
                time=time, branches=branches, compiled=bare(model) is not model,
            )  # fmt: skip
            _attach(model, accelerator)
        _attach_controlnets(target, models)
    except ConfigError:  # two of them share their blocks
        disable(target)
        raise
    return target


def _demand_placed(target: Any, scheduler: Any, num_inference_steps: int | None, branches: int) -> None:
    """Refuse what does not say where the steps of a single model stand. Raises `ConfigError`."""
    if isinstance(target, nn.Module) and scheduler is None and num_inference_steps is None:
        raise ConfigError(
            "a single model does not know where a step stands; pass scheduler= (the one you step) "
            "or num_inference_steps=."
        )
    if num_inference_steps is not None and num_inference_steps < MIN_STEPS:
        raise ConfigError(
            f"num_inference_steps={num_inference_steps} leaves nothing to forecast; use at least {MIN_STEPS} steps, "
            "or run without speca."
        )
    if branches < 1:
        raise ConfigError(f"branches={branches} must be 1 or more: how many rows of a call belong to one sample.")


def disable(target: Any) -> Any:
    """Undo `enable` exactly: forward, classes, attributes and `state_dict` are as before. Harmless if not enabled."""
    for model, _ in _accelerated(target):
        _detach(model)
    for model in controlnets_of(target):
        if CONTROLNET in model.__dict__:
            _unhook(model, model.__dict__.pop(CONTROLNET), model.__dict__)
    return target


@contextmanager
def enabled(target: Any, preset: str | Config = "balanced", **settings: Any) -> Iterator[Session]:
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
        """Return the report of the last run inside the block. Raises `NotEnabledError` if nothing ran."""
        return self._last if self._last is not None else report(self._target)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the target is exactly as without speca; afterwards it goes on with what is known of the model."""
        found = _accelerated(self._target)
        for model, _ in found:
            _detach(model)
        try:
            yield
        finally:
            for model, accelerator in found:
                _attach(model, accelerator)

    def close(self) -> None:
        """Keep the last report and disable."""
        try:
            self._last = report(self._target)
        except NotEnabledError:
            self._last = None
        disable(self._target)


def report(target: Any) -> Report:
    """Return what each sample did (full, accepted, rejected, checked), and cost and time against the full run.

    Of a pipeline: its last run, all its models together. Of a model: the last run it took part in.

    Raises:
        NotEnabledError: not enabled, or nothing has run yet.
    """
    found = accelerators_of(target)
    if not found:
        raise NotEnabledError("speca is not enabled on this object; call speca.enable(...) first.")
    return next((a for a in found if a.last), found[0]).report(target)


def accelerators_of(target: Any) -> list[Accelerator]:
    """Return the accelerators of a pipeline's models, or of a model; none if it is not enabled."""
    return [accelerator for _, accelerator in _accelerated(target)]


def _accelerated(target: Any) -> list[tuple[nn.Module, Accelerator]]:
    """The accelerated modules of a pipeline, or the module itself, without what has wrapped them since."""
    models = [m if ATTRIBUTE in m.__dict__ else bare(m) for m in denoisers_of(target)]
    return [(m, m.__dict__[ATTRIBUTE]) for m in models if ATTRIBUTE in m.__dict__]


def _knowledge(calibration: Any, target: Any, models: list[nn.Module]) -> Knowledge:
    """What is known of the models: the calibration that was given, which has to fit, or the one that the pipeline came
    with, and what this machine has learnt."""
    if calibration is None or calibration in ("auto", "online"):
        folder = default_folder() if calibration else None
        known = Calibration.beside(target)
        if not calibration or folder is None:
            return Knowledge(known)

        def weights() -> str:
            return "-".join(fingerprint(bare(model)) for model in models)

        return Knowledge(known, PriorCache(folder), weights, in_full=calibration == "auto")
    if isinstance(calibration, Knowledge):
        return calibration
    found = known_from(calibration)
    if isinstance(found, Calibration):
        found.demand_fit(type(bare(models[0])).__name__)
    return Knowledge(found)


def _demand_blocks(model: nn.Module) -> None:
    """Refuse to verify drafts of a model without lists of blocks."""
    if not block_lists(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks, and preset 'paper' forecasts what enters the last of them; "
            "use another preset, which forecasts the model's output."
        )
    demand_free(model)


def _attach_controlnets(target: Any, models: list[nn.Module]) -> None:
    from .hook import ControlNetHook, register

    accelerators = [model.__dict__[ATTRIBUTE] for model in models]
    for model in controlnets_of(target):
        if CONTROLNET not in model.__dict__ and not isinstance(accelerators[0].config, VerifiedConfig):
            before = {n: model.__dict__[n] for n in ("forward", "_diffusers_hook") if n in model.__dict__}
            hook = ControlNetHook(lambda p, time: any(a.is_drafted(p, time) for a in accelerators), time_of_call(model))
            register(model, hook, HOOK)
            model.__dict__[CONTROLNET] = before


def _attach(model: nn.Module, accelerator: Accelerator) -> None:
    from .hook import RootHook, register
    from .stack import calling_pipeline

    inner = bare(model)
    if isinstance(accelerator.config, VerifiedConfig):
        accelerator.drafts.gate.attach()
    with _beneath_offloading(model):
        # What must be put back exactly, as diffusers leaves a registry and a forward on the instance.
        accelerator.before = {n: model.__dict__[n] for n in ("forward",) if n in model.__dict__}
        accelerator.before |= {
            n: inner.__dict__[n] for n in ("_diffusers_hook", "_reset_stateful_cache") if n in inner.__dict__
        }
        register(model, RootHook(accelerator), HOOK)
    if not hasattr(inner, "_reset_stateful_cache"):  # classes without CacheMixin: pipelines reset what has the name
        inner.__dict__["_reset_stateful_cache"] = lambda recurse=True: accelerator.end(calling_pipeline())
    model.__dict__[ATTRIBUTE] = accelerator
    ours = {ATTRIBUTE, "__reduce_ex__"} | ({"_reset_stateful_cache"} - accelerator.before.keys())
    if inner is model:
        model.__dict__["__reduce_ex__"] = lambda protocol: plain_copy(model, protocol, accelerator.before, ours)


def _detach(model: nn.Module) -> None:
    accelerator: Accelerator = model.__dict__.pop(ATTRIBUTE)
    accelerator.end()
    inner = bare(model)
    model.__dict__.pop("__reduce_ex__", None)
    accelerator.drafts.detach()
    with _beneath_offloading(model):
        if "_reset_stateful_cache" not in accelerator.before:
            inner.__dict__.pop("_reset_stateful_cache", None)
        _unhook(model, accelerator.before, inner.__dict__)


def _unhook(model: nn.Module, before: dict[str, Any], where: dict[str, Any]) -> None:
    """Take the hook off, and what diffusers has left on the instance if it was not there `before`."""
    from .hook import unregister

    registry = where["_diffusers_hook"]
    unregister(model, HOOK)
    if not registry.hooks:
        if "_diffusers_hook" in before:
            where["_diffusers_hook"] = before["_diffusers_hook"]
        else:
            del where["_diffusers_hook"]
        if "forward" not in before:
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
