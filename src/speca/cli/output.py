"""What the command line writes: a folder, completely or not at all; progress bars; tables in the terminal."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import InputError

if TYPE_CHECKING:
    from ..reports.check import CheckReport
    from ..reports.comparison import Comparison
    from ..reports.measure import Run, Ticker
    from ..zoo import ModelCard

Row = tuple[str, str]  # name and value

RESULTS = ("image-*.png", "clip-*.webp", "contact.png", "timeline.png", "grid.png", "report.json")


# ------------------------------------------------------------------------------------------------ folder
@contextmanager
def folder(out: Path) -> Iterator[Path]:
    """A hidden folder to write to; its files appear in `out` when the block ends well, and vanish otherwise.

    The results of an earlier run in `out` are replaced, other files there stay. Raises InputError, before anything
    is made, if `out` is a file or cannot be written to.
    """
    out = out.expanduser().absolute()
    with _refusing(out):
        home = next(place for place in (out, *out.parents) if place.exists())
    if not home.is_dir():
        raise InputError(f"--out {out}: {home} is a file; name a folder, or one that does not exist yet.")
    stage = home / f".speca-{uuid.uuid4().hex[:8]}"
    with _refusing(out):
        stage.mkdir()
    try:
        yield stage
        with _refusing(out):
            _publish(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _refusing(out: Path) -> Iterator[None]:
    """Raise errors of the file system as InputError, with a sentence that says what to do."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}); name another folder.") from error


def _publish(stage: Path, out: Path) -> None:
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        stage.rename(out)
        return
    for pattern in RESULTS:
        for old in out.glob(pattern):
            old.unlink()
    for path in stage.iterdir():
        path.rename(out / path.name)


def write_run(
    run: Run, about: dict[str, Any], place: Path, captions: Sequence[str]
) -> tuple[dict[str, Any], list[Row]]:
    """Write images, or clips and a sheet of their frames with `captions`; the timeline; report.json with `about` in it.

    Returns the content of report.json, and rows for `show`.
    """
    _write_pictures(run, place, captions)
    assert run.report is not None
    payload = {**run.report.to_dict(), **about, "hardware": run.hardware}
    _write_json(payload, place)
    return payload, run_rows(run)


def write_comparison(result: Comparison, place: Path) -> tuple[dict[str, Any], list[Row]]:
    """Write the files of the accelerated run, grid.png, and report.json of the comparison."""
    _write_pictures(result.speca, place, result.captions or [f"seed {seed}" for seed in result.seeds])
    result.grid(place / "grid.png")
    payload = result.to_dict()
    _write_json(payload, place)
    return payload, comparison_rows(result)


def _write_pictures(run: Run, place: Path, captions: Sequence[str]) -> None:
    from ..reports.pictures import contact_sheet, save_png, save_webp

    video = run.images.ndim == 5
    for index, image in enumerate(run.images):
        if video:
            save_webp(image, place / f"clip-{index:03d}.webp")
        else:
            save_png(image, place / f"image-{index:03d}.png")
    if video:
        contact_sheet(run.images, captions).save(place / "contact.png")
    assert run.report is not None
    run.report.plot(place / "timeline.png")


def _write_json(payload: dict[str, Any], place: Path) -> None:
    (place / "report.json").write_text(to_json(payload) + "\n", encoding="utf-8")


def to_json(value: Any) -> str:
    """Return strict JSON: a NaN or an infinity raises ValueError."""
    return json.dumps(value, indent=2, allow_nan=False)


# ------------------------------------------------------------------------------------------------ terminal
@contextmanager
def progress(title: str, quiet: bool) -> Iterator[Ticker | None]:
    """A progress bar over denoising steps on stderr; None if `quiet`."""
    if quiet:
        yield None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counting(title: str, total: int, done: int, quiet: bool) -> Iterator[Callable[..., None]]:
    """A progress bar over images on stderr, with images a second; `done` of `total` are there already.

    What it yields is called with how many images are there, default 1, what else to show, and whether they are of an
    earlier run, which do not count as speed.
    """
    if quiet:
        yield lambda count=1, note="", earlier=False: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    began, made = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="")

        def advance(count: int = 1, note: str = "", earlier: bool = False) -> None:
            nonlocal made
            made += 0 if earlier else count
            rate = f"{made / (time.perf_counter() - began):.2f} images/s"
            bar.update(task, advance=count, rate=", ".join(filter(None, (rate, note))))

        yield advance


