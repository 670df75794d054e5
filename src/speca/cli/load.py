"""`speca load`: how a server does under a load."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError


def load(
    url: Annotated[str, typer.Argument(help="Address of the server.")] = "http://127.0.0.1:8000",
    rate: Annotated[float, typer.Option(help="Images a second, more than 0, at random times.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="For how long new requests come, more than 0.")] = 30.0,
    model: Annotated[str | None, typer.Option(help="Which model; default: the only one.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text or class to draw; several take turns.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: the server's.")] = None,
    preset: Annotated[str | None, typer.Option(help="faithful, balanced, fast, paper, or full.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Budget, 1 or more.")] = None,
    compared: Annotated[int, typer.Option(help="Images that are drawn again in full and compared, 0 or more.")] = 8,
    api_key: Annotated[str, typer.Option(envvar="SPECA_API_KEY", help="API key of the server.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 120.0,
    seed: Annotated[int, typer.Option(help="Seed of the first image, and of the times.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else.")] = False,
) -> None:
    """Send a server requests at a rate, answered or not, and report latency, throughput, refusals and quality."""
    from . import output

    if rate <= 0 or seconds <= 0:
        raise InputError("--rate and --seconds must be more than 0.")
    texts = list(prompt or [])
    if prompts is not None:
        try:
            texts += [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise InputError(f"--prompts {prompts} cannot be read ({error.strerror}).") from error
    if not texts:
        raise InputError("give --prompt, for example --prompt 'a red apple', or --prompts FILE.")
    try:
        from ..serve import load as loads
    except ImportError as error:
        raise InputError("speca load needs httpx: pip install 'speca-diffusers[serve]'.") from error
    fields = {"num_inference_steps": steps, "preset": preset, "speedup": speedup}
    asked = loads.Load(
        url.rstrip("/"), rate, seconds, model, texts, {n: v for n, v in fields.items() if v is not None}, compared,
        api_key, timeout, seed,
    )  # fmt: skip
    found = asyncio.run(loads.run(asked)).to_dict()
    if as_json:
        typer.echo(output.to_json(found))
    else:
        output.show(f"{url}, {rate:g} images a second for {seconds:g} s", _rows(found))


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("images", str(found["images"])), ("images a second", f"{found['images_a_second']:.2f}")]
    for name, title in (("seconds", "seconds"), ("waited", "of it in the queue")):
        if found[name]:
            rows.append((f"{title}, P50 / P95 / P99", " / ".join(f"{v:.2f}" for v in found[name].values())))
    rows.append(("refused", f"{found['refused']} ({found['refused_share']:.0%})"))
    if found["retry_after"]:
        rows.append(("asked to wait, P50", f"{found['retry_after']['p50']:.0f} s"))
    rows.append(("failed", str(found["failed"])))
    if found["full_share"] is not None:
        rows.append(("steps computed in full", f"{found['full_share']:.0%}"))
    if found["psnr"]:
        rows.append(("PSNR to the full run, median / P5", "{median:.1f} / {p5:.1f} dB".format(**found["psnr"])))
    return rows
