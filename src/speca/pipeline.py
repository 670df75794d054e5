"""enable, disable, report: the root hook that joins a pipeline, its clock, the gate and the speculator."""

from __future__ import annotations

import inspect
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .config import MIN_STEPS, SpecaConfig
from .core.controller import FULL
from .errors import ConfigError, NotEnabledError, UnsupportedModelError
from .model import rows as rowwise
from .model.calls import Call, Clock, time_argument
from .model.gate import Gate, block_lists
from .model.probe import Discovery, Forward, discover
from .report import Report, SampleReport
from .speculator import Branch, Speculator, Spent, Work

HOOK = "speca"
ATTRIBUTE = "_speca_run"
MAX_TIED = 4  # rows of one image that a pipeline may stack in one call: cond, uncond and up to two more


class Run:
    """Acceleration of one transformer: what is known of the model, and the trajectories now running."""

    def __init__(self, model: nn.Module, config: SpecaConfig, clock: Clock) -> None:
        self.model, self.config, self.clock = model, config, clock
        self.gate = Gate(model)
        self.speculator = Speculator(config, self.gate)
        self.branches: dict[str, Branch] = {}
        self.findings: dict[object, Discovery] = {}
        self.notes: list[str] = []
        self.once: tuple[str, ...] = ()  # notes on the last run only
        self.before: dict[str, Any] = {}
        self._signature = inspect.signature(type(model).forward)
        self._time = time_argument(model)

    def call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        """Answer one call of the transformer, accelerated where that is safe, plainly elsewhere."""
        arguments = self._bind(args, kwargs)
        if self.model.training or self._time is None or not arguments:
            reason = "it is in training mode" if self.model.training else "its forward has no timestep argument"
            self._note(f"{type(self.model).__name__} runs plainly: {reason}.")
            return forward(*args, **kwargs)
        try:
            return self._play(forward, arguments, context)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End of a pipeline call, or an exception: drop every feature; the records stay for the report."""
        self.gate.forget()
        self.clock.reset()
        for branch in self.branches.values():
            branch.history = None

    def report(self) -> Report:
        """Cost and savings of the last run.

        Raises:
            NotEnabledError: nothing has run yet.
        """
        if not self.branches and not self.notes:
            raise NotEnabledError("nothing has run yet; call the pipeline first, then ask for the report.")
        records: dict[int, list[Any]] = {}
        for branch in self.branches.values():
            for trajectory in branch.trajectories:
                records.setdefault(trajectory.sample, []).append(trajectory)
        samples = tuple(SampleReport.merge(i, records[i]) for i in sorted(records))
        spent, rates = self.speculator.spent, self.speculator.spent.full_rates
        rows_per_step = sum(b.rows for b in self.branches.values())
        held = sum(b.bytes for b in self.branches.values())
        steps = max((len(s.decisions) for s in samples), default=0)
        return Report(
            model=type(self.model).__name__,
            config=self.config.to_dict(),
            steps=steps,
            samples=samples,
            flops=spent.flops,
            flops_full=spent.flops_full,
            seconds=spent.seconds,
            seconds_full=median(rates) * rows_per_step * steps if rates else None,
            bytes_per_sample=held // max(1, len(samples)),
            host_reads=spent.host_reads,
            notes=(*self.notes, *self.once),
        )

    # -------------------------------------------------------------------------------------------- one call
    def _play(self, forward: Forward, arguments: dict[str, Any], context: Any) -> Any:
        first = next(iter(arguments.values()))
        rows, kind = rowwise.batch_size(first), _kind(arguments)
        reads = self.clock.device_reads
        call = self.clock.place(arguments.get(self._time or ""), context, (rows, kind))
        if call is None:
            self._note("a call runs plainly: its step is not on the scheduler's time axis, or rows differ in time.")
            return forward(**arguments)
        if call.fresh:
            self.branches, self.speculator.spent, self.once = {}, Spent(), ()
        if call.position.total < MIN_STEPS:
            self._note(f"{call.position.total} steps leave nothing to forecast (at least {MIN_STEPS}); ran plainly.")
            return forward(**arguments)
        self.speculator.spent.host_reads += self.clock.device_reads - reads
        branch = self._branch(call, first, rows)
        finding = self.findings.get(kind)
        if finding is None:
            return self._discover(branch, call, forward, arguments, kind)
        if not finding.supported:
            return forward(**arguments)
        return self.speculator.play(Work(branch, call.position, finding, forward, arguments))

    def _discover(self, branch: Branch, call: Call, forward: Forward, arguments: dict[str, Any], kind: object) -> Any:
        """The first call of its kind runs in full and is learnt from."""
        began = time.perf_counter()
        out, finding = discover(self.gate, forward, arguments, branch.rows)
        self.findings[kind] = finding
        features = self.gate.features
        self.gate.forget()
        if not finding.supported or features is None:
            self._note(f"{type(self.model).__name__} runs plainly: {finding.reason}")
            return out
        for trajectory in branch.trajectories:
            trajectory.step, trajectory.total = call.position.index, call.position.total
            trajectory.note(FULL)
        self.speculator.record(branch, branch.trajectories, call.position, features)
        self.speculator.spent.add_probe(finding, branch.rows, time.perf_counter() - began)
        self.once = ("cost and time include the self-test, which runs once for a model and input size",)
        return out

    def _branch(self, call: Call, first: Any, rows: int) -> Branch:
        """The branch of this call, begun if it is new; its ties are confirmed at its second step."""
        branch = self.branches.get(call.branch)
        if branch is None:
            branch = self.branches[call.branch] = Branch.begin(rows, _stacked(first, rows))
            return branch
        first_record = branch.trajectories[0]
        second_step = branch.tied and len(first_record.decisions) == 1
        if second_step and _stacked(first, rows) != len(first_record.rows):
            branch.untie()
        return branch

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, in the order of the signature; keyword arguments of `**kwargs` follow."""
        bound = dict(self._signature.bind(self.model, *args, **kwargs).arguments)
        bound.pop(next(iter(self._signature.parameters)))
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        return bound

    def _note(self, text: str) -> None:
        """Tell the user once, and in the report."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(f"speca: {text}", stacklevel=2)


def _kind(arguments: dict[str, Any]) -> object:
    """What one finding of the probe holds for: shapes without rows, dtypes, devices, and options that steer blocks."""
    parts: list[object] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            parts.append((name, value.shape[1:], value.dtype, value.device))
        elif isinstance(value, (bool, int, str, type(None))):
            parts.append((name, value))
        elif isinstance(value, (list, tuple)):
            tensors = {(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else repr(v) for v in value}
            parts.append((name, frozenset(tensors)))
        else:
            parts.append((name, type(value)))
    return tuple(parts)


def _stacked(first: Any, rows: int) -> int:
    """Rows per image: guidance stacks copies of the same latents, so equal parts of a batch are its branches."""
    for parts in range(min(MAX_TIED, rows), 1, -1):
        if rows % parts == 0:
            n = rows // parts
            chunks = [first[k * n : (k + 1) * n] for k in range(parts)]
            if all(_equal(chunks[0], c) for c in chunks[1:]):
                return parts
    return 1


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ public functions
def enable(
    target: Any,
    preset: str | SpecaConfig = "balanced",
    *,
    scheduler: Any = None,
    num_inference_steps: int | None = None,
    **overrides: Any,
) -> Any:
    """Accelerate a diffusers pipeline, or a bare transformer, in place.

        speca.enable(pipe)                                   # preset "balanced"
        speca.enable(pipe, "fast", max_draft=10)             # a preset with one number changed
        speca.enable(transformer, scheduler=scheduler, num_inference_steps=50)   # one's own sampling loop

    Enabling again replaces the settings. The object itself is returned.

    Args:
        target: a pipeline with one or more diffusion transformers, or such a transformer.
        preset: "faithful", "balanced", "fast" or "paper", or a `SpecaConfig`.
        scheduler: for a bare transformer, the scheduler whose timesteps it is given.
        num_inference_steps: for a bare transformer without scheduler, the number of steps, at least 4.
        **overrides: any field of `SpecaConfig`.

    Raises:
        ConfigError: an unknown preset or setting, or a value out of range.
        UnsupportedModelError: no diffusion transformer here, for instance a UNet.
    """
    config = SpecaConfig.build(preset, **overrides)
    models = transformers_of(target)
    if isinstance(target, nn.Module):
        if scheduler is None and num_inference_steps is None:
            raise ConfigError(
                "a bare transformer does not know where a step stands; pass scheduler= (the one you step) "
                "or num_inference_steps=."
            )
        source = (lambda: scheduler) if scheduler is not None else None
    else:
        pipe = weakref.ref(target)  # the pipeline may be dropped, copied or given another scheduler
        source = lambda: getattr(pipe(), "scheduler", None)  # noqa: E731 - two sources, one name
    if num_inference_steps is not None and num_inference_steps < MIN_STEPS:
        raise ConfigError(
            f"num_inference_steps={num_inference_steps} leaves nothing to forecast; use at least {MIN_STEPS} steps, "
            "or run without speca."
        )
    disable(target)
    for model in models:
        _attach(model, Run(model, config, Clock(source, num_inference_steps)))
    return target


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
    """Per sample: full, accepted, rejected, worst error; in all: FLOPs and time against full.

    A pipeline with several transformers reports the one that ran last.

    Raises:
        NotEnabledError: not enabled, or nothing has run yet.
    """
    runs: list[Run] = [m.__dict__[ATTRIBUTE] for m in transformers_of(target) if ATTRIBUTE in m.__dict__]
    if not runs:
        raise NotEnabledError("speca is not enabled on this object; call speca.enable(...) first.")
    ran = [run for run in runs if run.branches]
    return (ran or runs)[-1].report()


def transformers_of(target: Any) -> list[nn.Module]:
    """The diffusion transformers of a pipeline, or the transformer itself.

    Raises:
        UnsupportedModelError: none found.
    """
    if isinstance(target, nn.Module):
        if not block_lists(target):
            raise UnsupportedModelError(f"{type(target).__name__} has no list of transformer blocks to skip.")
        return [target]
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise UnsupportedModelError(
            f"expected a diffusers pipeline or a transformer module, got {type(target).__name__}."
        )
    found = [m for n, m in components.items() if "transformer" in n and isinstance(m, nn.Module) and block_lists(m)]
    if not found:
        unet = " Its denoiser is a UNet, which has no stack of blocks to forecast;" if "unet" in components else ""
        raise UnsupportedModelError(
            f"{type(target).__name__} has no diffusion transformer.{unet} speca works on pipelines with a "
            "`transformer` component, such as DiTPipeline, FluxPipeline or HunyuanVideoPipeline."
        )
    return found


def _attach(model: nn.Module, run: Run) -> None:
    from diffusers.hooks import HookRegistry

    from .hook import root_hook

    # What must be put back exactly, as diffusers leaves a registry and a forward on the instance.
    run.before = {
        n: model.__dict__[n] for n in ("forward", "_diffusers_hook", "_reset_stateful_cache") if n in model.__dict__
    }
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(root_hook(run), HOOK)
    registry.invalidate_child_registries_cache()
    run.gate.attach()
    if not hasattr(model, "_reset_stateful_cache"):  # classes without CacheMixin: pipelines reset what has the name
        model.__dict__["_reset_stateful_cache"] = lambda recurse=True: run.end()
    model.__dict__[ATTRIBUTE] = run


def _detach(model: nn.Module) -> None:
    run: Run = model.__dict__.pop(ATTRIBUTE)
    run.gate.detach()
    registry = model.__dict__["_diffusers_hook"]
    registry.remove_hook(HOOK, recurse=False)
    if "_reset_stateful_cache" not in run.before:
        model.__dict__.pop("_reset_stateful_cache", None)
    if not registry.hooks:
        if "_diffusers_hook" not in run.before:
            del model.__dict__["_diffusers_hook"]
        if "forward" not in run.before:
            model.__dict__.pop("forward", None)
