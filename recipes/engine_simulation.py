"""What drifting apart is worth: the engine's own scheduler on real traces, with the times of an imagined GPU.

    python recipes/engine_simulation.py                  # about three minutes on two cores, most of it for the traces

The traces are real: what each of some samples of the bundled model did at each step. The times are not measured, as no
GPU was at hand. A full forward of b rows takes `max(b, width) + setup`, in units of a saturated row:

- "saturated": width 1, setup 0.3. Batching gains at most 30 %, which is what SGLang-Diffusion reports for merging
  requests at one step on an H100 (pull request #18764 of sgl-project/sglang: best case +29.6 %).
- "hungry": width 8, setup 0.3: eight rows take no longer than one. An assumption, for small pictures on large GPUs.

A draft of "balanced", a forecast output, takes no time; one of "verified" as much for each row as one block of the
model, and half of `setup` once. Four ways to serve the same requests:

- none: batches in lock-step, every step full;
- batch-wide: a batch drafts when all of its samples would, so that each has the quality it asked for;
- lock-step: each sample decides for itself, and the batch waits for those that must be full;
- continuous: the engine, with four times as many requests live as fit into one forward.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.progress import track

import speca
from speca.config import Config
from speca.engine.scheduler import Lane, Scheduler
from speca.reports.measure import generate
from speca.zoo import resolve

CAPS = (1, 2, 4, 8, 16, 32, 64)
PRESETS: dict[str, Config] = {
    "balanced": speca.PRESETS["balanced"],
    "verified": speca.VerifiedConfig(threshold=0.06, threshold_decay=1.0, max_draft=6),
}
WAYS = ("none", "batch-wide", "lock-step", "continuous")
NOTES = {
    "none": "every step full", "batch-wide": "batch-wide decisions", "lock-step": "per sample, in lock-step",
    "continuous": "per sample, drifting apart (engine)",
}  # fmt: skip
COLOURS = {"none": "#9aa3ad", "batch-wide": "#d8573c", "lock-step": "#e3a33c", "continuous": "#1f3b57"}


class Cost(NamedTuple):
    """Times of an imagined GPU, in units of one row of a large batch; drafts of a model without `blocks` take none."""

    width: float
    setup: float
    blocks: int = 0

    def full(self, rows: int) -> float:
        return max(rows, self.width) + self.setup

    def draft(self, rows: int) -> float:
        return max(rows, self.width) / self.blocks + self.setup / 2 if self.blocks else 0.0


def simulate(traces: Sequence[str], cap: int, cost: Cost, *, lockstep: bool) -> tuple[float, float]:
    """Time to serve all requests by the engine's scheduler, and the mean rows of its full forwards."""
    scheduler = Scheduler(max_batch=cap, max_live=cap if lockstep else 4 * cap, lockstep=lockstep)
    todo = {n: deque(work(trace, drafts=cost.blocks > 0)) for n, trace in enumerate(traces)}
    for n in todo:
        scheduler.submit(n)
    now, rows, batches = 0.0, 0, 0

    def go_on(n: int) -> None:
        if todo[n]:
            step, lane = todo[n].popleft()
            scheduler.post(n, lane, "all", step=step)
        else:
            scheduler.end(n)

    while scheduler.queue or scheduler.live:
        for n in scheduler.admit():
            go_on(n)
        for batch in scheduler.plan():
            now += cost.full(batch.rows) if batch.lane is Lane.FULL else cost.draft(batch.rows)
            rows, batches = rows + batch.rows * (batch.lane is Lane.FULL), batches + (batch.lane is Lane.FULL)
            for ticket in batch.tickets:
                go_on(ticket.request)
    return now, rows / batches


def work(trace: str, *, drafts: bool) -> list[tuple[int, Lane]]:
    """The forwards of one request: a rejected draft is both; where `drafts` are no forwards, full steps alone."""
    draft = [Lane.DRAFT] if drafts else []
    lanes = {"F": [Lane.FULL], "A": draft, "R": [*draft, Lane.FULL]}
    return [(step, lane) for step, letter in enumerate(trace) for lane in lanes[letter]]


def in_batches(traces: Sequence[str], cap: int, cost: Cost, *, cached: bool) -> float:
    """Time of plain batches, in which a step is full if it is for any of them, or always."""
    now = 0.0
    for at in range(0, len(traces), cap):
        batch = traces[at : at + cap]
        for letters in zip(*batch, strict=True):
            if cached and "R" in letters:
                now += cost.draft(len(batch))
            full = not cached or set(letters) != {"A"}
            now += cost.full(len(batch)) if full else cost.draft(len(batch))
    return now


