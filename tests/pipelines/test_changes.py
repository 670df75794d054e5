"""What changes in mid-run: conditions replaced or overwritten, guidance that begins, and the budget over all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import speca
import tiny
from speca.calibration.recording import record
from speca.core.prior import Prior

STEPS, CHANGE = 24, 10


def by_step(case: tiny.Case, sample: int = 0) -> str:
    """What a sample did at each step, over all branches."""
    (accelerator,) = speca.diffusers.enable.accelerators_of(case.pipe)
    found = ["?"] * STEPS
    for branch in accelerator.branches.values():
        record = branch.records[sample]
        for step, decision in zip(record.steps, record.decisions, strict=True):
            found[step] = decision
    return "".join(found)


def replaced(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step == CHANGE - 1:
        given["prompt_embeds"] = given["prompt_embeds"].flip(1)
    return given


def overwritten(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step == CHANGE - 1:
        given["prompt_embeds"].copy_(given["prompt_embeds"].flip(1))
    return given


def untouched(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
    return given


def prior_of(case: tiny.Case) -> Prior:
    call = {**case.arguments, **case.conditions([0, 1]), "num_inference_steps": STEPS}
    call.pop("output_type", None)
    return record(case.pipe, call, [0, 1], 2).prior


@pytest.mark.parametrize("known", [False, True], ids=["nothing known", "a prior"])
@pytest.mark.parametrize("change", [replaced, overwritten])
def test_new_conditions_begin_with_a_full_step_within_the_same_budget(change: Any, known: bool) -> None:
    case = tiny.flux()
    speca.enable(case.pipe, speedup=3, calibration=prior_of(case) if known else False)
    watching = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    case([3, 8], steps=STEPS, callback_on_step_end=untouched, **watching)
    assert by_step(case).count("F") == 8
    case([3, 8], steps=STEPS, callback_on_step_end=change, **watching)
    done = by_step(case)
    assert done[CHANGE] == "F" and "?" not in done
    assert done.count("F") == 8, "what is left of the budget is placed anew"
    assert done[CHANGE + 1 :].count("F") >= 2


def test_a_tolerance_goes_on_after_a_change() -> None:
    case = tiny.flux()
    speca.enable(case.pipe, tolerance=0.05, calibration=False)
    case([3], steps=STEPS, callback_on_step_end=replaced, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    done = by_step(case)
    assert done[CHANGE : CHANGE + 2] == "FF", "a line needs two full steps"
    assert 4 <= done.count("F") < STEPS and "?" not in done


def test_a_change_is_as_good_as_a_run_without_speca_from_there() -> None:
    """Every step after it in full: what was kept before does not reach past the change."""
    case = tiny.flux()
    how = dict(callback_on_step_end=replaced, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    speca.enable(case.pipe, schedule=(0, *range(CHANGE, STEPS)), tolerance=0.0, calibration=False)
    made = case([3], steps=STEPS, **how)
    assert by_step(case)[CHANGE:] == "F" * (STEPS - CHANGE) and "A" in by_step(case)[:CHANGE]
    assert made.isfinite().all() and isinstance(made, torch.Tensor)
