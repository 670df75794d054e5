"""Is the corrector right? Its two assumptions, measured on a trained model without guidance.

    python recipes/corrector_study.py --model fashion-dit

1. How an output follows its sample. The sample is moved a little in the direction in which a draft would have been
   wrong, and the change of the output in that direction is set beside `jacobian`, what the straight path says.
2. How good a correction is. At each full step of a fixed schedule it is compared with the true error, the difference
   to the full run: their cosine, and the share of the correction that would have been best (1: as it is).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import speca
from speca.core import correction as core
from speca.reports.measure import example_call
from speca.sampler.scheduler import scheduler_response
from speca.zoo import call_arguments, resolve

FIRST_SEED, GAP = 500_000, 4
SCHEDULES = ((0, 1, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47), (0, 1, 3, 9, 16, 22, 29, 35, 42, 48))


def main(
    model: Annotated[str, typer.Option(help="Bundled name or local folder.")] = "fashion-dit",
    samples: Annotated[int, typer.Option(help="Samples, on tuning seeds.", min=2)] = 8,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Print both tables."""
    torch.set_num_threads(threads)
    pipe = resolve(model)
    pipe.set_progress_bar_config(disable=True)
    seeds = range(FIRST_SEED, FIRST_SEED + samples)
    call = {**call_arguments(model), **example_call(pipe, seeds), "num_inference_steps": 50, "output_type": "latent"}
    call["guidance_scale"] = 1.0 if hasattr(pipe, "labels") else call.get("guidance_scale", 3.5)
    console = Console(width=110)

    plain = _Recorder(pipe, call, seeds, probe=range(8, 50, 6))
    response = scheduler_response(pipe.scheduler)
    steps = response.transitions
    assert steps, response.reason
    table = Table("step", "measured", "of the straight path", title="how an output follows its sample")
    for step, value in plain.jacobians.items():
        table.add_row(str(step), f"{value:.3f}", f"{steps[step].jacobian:.3f}")
    console.print(table)

    for schedule in SCHEDULES:
        table = Table("step", "true error", "estimate", "cosine", "best share", title=f"full steps {schedule}")
        with _corrections() as found, speca.enabled(pipe, schedule=schedule, prior="none", calibration=False):
            fast = _Recorder(pipe, call, seeds)
        for step, (move, size) in zip([s for s in schedule if s > 1], found, strict=True):
            gap = (plain.samples[step] - fast.samples[step]).flatten(1)
            full = move.flatten(1) * (1 + (size / core.TRUST).square()).unsqueeze(1)
            inner = (gap * full).sum(1)
            cosine = (inner / (gap.norm(dim=1) * full.norm(dim=1))).median()
            best = (inner / move.flatten(1).square().sum(1) / (1 + (size / core.TRUST).square())).median()
            rms = [x.norm(dim=1).median() / x.shape[1] ** 0.5 for x in (gap, full)]
            table.add_row(str(step), f"{rms[0]:.4f}", f"{rms[1]:.4f}", f"{cosine:.2f}", f"{best:.2f}")
        console.print(table)


@contextmanager
def _corrections() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Every correction made inside, with its estimated error."""
    original, found = core.Corrector.correction, []

    def watched(*args: Any) -> tuple[list[Tensor], Tensor]:
        moves, sizes = original(*args)
        found.append((moves[0], sizes))
        return moves, sizes

    core.Corrector.correction = watched  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        core.Corrector.correction = original  # type: ignore[method-assign]


class _Recorder:
    """One run: what the transformer was given and gave at each step, and how its output follows its input at some."""

    def __init__(self, pipe: Any, call: dict[str, Any], seeds: range, probe: range = range(0)) -> None:
        self.samples: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.jacobians: dict[int, float] = {}
        self._probe = probe
        model, outer = pipe.transformer, pipe.transformer.forward

        def watch(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = outer(hidden_states, *args, **kwargs)
            main = (out[0] if isinstance(out, tuple) else out.sample)[:, : hidden_states.shape[1]]
            self.samples.append(hidden_states.clone())
            self.outputs.append(main.clone())
            if len(self.samples) - 1 in self._probe:
                self._follow(outer, hidden_states, args, kwargs, main)
            return out

        before = model.__dict__.get("forward")
        model.forward = watch
        try:
            pipe(**call, generator=[torch.Generator().manual_seed(s) for s in seeds])
        finally:
            if before is None:
                del model.forward
            else:
                model.forward = before

    def _follow(self, forward: Any, sample: Tensor, args: Any, kwargs: Any, main: Tensor) -> None:
        step = len(self.samples) - 1
        wrong = self.outputs[step] - (2 * self.outputs[step - GAP] - self.outputs[step - 2 * GAP])
        small = wrong / wrong.flatten(1).norm(dim=1).view(-1, *[1] * (wrong.dim() - 1))
        small = small * 0.01 * sample.flatten(1).norm(dim=1).view(-1, *[1] * (wrong.dim() - 1))
        moved = forward(sample + small, *args, **kwargs)
        change = (moved[0] if isinstance(moved, tuple) else moved.sample)[:, : sample.shape[1]] - main
        ratio = (change * small).flatten(1).sum(1) / small.flatten(1).square().sum(1)
        self.jacobians[step] = float(ratio.median())


if __name__ == "__main__":
    typer.run(main)
