"""The command `speca batch`."""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import InputError

if TYPE_CHECKING:
    from ..config import Config
    from ..engine import Engine
    from ..engine.offline import Folder, Line


def batch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundled model, a local folder, or a hub id.")],
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="JSON lines (a prompt in quotes, or an object of arguments), .csv or .parquet."
        ),
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
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, 1 or more. Default: torch's choice; with --ray 1 a worker.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS|local", help="Share the work over a Ray cluster; local starts one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Engines with --ray. Default: one for each GPU, or without any each processor.")
    ] = None,
) -> None:
    """Make an image for each line of a file, in batches. Existing images are kept.

    Exit code 1: a line failed; the images of the other lines are written, and the next run tries the failed line again.
    """
    from .. import zoo
    from . import output, request

    config = request.configuration(preset, settings or [])
    request.at_least(1, threads=threads, workers=workers)
    request.at_least(4, steps=steps)
    if workers is not None and ray is None:
        raise InputError("--workers are of a cluster; give --ray ADDRESS or --ray local too.")
    common: dict[str, Any] = {**zoo.call_arguments(model), "num_inference_steps": steps}
    common |= {} if guidance is None else {"guidance_scale": guidance}
    most: dict[str, Any] = dict(max_batch=max_batch, component_batch=component_batch, memory=memory, mode=mode)
    asked = _Asked(model, prompts, out, common, seed, config, dtype, device, threads, most, quiet=as_json)
    made = _here(asked) if ray is None else _over_ray(asked, ray, workers)
    command = shlex.join(["speca", *sys.argv[1:]])
    payload = {"model": model, **made, "mode": mode, "preset": preset, "command": command}
    (out / "report.json").write_text(output.to_json(payload) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(output.to_json(payload))
    else:
        output.show(f"{model}, {preset}", output.batch_rows(payload, str(out)))
    if made["failed"]:
        typer.echo(f"speca: {made['failed']} of {made['lines']} lines failed; see manifest.jsonl.", err=True)
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Asked:
    model: str
    prompts: Path
    out: Path
    common: dict[str, Any]
    seed: int
    config: Config
    dtype: str
    device: str | None
    threads: int | None
    most: dict[str, Any]  # arguments of the engine
    quiet: bool


def _here(asked: _Asked) -> dict[str, Any]:
    """Run the lines in this process; return what the report says of it."""
    from ..engine import Engine
    from ..engine.offline import Folder, read_lines
    from ..reports.measure import hardware
    from . import request

    pipe = request.load(asked.model, asked.dtype, asked.device, asked.threads)
    lines = read_lines(
        asked.prompts, asked.common, asked.seed, lambda names: request.class_numbers(pipe, asked.model, names)
    )
    folder = Folder.open(asked.out)
    with Engine(pipe, asked.config, **asked.most) as engine:
        made = _make(engine, lines, folder, asked.model, asked.quiet)
    return {**made, "statistics": engine.statistics, "hardware": hardware(pipe)}


def _over_ray(asked: _Asked, address: str, workers: int | None) -> dict[str, Any]:
    """Run the lines on a Ray cluster; return what the report says of it."""
    from ..cluster import data
    from ..engine.offline import read_lines
    from . import output, request

    @functools.cache
    def pipe() -> Any:  # for the names of classes alone
        return request.load(asked.model, asked.dtype, "cpu", None)

    lines = read_lines(
        asked.prompts, asked.common, asked.seed, lambda names: request.class_numbers(pipe(), asked.model, names)
    )
    job = data.Job(asked.model, asked.config, asked.dtype, asked.device, asked.threads or 1, asked.most)
    began, counts = time.perf_counter(), Counter[str]()
    with output.counting(asked.model, len(lines), 0, asked.quiet) as advance:

        def tell(new: Sequence[dict[str, Any]], earlier: bool) -> None:
            if not earlier:
                counts.update(data.counts(new))
            steps = counts["full"] + counts["accepted"] + counts["rejected"]
            advance(len(new), f"{counts['full'] / steps:.0%} full steps" if steps else "", earlier=earlier)

        ran = data.run(job, lines, asked.out, address, workers, tell)
    seconds, made = time.perf_counter() - began, counts["done"]
    return {
        "lines": len(lines), "made": made, "failed": counts["failed"], "seconds": seconds,
        "images_per_second": made / seconds, "statistics": {**counts, "lanes": {}}, "hardware": ran,
    }  # fmt: skip


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
