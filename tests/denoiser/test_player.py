"""One call of a denoiser: what is computed, forecast, kept and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import speca
from speca.config import SpecaConfig
from speca.core.transition import Transition
from speca.denoiser.branch import Branch
from speca.denoiser.player import Call
from speca.denoiser.run import Run
from speca.sampler.response import Response

STEPS, ROWS = 10, 2
FLOW = Response(tuple(Transition((1.0,), (-1 / STEPS,)) for _ in range(STEPS)))
SCHEDULE = (0, 1, 4, 7)


def output(step: int, rows: Sequence[int] | None = None) -> Tensor:
    """Outputs that are a straight line, so that forecasts of them are exact; another line in each row."""
    whole = torch.stack([torch.linspace(0, 1, 6) * (row + 1) + step * (row - 0.3) for row in range(ROWS)])
    return whole if rows is None else whole[list(rows)]


def play(
    run: Run, made: Callable[[int, Any], Any], steps: Sequence[int] = range(STEPS), rows_per_sample: int = 1
) -> tuple[Branch, list[Any], list[Any]]:
    """The branch, what was asked of the model (step, rows), and what each call gave."""
    branch, asked, outs = run.branch("call", ROWS, rows_per_sample), [], []
    for step in steps:

        def evaluate(rows: Sequence[int] | None, step: int = step) -> Any:
            asked.append((step, rows))
            return made(step, rows)

        outs.append(run.play(Call(branch, step, evaluate)))
    return branch, asked, outs


def scheduled(**settings: Any) -> Run:
    return Run(SpecaConfig(schedule=SCHEDULE, tolerance=0.0, prior="none", **settings), FLOW, STEPS)


def test_drafts_of_a_straight_line_are_exact_and_ask_nothing_of_the_model() -> None:
    run = scheduled()
    branch, asked, outs = play(run, output)
    assert asked == [(step, None) for step in SCHEDULE]
    for step, out in enumerate(outs):
        torch.testing.assert_close(out, output(step))
    assert branch.kept is None, "nothing is kept after the last step"
    assert (run.costs.evaluations, run.costs.evaluations_full) == (len(SCHEDULE) * ROWS, STEPS * ROWS)
    assert run.costs.flops is None and run.costs.host_reads == 0


def test_full_steps_without_correction_give_the_models_own_output() -> None:
    own: list[Any] = []

    def made(step: int, rows: Any) -> Any:
        own.append((output(step, rows), "aside"))
        return own[-1]

    _, asked, outs = play(Run(SpecaConfig(tolerance=0.0), FLOW, STEPS), made)
    assert len(asked) == STEPS and all(out is mine for out, mine in zip(outs, own, strict=True))


def test_a_corrected_output_is_a_new_tensor() -> None:
    """The model may still hold its own."""
    own: dict[int, Tensor] = {}

    def made(step: int, rows: Any) -> Tensor:
        own[step] = output(step, rows) + float(step == 4)  # off the line that the drafts before it were on
        return own[step]

    _, _, outs = play(scheduled(), made)
    assert torch.equal(own[4], output(4) + 1) and not torch.equal(outs[4], own[4])
    assert torch.equal(outs[1], own[1])
    _, _, outs = play(scheduled(corrector=False), made)
    assert torch.equal(outs[4], own[4]), "nothing is corrected"


def test_rows_of_one_sample_do_what_the_one_with_the_largest_error_needs() -> None:
    def bent(step: int, rows: Any) -> Tensor:
        whole = 0.03 * step**2 * torch.tensor([[1.0] * 6, [5.0] * 6])
        return whole if rows is None else whole[list(rows)]

    config = SpecaConfig(tolerance=0.02, prior="none")
    apart, asked, _ = play(Run(config, FLOW, STEPS), bent)
    tied, together, _ = play(Run(config, FLOW, STEPS), bent, rows_per_sample=2)
    first, second = (record.decisions for record in apart.records)
    assert [record.rows for record in tied.records] == [(0, 1)]
    assert tied.records[0].decisions == second != first
    assert {rows for _, rows in together} == {None} and any(rows is not None for _, rows in asked)


@pytest.mark.parametrize("then", [lambda x: x[:, :3], lambda x: (x, x), lambda x: "text"])
def test_an_output_of_another_form_ends_forecasts_of_the_branch(then: Callable[[Tensor], Any]) -> None:
    """From there each step is computed, once, and counted."""
    run = scheduled()
    branch, asked, outs = play(run, lambda step, rows: output(step, rows) if step < 4 else then(output(step, rows)))
    assert branch.plain and branch.kept is None
    assert "".join(branch.records[0].decisions) == "FFAA" + "F" * 6
    assert [step for step, _ in asked] == [0, 1, 4, 4, 5, 6, 7, 8, 9], "the step at which it is seen runs twice"
    assert str(outs[4]) == str(then(output(4))) and str(outs[9]) == str(then(output(9)))
    assert (run.costs.evaluations, run.costs.evaluations_full) == (8 * ROWS, STEPS * ROWS)


def test_steps_left_out_begin_anew() -> None:
    run = scheduled()
    branch, _, _ = play(run, output, range(4))
    run.missed(5)
    assert branch.kept is None
    _, asked, outs = play(run, output, range(5, STEPS))
    assert asked == [(5, None), (6, None), (7, None)], "its first steps are full again"
    torch.testing.assert_close(outs[-1], output(STEPS - 1))


def test_a_denoiser_says_why_it_goes_on_plainly() -> None:
    scheduler = SimpleNamespace(timesteps=1 - torch.arange(STEPS) / STEPS, step=lambda out, t, x: x - out / STEPS)
    calls: list[float] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t))
        return x if len(calls) < 3 else torch.cat([x, x], 1)

    denoise, x = speca.Denoiser(model, scheduler=scheduler, schedule=SCHEDULE), torch.ones(2, 3)
    shapes = [denoise(x, t).shape[1] for t in scheduler.timesteps]
    assert shapes == [3] * 4 + [6] * 6
    report = denoise.report()
    assert report.samples[0].decisions == "FFAA" + "F" * 6 and "another shape" in " ".join(report.notes)
