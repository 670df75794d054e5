"""The command `speca calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundled model, a local folder, or a hub id.")],
    target: Annotated[
        float | None, typer.Option(help="PSNR to the own full run to promise, in dB, above 0. By default none.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples in full: by default 1; with a target 32, and as many fresh ones.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Share of fresh samples that must meet it.")] = 0.9,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    speedup: Annotated[list[float] | None, typer.Option(help="A budget to place by trial; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file; `speca generate --calibration` takes it.")] = Path(
        "calibration.json"
    ),
    batch: Annotated[int, typer.Option(help="Samples in one call, 1 or more.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps... Default: the accelerator, if any.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads, 1 or more. Default: PyTorch's choice.")] = None,
) -> None:
    """Learn a model from one full run, or with --target find the fewest full steps that meet a quality."""
    from rich.console import Console

    from .. import zoo
    from ..calibration.calibrate import FRESH_SEED, TUNING_SEED
    from ..calibration.calibrate import calibrate as run
    from ..reports.measure import example_call
    from . import request

    request.at_least(1, threads=threads, samples=samples, batch=batch)
    samples = samples or (1 if target is None else 32)
    pipe = request.load(model, dtype, device, threads)
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(TUNING_SEED, TUNING_SEED + samples))
    seeds += [] if target is None else range(FRESH_SEED, FRESH_SEED + samples)
    call = {**zoo.call_arguments(model), **example_call(pipe, seeds), "num_inference_steps": steps}
    with Console(stderr=True).status("loading") as status:
        found = run(
            pipe, call, target_psnr=target, samples=samples, confidence=confidence, speedups=speedup or (), batch=batch,
            progress=status.update,
        )  # fmt: skip
    found.save(out)
    for trial in found.trials:
        typer.echo(
            f"{trial.full_steps} full steps, tolerance {trial.tolerance:.4g}: {trial.speedup:.2f}x, "
            f"{trial.median:.1f} dB, 5th percentile {trial.p5:.1f} dB, bound {trial.bound:.1f} dB"
        )
    typer.echo(f"{found}\nwritten to {out}")
