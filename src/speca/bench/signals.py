"""Compare each error signal with the true error of drafts and with their effect on the final sample.

A run has a few consecutive drafts at one place and only full steps after it; a second run has full steps at that place
too. The difference of the two final samples is the *effect* of the drafts. At each draft, a plain copy of the
transformer computes the full output of the same inputs; the difference is the *true error*. The signals are:

- `last block`: the paper's check, the verify block's output against its forecast;
- `first block`: how much the first block's change of its input differs from that of the last full step (FBCache);
- `input`: how much the latents have changed since the last full step;
- `disagreement`: difference of the order-1 and order-2 forecasts of the last block's output (as in RACER);
- `corrector`: relative size of the last correction.

Each signal is also reported *weighted* by the change of the final sample per unit change of the output at that step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..config import SpecaConfig, VerifiedConfig
from ..core.controller import ACCEPTED, Plan, Planner, Record
from ..diffusers.enable import accelerators_of, enabled
from ..errors import InputError
from ..reports.measure import run_once
from ..sampler.scheduler import scheduler_response
from ..verified.gate import block_lists
from ..verified.rules import ScheduleRule
from .recording import effect_of
from .setup import Call, transformer_of

PERIOD, DRAFTS, PLACES = 4, 4, 12
"""Interval of full steps before the place, number of drafts at the place, number of places in a run."""


class Taken:
    """Records of one run: per step latents, outputs and features of the plain model, and errors of the check."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.given: list[Tensor] = []
        self.true: list[Tensor] = []
        self.first: list[Tensor] = []
        self.last: list[Tensor] = []
        self.errors: list[dict[int, float | None]] = []
        self.estimates: list[dict[int, float]] = []  # by step, of each sample: the newest estimate


