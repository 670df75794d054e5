"""The document docs/benchmarks.md: for each model, what SpeCa gives at 3x, 5x and 7x against each alternative."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from .field import chosen
from .pareto import Point, Reading, at_speed, paired_difference, reading
from .report import (
    OURS,
    about,
    adapting,
    batch_table,
    curves,
    families,
    guarantee_table,
    measured,
    missing_table,
    score_table,
)
from .report import signal_table as signals

Rows = Sequence[dict[str, Any]]
ASKED = (3.0, 5.0, 7.0)
KINDS = {
    "steps": "fewer steps or another solver", "forecast": "a fixed interval", "speca": "SpeCa, other rules",
    "schedule": "a fixed schedule", "rival": "a cache of diffusers or cache-dit",
}  # fmt: skip

HEAD = """# Benchmarks

Written by `make bench` from the raw results in `docs/results/bench/`; no figure here is typed by hand. Each file there
was made by `speca bench MODEL --suite full`, whose first line names seeds, hardware and versions.

**How to read it.** A sample is compared with the one that the same model makes from the same seed with every step
computed. PSNR is of floats, in dB. A method is swept, and its value at a speed lies between two neighbours of the best
settings of its own sweep. *Speed* is FLOPs of the transformer, with everything a method adds counted; time stands
beside it. P5 is the 5th percentile over samples, what one image in twenty falls below. Brackets are 95 % bootstrap
intervals over samples and, where time is measured, over rounds of timing too. These are small models: what they say of
FLUX or HunyuanVideo is the order of methods at most.
"""


def document(found: Mapping[str, Rows], gpu: str = "") -> str:
    """The whole text, from the rows of each model and the JSON of the GPU suite, if there is one."""
    parts = [HEAD]
    if not found:
        parts.append("No results are committed yet.\n")
    for model, rows in found.items():
        parts.append("\n".join(section(model, rows)) + "\n")
    if gpu:
        parts.append("\n".join(gpu_section(json.loads(gpu))) + "\n")
    return "\n".join(parts)


def section(model: str, rows: Rows) -> list[str]:
    """One model."""
    lines = [f"## {model}", "", *[line for paragraph in about(rows[0]) for line in (paragraph, "")]]
    pictures = [f"![Typical and worst](img/bench-{model}.svg)", "", f"![Curves](img/bench-{model}-curves.svg)"]
    run = {row["method"] for row in rows if "method" in row}
    if absent := [method.name for method in chosen([], rows[0]["suite"]["steps"]) if method.name not in run]:
        lines += [f"Methods of the field that were left out of this run: {', '.join(absent)}.", ""]
    lines += [*answers(rows), "", *pictures]
    lines += ["", "### In quality", "", *quality_table(rows), "", "### In seconds", "", *in_seconds(rows)]
    titled = {
        "How fast for a guarantee": [*guarantee_table(rows), "", *adapting(rows)],
        "How good is the check?": signals(rows),
        "Agreement and distances": score_table(rows),
        "Batches": batch_table(rows),
        "What could not run": missing_table(rows),
    }
    for title, part in titled.items():
        if part:
            lines += ["", f"### {title}", "", *part]
    return lines


def answers(rows: Rows, axis: str = "flops") -> list[str]:
    """For each speed one sentence: SpeCa, and the best of each other family, with the paired difference.

    Where no tolerance is as fast as that, SpeCa is given a budget.
    """
    found, family = curves(rows, axis), families(rows)
    lines = []
    for speed in ASKED:
        reach = {name: reading(found.get(name, []), speed) for name in (OURS, "speca-budget")}
        own, ours = next(((name, v) for name, v in reach.items() if v is not None), (OURS, None))
        if ours is None:
            lines.append(f"- **{speed:g}x.** The sweep of `{OURS}` does not reach {speed:g}x here.")
            continue
        told = []
        for kind, words in KINDS.items():
            best = _best(found, [name for name in found if family[name] == kind and name not in reach], speed)
            if best:
                name, other = best
                mean, low, high = paired_difference(ours, other)
                told.append(f"{words} `{name}` {_three(other.values)}, {_against(mean, low, high)}")
        lines.append(
            f"- **{speed:g}x.** `{own}`: {_three(ours.values)} dB (median / P5 / worst). The best of the others:"
        )
        lines += [f"  - {one}." for one in told]
    return lines


def _best(found: dict[str, list[Point]], names: Sequence[str], speed: float) -> tuple[str, Reading] | None:
    read = {name: reading(found[name], speed) for name in names}
    known = {name: r for name, r in read.items() if r is not None}
    if not known:
        return None
    name = max(known, key=lambda n: float(known[n].values.quantile(0.5)))
    return name, known[name]


def _three(values: Tensor) -> str:
    return f"{values.quantile(0.5):.1f} / {values.quantile(0.05):.1f} / {values.min():.1f}"


def _against(mean: float, low: float, high: float) -> str:
    word = "better" if low > 0 else "worse" if high < 0 else "no different"
    return f"SpeCa is {word} by the mean ({mean:+.1f} [{low:+.1f}, {high:+.1f}])"


def quality_table(rows: Rows) -> list[str]:
    """Median, P5 and worst of every method at each speed, in FLOPs."""
    found, family = curves(rows), families(rows)
    lines = [
        f"| method | {' | '.join(f'{speed:g}x' for speed in ASKED)} |",
        f"| --- |{' ---: |' * len(ASKED)}",
    ]
    body = []
    for name, points in found.items():
        values = [at_speed(points, speed) for speed in ASKED]
        if any(v is not None for v in values):
            first = next(float(v.quantile(0.5)) - 100 * k for k, v in enumerate(values) if v is not None)
            shown = f"**{name}**" if name == OURS else f"_{name}_" if family[name] == "oracle" else name
            body.append((first, f"| {shown} | {' | '.join('-' if v is None else _three(v) for v in values)} |"))
    return [*lines, *(line for _, line in sorted(body, reverse=True))]


def in_seconds(rows: Rows) -> list[str]:
    """The answers at each speed in time, and a table: time saved at each speed in FLOPs, quality at each in time."""
    by_flops, by_time = measured(rows), curves(rows, "wall")
    if not by_time:
        return ["Nothing was timed."]
    batch = next(r["batch"] for r in rows if r["kind"] == "time")
    counts = sorted({len(r["wall_all"]) for r in by_flops if r["wall_all"]})
    lines = [
        f"Calls of {batch} samples, {' or '.join(map(str, counts))} rounds. At each speed-up in *time*:",
        "",
        *answers(rows, "wall"),
        "",
        "First the speed-up in time at each speed-up in FLOPs, then median and P5 of PSNR at each speed-up in time.",
        "",
        f"| method | {' | '.join(f'time at {s:g}x FLOPs' for s in ASKED)} | "
        f"{' | '.join(f'dB at {s:g}x time' for s in ASKED)} |",
        f"| --- |{' ---: |' * 2 * len(ASKED)}",
    ]
    for name, points in by_time.items():
        settings = [r for r in by_flops if r["method"] == name and r["wall_speedup"]]
        swept = [Point(r["flops_speedup"], (r["wall_speedup"],)) for r in settings]
        times = [_between(swept, speed) for speed in ASKED]
        values = [at_speed(points, speed) for speed in ASKED]
        cells = [*("-" if t is None else f"{t:.2f}x" for t in times), *(_two(v) for v in values)]
        if set(cells) != {"-"}:
            lines.append(f"| {f'**{name}**' if name == OURS else name} | {' | '.join(cells)} |")
    return lines


def _between(points: Sequence[Point], speed: float) -> float | None:
    """Linear between the two settings on either side, whatever their quality."""
    ordered = sorted(points, key=lambda p: p.speed)
    for low, high in pairwise(ordered):
        if low.speed <= speed <= high.speed:
            share = (speed - low.speed) / (high.speed - low.speed) if high.speed > low.speed else 0.0
            return low.values[0] + share * (high.values[0] - low.values[0])
    return None


def _two(values: Tensor | None) -> str:
    return "-" if values is None else f"{values.quantile(0.5):.1f} / {values.quantile(0.05):.1f}"


def gpu_section(found: dict[str, Any]) -> list[str]:
    """The GPU suite: what steps cost at full size, and what runs cost at the same number of full steps."""
    lines = [
        "## Full-size models on a GPU, random weights", "",
        f"{found['hardware']}, {found['dtype']}, {found['steps']} steps with a period of {found['period']}; "
        f"`make bench-gpu`. Random weights: time and memory only.", "",
        "| model | batch | | full step | draft | checked | rejected | speca | module towers | cache-dit | TaylorSeer "
        "of diffusers | kept by speca | by towers |",
        "| --- | ---: | --- |" + " ---: |" * 10,
    ]  # fmt: skip
    for model in found["models"]:
        by = {row["method"]: row for row in model["rows"] if "seconds" in row}
        full = by.get("full", {}).get("seconds")
        names = ("speca, unchecked", "module towers (the authors' layout)", "cache-dit", "diffusers TaylorSeer")
        ratios = [f"{full / by[n]['seconds']:.2f}x" if full and n in by else "-" for n in names]
        steps = [_ms(model.get(k)) for k in ("full_step", "draft_step", "checked_step", "rejected_step")]
        kept = [_mib(by.get(n, {}).get("cache_bytes")) for n in names[:2]]
        kind = "compiled" if model["compiled"] else "eager"
        lines.append(f"| {model['model']} | {model['batch']} | {kind} | {' | '.join([*steps, *ratios, *kept])} |")
    if found["left_out"]:
        lines += ["", f"Left out for want of time: {', '.join(found['left_out'])}."]
    if found["trained"]:
        lines += ["", "### The bundled models there", "", "| model | batch | setting | time | PSNR median |",
                  "| --- | ---: | --- | ---: | ---: |"]  # fmt: skip
        for row in found["trained"]:
            name = f"| {row['model']} | {row['batch']} | {row['method']} {row['value']} |"
            if "speedup" in row:
                lines.append(f"{name} {row['speedup']:.2f}x | {statistics.median(row['psnr']):.1f} |")
    return lines


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f} ms"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"
