"""The command `speca batch`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ..engine import Engine
    from ..engine.offline import Folder, Line


def batch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundled model, a local folder, or a hub id.")],
    prompts: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines: a prompt in quotes, or an object of arguments.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for pictures, manifest.jsonl, engine.png and report.json.")] = Path(
        "speca-batch"
    ),
    steps: Annotated[int, typer.Option(help="Denoising steps of lines that do not say, 4 or more.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the first line; line k uses this plus k.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's own.")] = None,
    preset: Annotated[str, typer.Option(help="Quality dial of lines that do not say.")] = "balanced",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the preset. Repeat.")
    ] = None,
    mode: Annotated[
        Literal["continuous", "lock-step", "one-at-a-time"], typer.Option(help="How requests share the model.")
    ] = "continuous",
    max_batch: Annotated[int, typer.Option(help="Most rows of one forward, 1 or more.")] = 16,
    component_batch: Annotated[int, typer.Option(help="Most rows of one text encoder or autoencoder call.")] = 4,
    memory: Annotated[str | None, typer.Option(help="Memory limit of requests, e.g. 8GiB. Default: none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps... Default: the accelerator, if any.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads, 1 or more. Default: torch's choice.")] = None,
) -> None:
    """Make an image for each line of a file, in batches. Existing images are kept.

    Exit code 1: a line failed; the images of the other lines are written, and the next run tries the failed line again.
    """
    from .. import zoo
    from ..engine import Engine
    from ..engine.offline import Folder, read_lines
    from ..reports.measure import hardware
    from . import output, request

    config = request.configuration(preset, settings or [])
    request.at_least(1, threads=threads)
    request.at_least(4, steps=steps)
    common: dict[str, Any] = {**zoo.call_arguments(model), "num_inference_steps": steps}
    common |= {} if guidance is None else {"guidance_scale": guidance}
    pipe = request.load(model, dtype, device, threads)
    lines = read_lines(prompts, common, seed, lambda names: request.class_numbers(pipe, model, names))
    folder = Folder.open(out)
    most: dict[str, Any] = dict(max_batch=max_batch, component_batch=component_batch)
    with Engine(pipe, config, **most, memory=memory, mode=mode) as engine:
        made = _make(engine, lines, folder, model, quiet=as_json)
    payload = {
        "model": model, **made, "mode": mode, "preset": preset, "statistics": engine.statistics,
        "command": shlex.join(["speca", *sys.argv[1:]]), "hardware": hardware(pipe),
    }  # fmt: skip
    (out / "report.json").write_text(output.to_json(payload) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(output.to_json(payload))
    else:
        output.show(f"{model}, {preset}", output.batch_rows(payload, str(out)))
    if made["failed"]:
        typer.echo(f"speca: {made['failed']} of {len(lines)} lines failed; see manifest.jsonl.", err=True)
        raise typer.Exit(1)


def _make(engine: Engine, lines: Sequence[Line], folder: Folder, model: str, quiet: bool) -> dict[str, Any]:
    """Run the missing lines with a progress bar and draw the timeline; return counts, failures and speed."""
    from ..engine.offline import run
    from . import output

    todo, failed, began = sum(not folder.has(line) for line in lines), 0, time.perf_counter()
    with output.counting(model, len(lines), len(lines) - todo, quiet) as advance:
        for result in run(engine, lines, folder):
            failed += result.error is not None
            advance()
    seconds, made = time.perf_counter() - began, todo - failed
    rate = made / seconds
    if todo and engine.mode != "one-at-a-time":
        engine.timeline(folder.place / "engine.png", f"{model}: {todo} requests, {rate:.2f} images a second")
    return dict(lines=len(lines), made=made, failed=failed, seconds=seconds, images_per_second=rate)