def signal_rows(pipe: Any, call: Call, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return one row per place and sample: signals, true error of the output, and effect on the final sample.

    Raises:
        InputError: the transformer is called more than once a step, or its scheduler is not linear.
    """
    steps = call["num_inference_steps"]
    rows: list[dict[str, Any]] = []
    begin = PERIOD + 3
    places = sorted({round(begin + k * (steps - DRAFTS - begin) / (PLACES - 1)) for k in range(PLACES)})
    for place in places:
        prefix = sorted({0, 1} | {k for k in range(2, place) if (place - 1 - k) % PERIOD == 0})
        taken, images = _run(pipe, call, seeds, [*prefix, *range(place + DRAFTS, steps)])
        _, others = _run(pipe, call, seeds, [*prefix, *range(place, steps)], watch=False)
        response = scheduler_response(pipe.scheduler)
        found, reason = response.transitions, response.reason
        if len(taken.given) != steps or len(found) != steps:
            raise InputError(f"signals need one call of the transformer a step and a linear sampler; {reason}")
        effect = torch.tensor(effect_of(found)).abs()
        change = (images - others).flatten(1).norm(dim=1) / others.flatten(1).norm(dim=1)
        for sample in range(len(seeds)):
            row = _signals_at(taken, range(place, place + DRAFTS), prefix, sample, len(seeds), effect)
            rows.append(
                {"kind": "signal", "place": place, "seed": seeds[sample], **row, "effect": _short(change[sample])}
            )
    return rows


def _run(pipe: Any, call: Call, seeds: Sequence[int], full: Sequence[int], watch: bool = True) -> tuple[Taken, Tensor]:
    """Run with full steps at `full` and checked drafts elsewhere; return images (N, ...) and records.

    If records are kept, a second run with the same full steps forecasts outputs and gives the sizes of corrections.
    """
    taken, model = Taken(), transformer_of(pipe)
    plain = copy.deepcopy(model)
    config = VerifiedConfig(
        rule="schedule", schedule=tuple(full), warmup=2, final=0, threshold=1e9, threshold_decay=1.0
    )  # fmt: skip
    with enabled(pipe, config, calibration=None) as session:
        accelerators_of(pipe)[0].drafts.rule = _Checking(config)
        hooks = _watched(model, plain, taken) if watch else nullcontext()
        with hooks:
            made = run_once(pipe, call, list(seeds), session)
    assert made.report is not None
    for sample in made.report.samples:
        for step, (letter, error) in enumerate(zip(sample.decisions, sample.errors, strict=True)):
            if step >= len(taken.errors):
                taken.errors.append({})
            taken.errors[step][sample.index] = error if letter == ACCEPTED else None
    if watch:
        taken.estimates = _corrections(pipe, call, seeds, full)
    return taken, made.images


class _Checking(ScheduleRule):
    """Every draft is checked."""

    def plan(self, record: Record) -> Plan:
        return Plan.CHECKED if super().plan(record) is Plan.DRAFT else Plan.FULL


def _corrections(pipe: Any, call: Call, seeds: Sequence[int], full: Sequence[int]) -> list[dict[int, float]]:
    """Return, for each step and sample, the size of its last correction in a run with full steps at `full`."""
    found: dict[int, dict[int, float]] = {}

    class Observing(Planner):
        measures = True

        def observe(self, record: Record, error: float, drafts: int) -> None:
            if record.streak:
                found.setdefault(record.step, {})[record.sample] = max(error, 0.0)

    config = SpecaConfig(schedule=tuple(full), tolerance=0.0, prior="none")
    with enabled(pipe, config, calibration=False) as session:
        accelerators_of(pipe)[0].planner = Observing(config)
        run_once(pipe, call, list(seeds), session)
    newest: dict[int, float] = {}
    estimates = []
    for step in range(call["num_inference_steps"]):
        newest.update(found.get(step, {}))
        estimates.append(dict(newest))
    return estimates


@contextmanager
def _watched(model: Any, plain: Any, taken: Taken) -> Iterator[None]:
    """At every call of `model`, run `plain` on the same inputs and record the outputs of both."""
    blocks = [block for stack in block_lists(plain).values() for block in stack]
    seen: dict[str, Tensor] = {}

    def first(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen["first"] = _main(out, given) - given

    def last(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        seen["last"] = _main(out, args[0] if args else kwargs["hidden_states"])

    def after(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        with torch.no_grad():
            true = plain(*args, **kwargs)
        given = args[0] if args else kwargs["hidden_states"]
        taken.inputs.append(given.detach().float().clone())
        taken.given.append(_tensor(out).detach().float().clone())
        taken.true.append(_tensor(true).detach().float().clone())
        taken.first.append(seen["first"].detach().float().clone())
        taken.last.append(seen["last"].detach().float().clone())

    handles = [
        blocks[0].register_forward_hook(first, with_kwargs=True),
        blocks[-1].register_forward_hook(last, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensor(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


def _main(out: Any, given: Tensor) -> Tensor:
    """Return the output of a block with the shape of its hidden states, the last if there are several."""
    parts = [out] if isinstance(out, Tensor) else list(out)
    return next((part for part in parts if isinstance(part, Tensor) and part.shape == given.shape), _tensor(out))


def _signals_at(
    taken: Taken, place: range, full: Sequence[int], sample: int, count: int, effect: Tensor
) -> dict[str, Any]:
    """Return the signals of one sample: the maximum over the drafts at the place, plain and weighted by `effect`."""
    rows = range(sample, len(taken.given[0]), count)  # conditional and unconditional row of one image, if stacked
    anchors = full[-3:]
    plain: dict[str, list[float]] = {}
    for step in place:
        last = full[-1]
        forecasts = [_forecast(taken.last, anchors[-order - 1 :], step, rows) for order in (1, 2)]
        values = {
            "true error": _relative(taken.given[step], taken.true[step], rows),
            "last block": taken.errors[step].get(sample) or 0.0,
            "first block": _relative(taken.first[last], taken.first[step], rows),
            "input": _relative(taken.inputs[last], taken.inputs[step], rows),
            "disagreement": max(float((a - b).norm() / a.norm()) for a, b in zip(*forecasts, strict=True)),
            "corrector": taken.estimates[last].get(sample, 0.0),
        }
        for name, value in values.items():
            plain.setdefault(name, []).append(value)
    out: dict[str, Any] = {"true error": _short(max(plain.pop("true error")))}
    weights = effect[list(place)].tolist()
    for name, series in plain.items():
        out[name] = _short(max(series))
        out[f"{name}, weighted"] = _short(max(w * v for w, v in zip(weights, series, strict=True)))
    return out


def _relative(one: Tensor, other: Tensor, rows: range) -> float:
    """Return the largest error over the rows of a sample: `||one - other|| / ||other||`."""
    return max(float((one[r] - other[r]).norm() / other[r].norm().clamp_min(1e-12)) for r in rows)


def _forecast(features: Sequence[Tensor], anchors: Sequence[int], step: int, rows: range) -> list[Tensor]:
    """Return the polynomial through the features at the steps `anchors`, evaluated at `step`, per row."""
    from .recording import lagrange

    weights = lagrange(torch.tensor([step]).numpy(), list(anchors))[0]
    return [
        sum((float(w) * features[a][r] for w, a in zip(weights, anchors, strict=True)), torch.zeros(())) for r in rows
    ]


def _short(value: Any) -> float:
    return float(f"{float(value):.5g}")


# ------------------------------------------------------------------------------------------------ rank statistics
TRUTHS = ("true error", "effect")
BAD = 0.75  # quantile above which a draft is one that should have been rejected


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return Spearman's rank correlation and area under the ROC curve of each signal, for true error and effect."""
    signals = [r for r in rows if r["kind"] == "signal"]
    if not signals:
        return []
    names = [n for n in signals[0] if n not in ("kind", "place", "seed", *TRUTHS)]
    out = []
    for name in [*names, "true error"]:
        entry: dict[str, Any] = {"signal": name}
        for truth in TRUTHS:
            x, y = (torch.tensor([r[n] for r in signals], dtype=torch.float64) for n in (name, truth))
            entry[f"spearman {truth}"] = spearman(x, y)
            entry[f"auc {truth}"] = auc(x, y > y.quantile(BAD))
            entry[f"within {truth}"] = _within(signals, name, truth)
        out.append(entry)
    return out


def _within(signals: Sequence[dict[str, Any]], name: str, truth: str) -> float:
    """Return the mean over places of the rank correlation among samples, which excludes differences between places."""
    found: list[float] = []
    for place in {r["place"] for r in signals}:
        some = [r for r in signals if r["place"] == place]
        x, y = (torch.tensor([r[n] for r in some], dtype=torch.float64) for n in (name, truth))
        if len(some) > 2 and x.std() > 0 and y.std() > 0:
            found.append(spearman(x, y))
    return float(sum(found) / len(found)) if found else float("nan")


def ranks(values: Tensor) -> Tensor:
    """Return ranks (N,) from 1; ties get their mean rank."""
    below = (values[:, None] > values[None]).sum(1).double()
    same = (values[:, None] == values[None]).sum(1).double()
    return below + (same + 1) / 2


def spearman(x: Tensor, y: Tensor) -> float:
    """Return the rank correlation of two tensors (N,), NaN if one is constant."""
    a, b = (ranks(v) - ranks(v).mean() for v in (x, y))
    return float((a * b).sum() / (a.norm() * b.norm())) if a.norm() > 0 and b.norm() > 0 else float("nan")


def auc(x: Tensor, bad: Tensor) -> float:
    """Return the probability that a bad draft has a larger signal than a good one (ties: half); NaN without both."""
    good, worse = x[~bad], x[bad]
    if not len(good) or not len(worse):
        return float("nan")
    wins = (worse[:, None] > good[None]).double() + 0.5 * (worse[:, None] == good[None]).double()
    return float(wins.mean())
