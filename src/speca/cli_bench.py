"""The command `speca bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundled model, a local folder, or a hub id.")],
    suite: Annotated[str, typer.Option(help="How much is run: quick or full.")] = "quick",
    methods: Annotated[str, typer.Option(help="Names with commas between; empty: all that there are.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, report.md, curves and index.html.")] = Path(
        "speca-bench"
    ),
    device: Annotated[str | None, typer.Option(help="cpu, cuda and so on. Default: cuda if there is one.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads, 1 or more; fixed, so that times compare.")] = 1,
) -> None:
    """Run every method on one model, at what it really costs. Run it again to go on after an interruption."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from . import cli_request as request
    from .bench.field import chosen
    from .bench.report import write
    from .bench.scores import arguments
    from .bench.suites import Bench
    from .bench.suites import suite as suite_called
    from .zoo import call_arguments

    request.at_least(1, threads=threads)
    plan, names = suite_called(suite), [name.strip() for name in methods.split(",") if name.strip()]
    pipe = request.load(model, dtype, device, threads)
    sizes = call_arguments(model)
    work = Bench(
        pipe, model, plan, out, chosen(names, plan.steps, plan.sweep), lambda p, seeds, s: arguments(p, seeds, s, sizes)
    )
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(model)
        rows = work.run(lambda done, total, what: bar.update(task, completed=done, total=total, description=what))
    write(rows, out)
    typer.echo(f"{out / 'report.md'}")