def trace(model: str, config: Config, samples: int, steps: int) -> list[str]:
    """What each sample of the model does at each step."""
    pipe = resolve(model)
    seeds = list(range(samples))
    run = generate(pipe, dict(class_labels=[s % 10 for s in seeds], num_inference_steps=steps), seeds, config, batch=16)
    assert run.report is not None
    return [sample.decisions for sample in run.report.samples]


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Throughput over the cap, as a multiple of that without caching at the same cap."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for line, preset in zip(axes, PRESETS, strict=True):
        for ax, gpu in zip(line, ("saturated", "hungry"), strict=True):
            mine = [r for r in rows if r["preset"] == preset and r["gpu"] == gpu]
            for way in WAYS:
                points = [r for r in mine if r["way"] == way]
                ax.plot(
                    [r["cap"] for r in points], [r["speedup"] for r in points], marker="o", markersize=4,
                    color=COLOURS[way], label=NOTES[way], linewidth=2 if way == "continuous" else 1.4,
                )  # fmt: skip
            by = {way: {r["cap"]: r["speedup"] for r in mine if r["way"] == way} for way in WAYS}
            caps = sorted(by["continuous"])
            ax.fill_between(caps, [by["lock-step"][c] for c in caps], [by["continuous"][c] for c in caps],
                            color=COLOURS["continuous"], alpha=0.08, linewidth=0)  # fmt: skip
            ax.set_xscale("log", base=2)
            ax.set_xticks(CAPS, [str(c) for c in CAPS])
            ax.set_title(f"{preset} traces, {gpu} GPU (cost model)", fontsize=10)
            ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[1]:
        ax.set_xlabel("most rows of one forward")
    for ax in axes[:, 0]:
        ax.set_ylabel("throughput, uncached = 1")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main(
    model: Annotated[str, typer.Option(help="Bundled name of a class-to-image model.")] = "fashion-dit",
    samples: Annotated[int, typer.Option(help="Samples that traces are taken from.")] = 64,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    requests: Annotated[int, typer.Option(help="Requests, drawn from the traces.")] = 512,
    out: Annotated[Path, typer.Option(help="Raw results.")] = Path("docs/results/engine-simulation.json"),
    picture: Annotated[Path, typer.Option(help="The curves.")] = Path("docs/img/engine-simulation.png"),
    again: Annotated[bool, typer.Option(help="Take the traces anew, not from the results.")] = False,
) -> None:
    """Take traces, simulate, write and draw."""
    torch.set_num_threads(1)
    known = json.loads(out.read_text())["traces"] if out.is_file() and not again else {}
    traces = {n: known.get(n) or trace(model, config, samples, steps) for n, config in PRESETS.items()}
    blocks = len(resolve(model).transformer.transformer_blocks)
    rows: list[dict[str, object]] = []
    for gpu, width in track({"saturated": 1.0, "hungry": 8.0}.items(), description="simulating"):
        for preset, pool in traces.items():
            cost = Cost(width, 0.3, blocks if isinstance(PRESETS[preset], speca.VerifiedConfig) else 0)
            drawn = random.Random(0).choices(pool, k=requests)
            for cap in CAPS:
                plain = in_batches(drawn, cap, cost, cached=False)
                lock, lock_rows = simulate(drawn, cap, cost, lockstep=True)
                free, free_rows = simulate(drawn, cap, cost, lockstep=False)
                wide = in_batches(drawn, cap, cost, cached=True)
                took = {"none": (plain, float(cap)), "batch-wide": (wide, float(cap)),
                        "lock-step": (lock, lock_rows), "continuous": (free, free_rows)}  # fmt: skip
                rows += [
                    dict(gpu=gpu, preset=preset, cap=cap, way=way, speedup=plain / time, time=time, full_rows=mean)
                    for way, (time, mean) in took.items()
                ]
    out.parent.mkdir(parents=True, exist_ok=True)
    command, times = "python recipes/engine_simulation.py", "a cost model, not measured: see the recipe"
    about = dict(model=model, steps=steps, requests=requests, blocks=blocks, command=command, times=times)
    out.write_text(json.dumps({**about, "traces": traces, "rows": rows}, indent=1) + "\n")
    plot(rows, picture)
    for gpu in ("saturated", "hungry"):
        for preset in PRESETS:
            print(f"\n{preset}, {gpu}: throughput against none at the same cap (rows of a full forward)")
            print("| cap | " + " | ".join(WAYS[1:]) + " |\n| --- | --- | --- | --- |")
            for cap in CAPS:
                found = {str(r["way"]): r for r in rows if (r["gpu"], r["preset"], r["cap"]) == (gpu, preset, cap)}
                cells = [f"{found[w]['speedup']:.2f}x ({found[w]['full_rows']:.1f})" for w in WAYS[1:]]
                print(f"| {cap} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
