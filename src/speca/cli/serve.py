"""`speca serve`: its options are the settings of the server, one flag for each."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError

NAMED = {"models"}
"""Settings that are no flags: models are arguments, or tables of the file."""


def serve(context: typer.Context) -> None:
    """Serve models over HTTP: OpenAI's images and videos API, jobs, metrics, a playground."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise ConfigError("the server needs more packages: pip install 'speca-diffusers[serve]'.") from error
    inner = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    inner.command()(command())
    inner(context.args, prog_name="speca serve", standalone_mode=False)


def _run(**flags: Any) -> None:
    """Serve models over HTTP, with the endpoints of OpenAI's images and videos API, jobs, metrics and a playground.

    Settings come from flags, or from a TOML file with the same names: max_batch = 16, a table for the limits, whose
    steps = 100 is --limit-steps, and a table of models for each model. Flags win.
    """
    from ..serve import main, settings

    models, file = flags.pop("model") or [], flags.pop("config")
    given = {_setting(name): value for name, value in flags.items() if value is not None and value != []}
    if models:
        given["models"] = [{"model": model} for model in models]
    config = settings.read(file, given)
    if not config.models:
        raise ConfigError("name a model to serve, for example: speca serve fashion-dit.")
    main.run(config)


def _setting(flag: str) -> str:
    """The name of the setting that a parameter of the command stands for."""
    return f"limits.{flag.removeprefix('limit_')}" if flag.startswith("limit_") else flag


def command() -> Callable[..., None]:
    """Return a function for typer whose parameters are made from the settings."""
    parameters = [
        _parameter("model", Annotated[list[str] | None, typer.Argument(
            metavar="MODEL", help="Bundled models, folders of pipelines, or hub ids; several may be named.",
            show_default=False,
        )]),
        _parameter("config", Annotated[Path | None, typer.Option(help="TOML file with settings.", show_default=False)]),
        *_options(),
    ]  # fmt: skip

    def called(**flags: Any) -> None:
        _run(**flags)

    called.__doc__ = _run.__doc__
    called.__name__ = "serve"
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _options() -> Iterator[inspect.Parameter]:
    from ..serve.settings import Limits, ServerConfig

    fields = [
        (name, name, field) for name, field in ServerConfig.model_fields.items() if name not in {*NAMED, "limits"}
    ]
    fields += [(f"limit_{name}", name, field) for name, field in Limits.model_fields.items()]
    for flag, _, field in fields:
        kind, several = _kind(field.annotation)
        about = f"{field.description} {_range(field)}".strip()
        default = field.get_default()
        option = typer.Option(f"--{flag.replace('_', '-')}", help=about + _default(default), show_default=False)
        if kind is bool:
            option = typer.Option(
                f"--{flag.replace('_', '-')}/--no-{flag.replace('_', '-')}", help=about + _default(default),
                show_default=False,
            )  # fmt: skip
        yield _parameter(flag, Annotated[list[kind] | None if several else kind | None, option])  # type: ignore[valid-type]


def _kind(annotation: Any) -> tuple[Any, bool]:
    """The type of a flag's value, and whether it may be repeated."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _range(field: Any) -> str:
    """The range of a number, in brackets."""
    bounds = {type(m).__name__: getattr(m, type(m).__name__.lower()) for m in field.metadata}
    low, high = bounds.get("Ge", bounds.get("Gt")), bounds.get("Le", bounds.get("Lt"))
    if low is None:
        return ""
    if high is not None:
        return f"[{low} to {high}]"
    return f"[{'more than ' if 'Gt' in bounds else ''}{low}{'' if 'Gt' in bounds else ' or more'}]"


def _default(value: Any) -> str:
    if value is None or value == () or isinstance(value, bool):
        return ""
    return f" Default: {value}."
