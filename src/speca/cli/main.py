"""The command `speca` and its options. Torch is imported when a command runs, so that --help is quick."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from .batch import batch as batch_command
from .bench import bench
from .calibrate import calibrate
from .load import load
from .serve import serve

app = typer.Typer(
    help="Draw with less work: compute a diffusion model at some steps, and forecast its output at the others.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A bundled model (see `speca models`), the folder of a diffusers pipeline, or a hub id (owner/name).",
    ),
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="Class to draw, by name or number. Repeat for several classes.")
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Text to draw. Repeat for several texts.")]
Count = Annotated[
    int | None, typer.Option("--n", help="Images, 1 or more; labels or prompts take turns. Default: one for each.")
]
Steps = Annotated[int, typer.Option(help="Denoising steps, 4 or more.")]
Seed = Annotated[int, typer.Option(help="Seed of the first image, 0 or more; image k uses this plus k.")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale, 0 or more (1: none). Default: the pipeline's own.")
]
Preset = Annotated[
    str,
    typer.Option(
        help="How close images stay to the full run: faithful, balanced, fast; or paper, the published method."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one setting of the preset, e.g. speedup=4. Repeat for several."
    ),
]
Calibrated = Annotated[
    Path | None,
    typer.Option(help="File written by speca calibrate for this model; it gives better images at the same cost."),
]
Compare = Annotated[bool, typer.Option("--compare", help="Also make the images without acceleration, and compare.")]
Repeats = Annotated[
    int, typer.Option(help="With --compare: how often each way is timed, 1 or more; the median counts.")
]
Batch = Annotated[int, typer.Option(help="Most images in one call of the pipeline, 1 or more.")]
Out = Annotated[
    Path, typer.Option(help="Folder for the images or clips, and for timeline.png, report.json and grid.png.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps... Default: the accelerator, if any.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads, 1 or more. Default: torch's own choice.")]

Command = TypeVar("Command", bound=Callable[..., None])


def main() -> None:
    """The installed command `speca`."""
    app()


def _one_sentence(command: Command) -> Command:
    """Turn an expected error into its sentence on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from ..errors import SpecaError

        try:
            command(*args, **kwargs)
        except SpecaError as error:
            typer.echo(f"speca: {error}", err=True)
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before the name of a command."""


# ------------------------------------------------------------------------------------------------ commands
@app.command()
@_one_sentence
def generate(
    model: Model,
    label: Labels = None,
    prompt: Prompts = None,
    n: Count = None,
    steps: Steps = 50,
    seed: Seed = 0,
    guidance: Guidance = None,
    preset: Preset = "balanced",
    settings: Settings = None,
    calibration: Calibrated = None,
    compare: Compare = False,
    repeats: Repeats = 1,
    batch: Batch = 16,
    out: Out = Path("speca-out"),
    as_json: Json = False,
    dtype: Dtype = "float32",
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Make images with acceleration; with --compare also without it, from the same seeds, and measure both."""
    from ..calibration import Calibration
    from . import output, request

    asked = request.Request(model, label or [], prompt or [], n, steps, seed, guidance)
    config = request.configuration(preset, settings or [])
    known = "auto" if calibration is None else Calibration.load(calibration)
    request.at_least(1, repeats=repeats, batch=batch, threads=threads)
    with output.folder(out) as place:
        pipe = request.load(model, dtype, device, threads)
        call, captions = asked.call(pipe)
        from ..reports.comparison import compare as run_both
        from ..reports.measure import generate as run_fast

        work = (pipe, call, asked.seeds, config)
        with output.progress(model, quiet=as_json) as ticker:
            if compare:
                both = run_both(*work, repeats=repeats, batch=batch, progress=ticker, calibration=known)
            else:
                fast = run_fast(*work, batch=batch, progress=ticker, calibration=known)
        if compare:
            both = dataclasses.replace(both, model=model, command=_command(), captions=captions)
            payload, rows = output.write_comparison(both, place)
        else:
            about = {"model": model, "preset": preset, "seeds": asked.seeds, "command": _command()}
            payload, rows = output.write_run(fast, about, place, captions)
    if as_json:
        typer.echo(output.to_json(payload))
    else:
        output.show(f"{model}, {preset}", [*rows, ("written to", str(out))])


@app.command()
@_one_sentence
def check(
    model: Model,
    preset: Preset = "balanced",
    as_json: Json = False,
    dtype: Dtype = "float32",
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Say whether a model can be accelerated, and how much memory that takes. The exit code is 1 if it cannot.

    To find out, it draws once: 4 steps, two classes or one prompt, 256 pixels where the size can be chosen.
    """
    from . import output, request

    config = request.configuration(preset, [])
    request.at_least(1, threads=threads)
    pipe = request.load(model, dtype, device, threads)
    found, call = request.examine(pipe, model, config)
    if as_json:
        typer.echo(output.to_json({**found.to_dict(), "call": call}))
    else:
        output.show(model, [*output.check_rows(found), ("found by", call)])
    if not found.supported and not found.sampler.startswith("linear"):  # forecast outputs need that alone
        raise typer.Exit(1)


@app.command()
@_one_sentence
def models(as_json: Json = False) -> None:
    """List the bundled models."""
    from .. import zoo
    from . import output

    cards = zoo.models()
    if as_json:
        typer.echo(output.to_json([card.to_dict() for card in cards]))
    else:
        output.show_models(cards)


app.command("batch")(_one_sentence(batch_command))
app.command()(_one_sentence(bench))
app.command()(_one_sentence(calibrate))
app.command()(_one_sentence(load))
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
    _one_sentence(serve)
)


def _command() -> str:
    """The command as it was typed, for the report."""
    return shlex.join(["speca", *sys.argv[1:]])


if __name__ == "__main__":
    main()
