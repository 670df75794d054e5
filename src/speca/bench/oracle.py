"""Oracles: methods that use each sample's own full run to place full steps, as a bound for practical methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..config import SpecaConfig, VerifiedConfig
from ..core.controller import Plan, Planner, Record
from ..diffusers.enable import accelerators_of, enabled
from ..verified.rules import ScheduleRule
from .measure import IDENTICAL
from .methods import Prepare
from .recording import TuningData, anneal, true_errors
from .setup import Call, Setup

OWN_TRIES = 600  # proposals of a search on a single sample


@contextmanager
def own_schedules(
    pipe: Any, call: Call, schedules: Sequence[Sequence[int]], corrector: bool = False
) -> Iterator[Setup]:
    """Compute each sample in full at its own steps; `schedules[k]` is the schedule of sample k of all samples."""
    first = 0

    def due(record: Record, anchors: int) -> Plan:
        own = record.step in schedules[first + record.sample]
        return Plan.FULL if own or len(record.anchors) < anchors else Plan.DRAFT

    class OwnPlanner(Planner):
        def plan(self, record: Record) -> Plan:
            return due(record, self.config.anchors)

    class OwnRule(ScheduleRule):
        def plan(self, record: Record) -> Plan:
            return due(record, self.config.anchors)

    def begin(offset: int) -> None:
        nonlocal first
        first = offset

    planned = SpecaConfig(schedule=(0,), tolerance=0.0, prior="none")
    features = VerifiedConfig(rule="schedule", schedule=(0,), warmup=2, final=0)
    with enabled(pipe, planned if corrector else features, calibration=False) as session:
        for accelerator in accelerators_of(pipe):
            accelerator.planner, accelerator.drafts.rule = OwnPlanner(planned), OwnRule(features)
        yield Setup(pipe, call, session, begin)


def own_search(corrected: bool) -> Prepare:
    """Return, for each reporting sample, the best schedule with `full` full steps on its own recording."""

    def prepare(data: TuningData, full: int) -> list[list[int]]:
        recording = data.recording(reporting=True)
        return [anneal(recording.of(k), full, corrected, OWN_TRIES, seed=k) for k in range(len(data.seeds))]

    return prepare


def own_errors(data: TuningData, tolerance: float) -> list[list[int]]:
    """Return, for each reporting sample, the steps whose draft has a true error above `tolerance`."""
    return true_errors(data.recording(reporting=True), tolerance)


def fewest_steps(rows: Sequence[dict[str, Any]], family: str, targets: Sequence[float]) -> list[dict[str, Any]]:
    """Return rows of "oracle-steps": per sample, the cheapest schedule of method `family` that reaches a target PSNR.

    Choose among the measured schedules; nothing is run. A sample that no schedule brings to the target costs a full
    run.
    """
    measured = sorted((r for r in rows if r.get("method") == family and "psnr" in r), key=lambda r: float(r["flops"]))
    out: list[dict[str, Any]] = []
    for target in targets if measured else ():
        psnr, spent, flops = [], [], 0.0
        full = measured[0]["flops_full"] / len(measured[0]["psnr"])
        steps = max(r["steps"] for r in measured)
        for k in range(len(measured[0]["psnr"])):
            reached = next((r for r in measured if r["psnr"][k] >= target), None)
            psnr.append(reached["psnr"][k] if reached else IDENTICAL)
            spent.append(reached["full_steps"][k] if reached else float(steps))
            flops += reached["flops"] / len(reached["psnr"]) if reached else full
        flops_full = measured[0]["flops_full"]
        about = dict(kind="quality", method="oracle-steps", knob="PSNR dB", value=target, steps=steps, derived=True)
        about |= dict(family="oracle", package="speca")
        cost = dict(flops=flops, flops_full=flops_full, flops_speedup=flops_full / flops, full_steps=spent)
        out.append({**about, **cost, "psnr": psnr, "ssim": [], "relative_l2": []})
    return out
