"""Search schedules of full steps on recordings: inner products of the outputs at all steps of full runs.

The final sample of a linear sampler is a weighted sum of the outputs `v_j` of the model, with known weights. The output
of a draft is a weighted sum of the outputs at full steps. To first order, a schedule therefore changes the final sample
by `sum_q u_q v_q`, where `u` depends on the schedule alone. The norm of this change follows from the inner products of
the recorded outputs, a T x T matrix per sample, so the error of a schedule is computed without running the model.
Shapes: N samples, T steps.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.transition import Transition, advance
from ..errors import InputError
from ..reports.measure import run_once, split
from ..sampler.scheduler import scheduler_response
from .setup import Call


@dataclass(frozen=True)
class Recording:
    """Recording of N full runs: inner products (N, T, T) of outputs, and their weights (T,) in the final sample."""

    products: np.ndarray
    effect: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.effect)

    def errors(self, schedule: Sequence[int], corrected: bool = False) -> np.ndarray:
        """Return the squared errors (N,) of the final samples, to first order, with full steps at `schedule`."""
        u = self.effect @ (drafts(schedule, self.steps, corrected) - np.eye(self.steps))
        found: np.ndarray = np.maximum(np.einsum("t,nts,s->n", u, self.products, u), 1e-12)
        return found

    def loss(self, schedule: Sequence[int], corrected: bool = False) -> float:
        """Return the mean logarithm of the errors, which falls linearly with the mean PSNR."""
        return float(np.log(self.errors(schedule, corrected)).mean())

    def of(self, sample: int) -> Recording:
        """Return the recording of one sample."""
        return Recording(self.products[sample : sample + 1], self.effect)


@dataclass
class TuningData:
    """Data for `Method.prepare`: tuning calls and their recordings; for oracles also those of the reporting seeds."""

    pipe: Any
    call: Call
    seeds: Sequence[int]
    tuning_call: Call
    tuning_seeds: Sequence[int]
    batch: int
    tries: int
    _known: dict[bool, Recording] = field(default_factory=dict)
    _reference: list[Tensor] = field(default_factory=list)

    def reference(self) -> Tensor:
        """Return the samples (n, ...) of the full runs of the tuning seeds, computed once."""
        if not self._reference:
            parts = split(self.tuning_call, self.tuning_seeds, self.batch)
            self._reference.append(torch.cat([run_once(self.pipe, *part, None).images for part in parts]))
        return self._reference[0]

    def recording(self, reporting: bool = False) -> Recording:
        """Return the recording of the tuning seeds or, for oracles only, of the reporting seeds; computed once."""
        if reporting not in self._known:
            call, seeds = (self.call, self.seeds) if reporting else (self.tuning_call, self.tuning_seeds)
            self._known[reporting] = record(self.pipe, call, seeds, self.batch)
        return self._known[reporting]


def record(pipe: Any, call: Call, seeds: Sequence[int], batch: int) -> Recording:
    """Run in full and record the inner products of the outputs, after guidance, that the scheduler receives.

    Raises:
        InputError: the sampler is not linear, or the scheduler is called more than once per step.
    """
    products, effect = [], np.zeros(0)
    for part, some in split(call, seeds, batch):
        outputs = _outputs(pipe, part, some)
        response = scheduler_response(pipe.scheduler)
        found, reason = response.transitions, response.reason
        if not found or len(found) != len(outputs):
            why = reason or f"{len(outputs)} outputs for {len(found)} steps"
            raise InputError(f"no schedule can be found on a recording: {why}.")
        effect = effect_of(found)
        stacked = torch.stack(outputs, 1).flatten(2).double()  # (n, T, D)
        products.append((stacked @ stacked.transpose(1, 2)).numpy())
    return Recording(np.concatenate(products), effect)


def _outputs(pipe: Any, call: Call, seeds: list[int]) -> list[Tensor]:
    """Run once; return the output (n, ...) that the scheduler received at each step, for the rows of the samples."""
    outputs: list[Tensor] = []
    scheduler = pipe.scheduler
    original: Callable[..., Any] = scheduler.step

    @functools.wraps(original)
    def step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs.append(model_output[: len(seeds)].detach().float().cpu())
        return original(model_output, *args, **kwargs)

    scheduler.__dict__["step"] = step
    try:
        run_once(pipe, call, seeds, None)
    finally:
        del scheduler.__dict__["step"]
    return outputs


def effect_of(steps: Sequence[Transition]) -> np.ndarray:
    """Return the change (T,) of the final sample per unit change of each step's output.

    Later outputs follow the changed sample by the Jacobian of the output.
    """
    change = [np.zeros(len(steps))] * len(steps[0].keep)
    for step, unit in zip(steps, np.eye(len(steps)), strict=True):
        change = advance(change, step, unit + step.jacobian * change[0])
    return change[0]


def lagrange(targets: np.ndarray, nodes: Sequence[int]) -> np.ndarray:
    """Return the weights (len(targets), len(nodes)) of polynomial interpolation through `nodes` at `targets`."""
    weights = np.ones((len(targets), len(nodes)))
    for i, node in enumerate(nodes):
        for k, other in enumerate(nodes):
            if k != i:
                weights[:, i] *= (targets - other) / (node - other)
    return weights


def drafts(schedule: Sequence[int], steps: int, corrected: bool = False) -> np.ndarray:
    """Return the matrix (T, T) from recorded to used outputs, with order-1 forecasts from the last two full steps.

    With `corrected`, drafts before a later full step also use that step as a node of interpolation, which equals their
    value after the correction.
    """
    full = sorted(schedule)
    used = np.zeros((steps, steps))
    for k, last in enumerate(full):
        used[last, last] = 1.0
        end = full[k + 1] if k + 1 < len(full) else steps
        if end == last + 1:
            continue
        nodes = [last, *([full[k - 1]] if k else []), *([end] if corrected and end < steps else [])]
        used[np.arange(last + 1, end)[:, None], np.array(nodes)] = lagrange(np.arange(last + 1, end), nodes)
    return used


def uniform_schedule(steps: int, full: int) -> list[int]:
    """Return `full` (3 or more) evenly spread steps of 0..steps-1, with the first two and the last."""
    return sorted({0, 1} | {1 + round((steps - 2) * (k + 1) / (full - 2)) for k in range(full - 2)})


def random_schedule(steps: int, full: int, seed: int) -> list[int]:
    """Return the first two steps and `full - 2` others drawn at random."""
    return sorted({0, 1, *random.Random(seed).sample(range(2, steps), full - 2)})


def anneal(recording: Recording, full: int, corrected: bool = False, tries: int = 4000, seed: int = 0) -> list[int]:
    """Return the best schedule of `full` steps found by simulated annealing from an even one (takes seconds).

    A proposal moves one full step, most often to a nearby step; worse proposals are accepted with a probability that
    falls with the temperature (Kirkpatrick et al., 1983). The first two steps stay full.
    """
    draw = random.Random(seed)
    now = uniform_schedule(recording.steps, full)
    loss = least = recording.loss(now, corrected)
    best = now
    for attempt in range(tries):
        temperature = 0.5 * (1 - attempt / tries) ** 2 + 1e-9
        moved = draw.choice(now[2:])
        to = moved + draw.choice((-2, -1, 1, 2)) if draw.random() < 0.7 else draw.randrange(2, recording.steps)
        if not 2 <= to < recording.steps or to in now:
            continue
        proposal = sorted({*now, to} - {moved})
        value = recording.loss(proposal, corrected)
        if value < loss or draw.random() < math.exp((loss - value) / temperature):
            now, loss = proposal, value
            if value < least:
                best, least = proposal, value
    return best


def true_errors(recording: Recording, tolerance: float) -> list[list[int]]:
    """Return, for each sample, the full steps chosen with the true error of the drafts.

    A step is full if drafting it would raise the effect of the errors since the last full step on the final sample
    above `tolerance`, relative to the norm of the weighted sum of all outputs, on the path of the full run.
    """
    effect, found = recording.effect, []
    for products in recording.products:
        size = math.sqrt(effect @ products @ effect)
        full, off = [0, 1], np.zeros(recording.steps)
        for step in range(2, recording.steps):
            trial = off.copy()
            trial[[full[-1], full[-2]]] += effect[step] * lagrange(np.array([step]), full[-1:-3:-1])[0]
            trial[step] -= effect[step]
            if math.sqrt(max(0.0, trial @ products @ trial)) > tolerance * size:
                full.append(step)
                off = np.zeros(recording.steps)
            else:
                off = trial
        found.append(full)
    return found
