"""The checks of one case: on the main road, where outputs are forecast, and with verified drafts of features."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import speca
import tiny
from speca.core.controller import Plan, Planner, Record
from speca.diffusers.accelerator import ATTRIBUTE, Accelerator

from .cases import CASES, REASONS, Case
from .inputs import Time, made

STEPS = 10
EXACT = "bit-identical at threshold 0"
EXACT_FULL = "bit-identical with every step in full"
RULE = dict(threshold_decay=1.0, min_draft=0, max_draft=4, warmup=3)

SCHEDULER = SimpleNamespace(
    timesteps=1000 * (1 - torch.arange(STEPS) / STEPS),
    step=lambda output, timestep, sample: sample - output / STEPS,
)
"""A linear sampler whose timesteps are those of `loop`; its path is that of a flow."""
PLANNED = (0, 1, 4, 7)
"""Full steps of the schedule."""


def classes() -> dict[str, type[nn.Module]]:
    """Every model class that the installed diffusers defines among its transformers."""
    package = importlib.import_module("diffusers.models.transformers")
    found: dict[str, type[nn.Module]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        here = {n: v for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__}
        found |= {n: v for n, v in here.items() if issubclass(v, diffusers.ModelMixin)}
    return found


def untested() -> list[str]:
    """Classes of this diffusers that have neither a case nor a reason: new ones, most likely."""
    return sorted(set(classes()) - {case.cls for case in CASES} - set(REASONS))


def build(case: Case) -> Any:
    """The tiny model with every weight redrawn: gates that start at zero would make its blocks the identity."""
    torch.manual_seed(0)
    model = classes()[case.cls](**case.config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        scale = max(parameter.shape[-1], 1) ** -0.5 if parameter.dim() > 1 else 0.1
        centre = 1.0 if parameter.dim() == 1 and "norm" in name and name.endswith("weight") else 0.0
        parameter.data = (centre + scale * drawn).to(parameter.dtype)
    return model.eval().requires_grad_(False)


def loop(model: nn.Module, case: Case, rows: Sequence[int], watch: Any = None) -> list[list[Tensor]]:
    """Denoise `rows` together for STEPS steps; the outputs of every step, each of them rows first."""
    arguments = made(case.inputs, rows)
    name = case.latent or next(iter(arguments))
    steps = []
    for i in range(STEPS):
        times = {n: v.at(i / STEPS, len(rows)) for n, v in case.inputs.items() if isinstance(v, Time)}
        call = {**made(case.inputs, rows), name: arguments[name], **times}
        out = model(**{n: call[n] for n in case.inputs}, return_dict=False)
        outputs = [
            row_tensor(o, len(rows)) for o in (out if isinstance(out, (tuple, list)) else [out]) if o is not None
        ]
        steps.append(outputs)
        arguments[name] = advance(arguments[name], outputs[0])
        if watch is not None:
            watch()
    return steps


def row_tensor(out: Any, rows: int) -> Tensor:
    """An output with the rows first."""
    stacked = torch.stack(list(out)) if isinstance(out, (list, tuple)) else out
    return stacked.reshape(rows, -1)


def advance(latent: Any, velocity: Tensor) -> Any:
    """One Euler step of each row on its own; outputs of another size are cut or repeated to fit."""
    if isinstance(latent, list):
        return [advance(x[None], v[None])[0] for x, v in zip(latent, velocity, strict=True)]
    flat = latent.reshape(velocity.shape[0], -1)
    repeat = -(-flat.shape[1] // velocity.shape[1])
    v = velocity.repeat(1, repeat)[:, : flat.shape[1]]
    return (flat - v / v.norm(dim=1, keepdim=True) * flat.norm(dim=1, keepdim=True) / STEPS).reshape(latent.shape)


@dataclass
class Result:
    """What one case showed. `failures` names the checks that did not hold."""

    case: Case
    failures: list[str] = field(default_factory=list)
    finding: Any = None
    forecast: bool = False  # whether its outputs were forecast on the main road
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """Bit-identical with every step in full and at threshold 0, accelerated or run plainly."""
        return not {EXACT, EXACT_FULL} & set(self.failures) and not any("Error" in f for f in self.failures)

    @property
    def accelerated(self) -> bool:
        """Its outputs are forecast, and all checks hold."""
        return self.forecast and not self.failures

    @property
    def verified(self) -> bool:
        """Drafts of its features can be verified, and all checks hold."""
        return bool(self.finding and self.finding.supported and not self.failures)

    def demand(self, holds: bool, what: str) -> None:
        """Note `what` as failed unless it holds."""
        if not holds:
            self.failures.append(what)


def equal(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    """Bit for bit, every output of every step."""
    return all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))


def snapshot(model: nn.Module) -> Any:
    """What `disable` must give back."""
    own = sorted(k for k in model.__dict__)
    return (
        own,
        model.forward,
        [(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()],
        list(model.state_dict()),
    )


def check(case: Case) -> Result:
    """Run all checks of one case."""
    result, began = Result(case), time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _check(result, build(case))
        except Exception as problem:  # a check that cannot run is a failed check
            result.failures.append(f"{type(problem).__name__}: {problem}")
    result.notes = tuple(dict.fromkeys(str(w.message) for w in caught if str(w.message).startswith("speca:")))
    result.demand(sum("runs plainly" in note for note in result.notes) == bool(case.plain), "one warning if plain")
    result.seconds = time.perf_counter() - began
    return result


def _check(result: Result, model: Any) -> None:
    case, rows = result.case, list(range(result.case.rows))
    plain = loop(model, case, rows)
    result.demand(all(torch.isfinite(o).all() for step in plain for o in step), "finite")
    before = snapshot(model)
    _full(result, model, plain)
    _scheduled(result, model, rows)
    _staggered(result, model, rows)
    _verified(result, model, plain)
    speca.disable(model)
    result.demand(snapshot(model) == before, "restored by disable")
    result.demand(equal(loop(model, case, rows), plain), "same output after disable")


# ------------------------------------------------------------------------------------------------ the main road
def _full(result: Result, model: Any, plain: list[list[Tensor]]) -> None:
    """With every step in full, nothing is changed."""
    names = list(model.state_dict())
    speca.enable(model, scheduler=SCHEDULER, tolerance=0.0)
    result.demand(list(model.state_dict()) == names, "state dict unchanged while enabled")
    result.demand(equal(loop(model, result.case, list(range(result.case.rows))), plain), EXACT_FULL)
    result.demand({"".join(r.decisions) for r in _records(model)} == {"F" * STEPS}, "every step in full")


def _scheduled(result: Result, model: Any, rows: list[int]) -> None:
    """Full steps by a schedule: a draft runs nothing of the model, and what is held is what the report says."""
    speca.enable(model, scheduler=SCHEDULER, schedule=PLANNED, prior="none")
    accelerator, held, ran = _accelerator(model), [0], list[int]()
    with modules_run(model) as count:

        def watch() -> None:
            ran.append(count.pop() if count else 0)
            held.append(stored(accelerator.branches))

        together = loop(model, result.case, rows, watch)
    wanted = "".join("F" if step in PLANNED else "A" for step in range(STEPS))
    report = speca.report(model)
    result.forecast = {"".join(r.decisions) for r in _records(model)} == {wanted}
    result.demand(result.forecast, f"scheduled steps in full, the others forecast: {'; '.join(report.notes)}")
    result.demand(all((n > 0) == (i in PLANNED) for i, n in enumerate(ran)), "a draft runs nothing of the model")
    result.demand(report.evaluations == len(PLANNED) * len(rows), "evaluations of the scheduled steps alone")
    result.demand(report.host_reads == 0 and report.flops is None, "nothing is read or counted")
    result.demand(all(torch.isfinite(o).all() for step in together for o in step), "finite forecasts")
    told = report.bytes_per_sample
    result.demand(max(held) // len(rows) == told > 0, f"memory: {max(held) // len(rows)} held, {told} reported")
    result.demand(held[-1] == 0, "nothing held after the last step")


def _staggered(result: Result, model: Any, rows: list[int]) -> None:
    """Rows in full at different steps: each must give, and be told of its errors, what it does and is alone."""
    speca.enable(model, scheduler=SCHEDULER, tolerance=0.05, prior="none")
    accelerator = _accelerator(model)
    planner = accelerator.planner = Staggered(accelerator.config)
    together = loop(model, result.case, rows)
    records = list(_records(model))
    result.demand(len({"".join(r.decisions) for r in records}) == len(rows), "rows in full at different steps")
    for row in rows:
        planner.shift = row
        alone = loop(model, result.case, [row])
        (record,) = _records(model)
        result.demand(record.decisions == records[row].decisions, f"plan of row {row}")
        off = abs(record.planned - records[row].planned)
        result.demand(off <= 1e-3 * record.planned, f"errors of row {row}: {off:.1e} off {record.planned:.1e}")
        _compare(result, row, alone, together, "forecast")


class Staggered(Planner):
    """After the warm-up each sample is in full at every third step, the next sample one step before."""

    shift = 0

    def plan(self, record: Record) -> Plan:
        due = record.fulls < self.config.warmup or (record.step + record.sample + self.shift) % 3 == 0
        return Plan.FULL if due else Plan.DRAFT


@contextmanager
def modules_run(model: nn.Module) -> Iterator[list[int]]:
    """Inside, how many modules of the model have run since the list was last emptied."""
    count: list[int] = []
    parts = {id(module) for module in model.modules()} - {id(model)}

    def ran(module: nn.Module, _: Any) -> None:
        if id(module) in parts:
            count[:] = [sum(count) + 1]

    handle = nn.modules.module.register_module_forward_pre_hook(ran)
    try:
        yield count
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------ verified drafts
def _verified(result: Result, model: Any, plain: list[list[Tensor]]) -> None:
    """Drafts of features that a block of the model verifies, or a reason why there are none."""
    case, rows = result.case, list(range(result.case.rows))
    names = list(model.state_dict())
    speca.enable(model, tiny.VERIFYING, num_inference_steps=STEPS, threshold=0.0, min_draft=0)
    result.demand(list(model.state_dict()) == names, "state dict unchanged while enabled")
    result.demand(equal(loop(model, case, rows), plain), EXACT)
    result.finding = next(iter(_accelerator(model).drafts.findings.values()), None)
    supported = bool(result.finding and result.finding.supported)
    reason = result.finding.reason if result.finding else "no call was looked at"
    result.demand(supported != bool(case.plain), f"expected to be {'plain' if case.plain else 'verified'}: {reason}")
    result.demand(case.plain in reason, f"another reason: {reason}")
    if supported:
        decided = {letter for r in _records(model) for letter in r.decisions}
        result.demand(decided == {"F", "R"}, "every draft rejected at threshold 0")
        _mixed(result, model, rows)
        _memory(result, model, rows)


def _mixed(result: Result, model: Any, rows: list[int]) -> None:
    """Rows that decide differently in one batch: each must do and give what it does and gives alone."""
    case = result.case
    speca.enable(model, tiny.VERIFYING, num_inference_steps=STEPS, threshold=1e9, **RULE)
    loop(model, case, rows)
    decided: list[str] = []
    for threshold in _between([e for r in _records(model) for e in r.errors if e is not None]):
        speca.enable(model, tiny.VERIFYING, num_inference_steps=STEPS, threshold=threshold, **RULE)
        together = loop(model, case, rows)
        decided = ["".join(r.decisions) for r in _records(model)]
        if {"A", "R"} <= set("".join(decided)) and (len(rows) == 1 or len(set(decided)) > 1):
            break
    else:
        result.demand(False, "a threshold at which rows decide differently")
        return
    for row in rows:
        alone = loop(model, case, [row])
        result.demand(["".join(r.decisions) for r in _records(model)] == [decided[row]], f"decisions of row {row}")
        _compare(result, row, alone, together, "verified")


def _between(errors: list[float]) -> list[float]:
    """Thresholds between neighbouring errors, the widest gaps first: none of them close to an error."""
    ordered = sorted(set(errors))
    gaps = sorted(((high / low, low) for low, high in itertools.pairwise(ordered) if low > 0), reverse=True)
    return [low * ratio**0.5 for ratio, low in gaps[:8]]


def _compare(result: Result, row: int, alone: list[list[Tensor]], together: list[list[Tensor]], how: str) -> None:
    """Demand that a row gives alone what it gives among others."""
    worst = max(
        float((b[row] - a[0]).norm() / a[0].norm()) for x, y in zip(alone, together, strict=True)
        for a, b in zip(x, y, strict=True)
    )  # fmt: skip
    result.demand(worst < 1e-3, f"{how} values of row {row}: off by {worst:.1e}")


def _accelerator(model: Any) -> Accelerator:
    accelerator: Accelerator = model.__dict__[ATTRIBUTE]
    return accelerator


def _records(model: Any) -> Any:
    return _accelerator(model).branches["call"].records


def _memory(result: Result, model: Any, rows: list[int]) -> None:
    """Bytes of all tensors held between steps, at their highest, against the report's figure."""
    speca.enable(model, tiny.VERIFYING, num_inference_steps=STEPS, threshold=1e9, **RULE)
    accelerator, held = _accelerator(model), [0]
    gate = vars(accelerator.drafts.gate)
    loop(model, result.case, rows, lambda: held.append(stored([accelerator.branches, gate])))
    told = speca.report(model).bytes_per_sample
    result.demand(max(held) // len(rows) == told > 0, f"memory: {max(held) // len(rows)} held, {told} reported")
    result.demand(held[-1] == 0, "nothing held after the last step")


def stored(root: Any) -> int:
    """Bytes of the storages of all tensors that plain objects reach from `root`; the model itself does not count."""
    sizes: dict[int, int] = {}
    stack, seen = [root], set[int]()
    while stack:
        item = stack.pop()
        if isinstance(item, (nn.Module, type)) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            sizes[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (list, tuple)):
            stack += item
        else:
            stack += getattr(item, "__dict__", {}).values()
    return sum(sizes.values())