def batch_rows(payload: dict[str, Any], out: str) -> list[Row]:
    """Return what a batch has made and how full its calls of the model were, as rows for `show`."""
    counts = payload["statistics"]
    steps = counts["full"] + counts["accepted"] + counts["rejected"]
    lanes = [
        (f"{name} batches", f"{lane['batches']} calls, {lane['rows_a_batch']:.1f} rows each, {lane['seconds']:.2f} s")
        for name, lane in counts["lanes"].items()
    ]
    there = payload["lines"] - payload["made"] - payload["failed"]
    return [
        ("images", f"{payload['made']} made, {payload['failed']} failed, {there} from an earlier run"),
        ("time", f"{payload['seconds']:.2f} s, {payload['images_per_second']:.2f} images a second"),
        *(
            [("steps", f"{counts['accepted'] / steps:.0%} forecast, {counts['rejected']} forecasts rejected")]
            if steps
            else []
        ),
        *lanes,
        ("written to", out),
    ]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table of names and values on stdout."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)


def run_rows(run: Run) -> list[Row]:
    """Return what an accelerated run cost, as rows for `show`."""
    report = run.report
    assert report is not None
    computed = [sample.full + sample.rejected for sample in report.samples]
    rejected = [sample.rejected for sample in report.samples]
    return [
        ("samples", str(len(report.samples))),
        (
            "computed steps",
            f"{_mean(computed):.1f} of {report.steps} for each sample, {_mean(rejected):.1f} after a rejected forecast",
        ),
        ("FLOPs", f"{report.flops_speedup:.2f}x fewer in the model"),
        ("time", f"{run.seconds:.2f} s in the model, {run.seconds_total:.2f} s in all"),
        ("memory", f"{size(report.bytes_per_sample)} kept for each sample while it runs"),
        *(("note", note) for note in report.notes),
    ]


def comparison_rows(result: Comparison) -> list[Row]:
    """Return what acceleration saved, and how much it changed the images, as rows for `show`."""
    from ..reports.comparison import decibels

    figures = result.to_dict()
    full, speca = result.full, result.speca
    share = result.saved_wall_share
    kept = f"; {share:.0%} of the saved FLOPs are saved in time" if share and share > 0 else ""
    quality = f"median {decibels(figures['psnr_median'])}, 5th percentile {decibels(figures['psnr_p5'])}"
    measured = (
        ("model", f"{result.wall_speedup:.2f}x the speed ({full.seconds:.2f} s to {speca.seconds:.2f} s){kept}"),
        (
            "whole call",
            f"{result.wall_speedup_total:.2f}x the speed ({full.seconds_total:.2f} s to {speca.seconds_total:.2f} s)",
        ),
        ("PSNR", f"{quality}, of each image to the same one without acceleration"),
    )
    rows = run_rows(speca)
    place = next(index for index, (name, _) in enumerate(rows) if name == "time")
    return [*rows[:place], *measured, *rows[place + 1 :]]


def check_rows(found: CheckReport) -> list[Row]:
    """Return what `speca check` found as rows of a table, for `show`; unknown values are left out."""
    memory = None if found.bytes_per_sample is None else f"{size(found.bytes_per_sample)} for each sample while it runs"
    flops = None
    if found.flops_full and found.flops_draft:
        share = found.flops_draft / found.flops_full
        flops = f"{found.flops_full / 1e9:.3g} GFLOPs a row at a full step, {share:.1%} of that at a verified draft"
    rows = (
        ("model", found.model),
        ("sampler", found.sampler),
        ("verified drafts", "possible (preset paper)" if found.supported else f"not possible: {found.reason}"),
        ("blocks", found.blocks),
        ("verify block", found.verify_block),
        ("state", ", ".join(found.state)),
        ("self-test", found.self_test),
        ("memory", memory),
        ("cost", flops),
    )
    return [(name, value) for name, value in rows if value]


def show_models(cards: Sequence[ModelCard]) -> None:
    """Print the bundled models as a table on stdout."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("model", "makes", "pipeline", "parameters", "size", "licence", "scores"):
        table.add_column(column)
    for card in cards:
        scores = ", ".join(f"{name} {value:g}" for name, value in card.scores.items() if isinstance(value, int | float))
        weight = f"{card.parameters / 1e6:.1f} M"
        table.add_row(card.name, card.makes, card.pipeline, weight, size(card.bytes), card.licence, scores)
    Console(markup=False, highlight=False).print(table)


def size(count: float) -> str:
    """Return a number of bytes with its unit: B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
