"""The command `speca bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]", help="A bundled model, a local folder, or a hub id; a paper's suite knows its own."
        ),
    ] = "",
    suite: Annotated[str, typer.Option(help="Suite: quick, full, paper-dit, paper-flux or paper-hunyuan.")] = "quick",
    methods: Annotated[str, typer.Option(help="Names with commas between; empty: all methods.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, report.md, curves and index.html.")] = Path(
        "speca-bench"
    ),
    prompts: Annotated[Path | None, typer.Option(help="Of a paper's suite: file with one prompt a line.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Of a paper's suite: folder of real images.")] = None,
    samples: Annotated[int | None, typer.Option(help="Of a paper's suite: fewer samples than the paper's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps... Default: the accelerator, if any.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads, 1 or more; fixed, so that times compare.")] = 1,
) -> None:
    """Measure quality, FLOPs and time of every method on one model. Run again to continue after an interruption."""
    from ..bench.papers import PAPERS
    from ..errors import InputError
    from . import request

    request.at_least(1, threads=threads, samples=samples)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if suite in PAPERS:
        _paper(
            suite, out, lambda m: request.load(m, dtype, device, threads), model,
            names=names, prompts=prompts, reference=reference, samples=samples,
        )  # fmt: skip
        return
    if not model:
        raise InputError("name a MODEL: a bundled one (see `speca models`), a local folder, or a hub id.")
    _suite(model, suite, names, out, lambda: request.load(model, dtype, device, threads))


def _suite(model: str, suite: str, names: list[str], out: Path, load: Any) -> None:
    from ..bench.field import chosen
    from ..bench.report import write
    from ..bench.scores import arguments
    from ..bench.suites import Bench
    from ..bench.suites import suite as suite_called
    from ..zoo import call_arguments

    plan = suite_called(suite)
    field = chosen(names, plan.steps, plan.sweep)
    pipe, sizes = load(), call_arguments(model)
    work = Bench(pipe, model, plan, out, field, lambda p, seeds, steps: arguments(p, seeds, steps, sizes))
    typer.echo(f"about {work.estimate() / 60:.0f} minutes on this machine, if nothing else runs", err=True)
    rows = _shown(model, work.run)
    write(rows, out)
    typer.echo(f"{out / 'report.md'}")


def _paper(suite: str, out: Path, load: Any, model: str, **asked: Any) -> None:
    from ..bench.papers import PaperRun, paper, table, weights
    from ..zoo import call_arguments

    pipe = weights(paper(suite), model, load)
    work = PaperRun(pipe, suite, out, sizes=call_arguments(model) if model else None, **asked)
    rows = _shown(suite, work.run)
    (out / "report.md").write_text(table(suite, rows), encoding="utf-8")
    typer.echo(f"{out / 'report.md'}")


def _shown(what: str, run: Any) -> list[dict[str, Any]]:
    """Run with a progress bar on the error stream."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what)
        rows: list[dict[str, Any]] = run(
            lambda done, total, now: bar.update(task, completed=done, total=total, description=now)
        )
    return rows
