"""Measure the engine: images a second against a loop over the pipeline, and what its scheduler costs.

    python recipes/engine_throughput.py                  # about ten minutes on two cores

Requests of the bundled models, with 20, 30 and 40 steps in turn. The same requests by a loop with and without speca,
in lock-step, and by the engine, also with text encoders and autoencoders run one request at a time; rounds of all of
them are interleaved and medians reported. Seconds are those of the processor, with one thread, so that other work on
the machine does not count; those of the clock are in the results. The scheduler's share is that of all ticks spent on
admitting requests, naming what fits together and choosing batches, with up to 64 requests live.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

import speca
from speca import zoo
from speca.engine import Engine
from speca.reports.measure import example_call, hardware

PICTURED = "emoji-flux"  # on clips the decoder's time leaves little to see
BEGIN, END = "<!-- engine:begin -->", "<!-- engine:end -->"


def asked(pipe: Any, model: str, count: int) -> list[dict[str, Any]]:
    """Requests that differ in seed, steps and condition."""
    base = {**zoo.call_arguments(model), "output_type": "np"}
    given = [example_call(pipe, [n]) for n in range(count)]
    return [{**base, **g, "num_inference_steps": 20 + n % 3 * 10, "generator_seed": n} for n, g in enumerate(given)]


def loop(pipe: Any, requests: list[dict[str, Any]]) -> None:
    """One call of the pipeline after another."""
    for request in requests:
        call = {n: v for n, v in request.items() if n != "generator_seed"}
        pipe(**call, generator=torch.Generator().manual_seed(request["generator_seed"]))


def cached_loop(pipe: Any, requests: list[dict[str, Any]]) -> None:
    """The same, accelerated."""
    with speca.enabled(pipe, calibration=None):
        loop(pipe, requests)


def by(mode: Any, found: dict[str, Any], **how: Any) -> Callable[[Any, list[dict[str, Any]]], None]:
    """The engine in one of its modes; its statistics are kept in `found`."""

    def run(pipe: Any, requests: list[dict[str, Any]]) -> None:
        with Engine(pipe, mode=mode, **how) as engine:
            for result in engine.generate(requests):
                assert result.error is None
            found.update(engine.statistics)
            found.setdefault("shares", []).append(found["planning"] / found["seconds"])

    return run


def table(results: list[dict[str, Any]]) -> str:
    """Images a processor second as Markdown, with what the engine's full forwards and its scheduler were like."""
    lines = [
        "| model | way | images a second | against the full loop | rows a full forward | scheduler |",
        "| --- " * 6 + "|",
    ]
    for model in dict.fromkeys(r["model"] for r in results):
        rates = {r["way"]: r["images_per_second"] for r in results if r["model"] == model and "way" in r}
        (more,) = [r for r in results if r["model"] == model and "way" not in r]
        engines = {"engine, lock-step": more["lock_step"], "engine, components apart": more["apart"],
                   "engine, continuous": more["continuous"]}  # fmt: skip
        for way, rate in rates.items():
            found, cells = engines.get(way), ["", ""]
            if found is not None:
                cells = [f"{found['lanes']['full']['rows_a_batch']:.1f}", f"{median(found['shares']):.1%}"]
            cells = [model, way, f"{rate:.2f}", f"{rate / rates['loop, every step full']:.2f}x", *cells]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    models: Annotated[str, typer.Option(help="Bundled names.")] = "fashion-dit,emoji-flux,emoji-video",
    count: Annotated[int, typer.Option(help="Requests.")] = 64,
    max_batch: Annotated[int, typer.Option(help="Most rows of one forward.")] = 16,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; times are medians.")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path, typer.Option(help="Raw results.")] = Path("docs/results/engine-throughput.json"),
    guide: Annotated[Path, typer.Option(help="File whose table is replaced.")] = Path("docs/engine.md"),
    picture: Annotated[Path, typer.Option(help="Timeline of an engine run.")] = Path("docs/img/engine.png"),
) -> None:
    """Measure and write."""
    torch.set_num_threads(threads)
    results: list[dict[str, Any]] = []
    for model in models.split(","):
        pipe = zoo.resolve(model)
        pipe.set_progress_bar_config(disable=True)
        requests, free, lock, apart = asked(pipe, model, count), {}, {}, {}
        ways = {
            "loop, every step full": loop,
            "loop, speca": cached_loop,
            "engine, lock-step": by("lock-step", lock, max_batch=max_batch),
            "engine, components apart": by("continuous", apart, max_batch=max_batch, component_batch=1),
            "engine, continuous": by("continuous", free, max_batch=max_batch),
        }
        loop(pipe, requests[:2])
        taken: dict[str, list[float]] = {way: [] for way in ways}
        clock: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, run in ways.items():
                began, worked = time.perf_counter(), time.process_time()
                run(pipe, requests)
                taken[way].append(time.process_time() - worked)
                clock[way].append(time.perf_counter() - began)
        share = median(free["shares"])
        for way, seconds in taken.items():
            rate = count / median(seconds)
            results.append(dict(model=model, way=way, images_per_second=rate, seconds=seconds, clock=clock[way]))
            print(f"{model:<12} {way:<24} {rate:6.2f} images a processor second", flush=True)
        for name, found in (("continuous", free), ("lock-step", lock), ("components apart", apart)):
            lane = found["lanes"]["full"]
            rows, reads, ticks = lane["rows_a_batch"], found["reads"], found["ticks"]
            print(f"  {name}: {rows:.1f} rows a full forward, {reads} reads in {ticks} ticks")
        print(f"  scheduler: {share:.2%} of tick time, at most {free['peak_live']} requests live")
        results.append(dict(model=model, scheduler_share=share, continuous=free, lock_step=lock, apart=apart))
        if model == PICTURED:
            with Engine(pipe, max_batch=max_batch, max_live=48) as engine:
                list(engine.generate(requests))
                engine.timeline(picture, f"{model}: {count} requests of 20, 30 and 40 steps, preset balanced")
    about = dict(command="python recipes/engine_throughput.py", requests=count, max_batch=max_batch, threads=threads,
                 rounds=rounds, hardware=hardware(pipe))  # fmt: skip
    out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    region = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    guide.write_text(region.sub(f"{BEGIN}\n{table(results)}\n{END}", guide.read_text()))


if __name__ == "__main__":
    typer.run(main)
