"""Write docs/benchmarks.md and docs/benchmarks/<model>.md from the result rows of each model.

docs/benchmarks.md has one table over all models and one plot for each model. Each model has a page with all figures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from .field import chosen
from .pareto import Point, Reading, at_speed, paired_difference, reading
from .report import about
from .results import OURS, Rows, curves, families, measured
from .tables import adapting, batch_table, guarantee_table, missing_table, score_table
from .tables import signal_table as signals

ASKED = (3.0, 5.0, 7.0)
OWN, GENERIC = (OURS, "speca-budget"), ("speca-unmeasured", "speca-generic-budget")
"""Methods of the column SpeCa (by tolerance, else by budget) and of the column without a calibration (by budget)."""

KINDS = {
    "steps": "fewer steps or another solver", "forecast": "a fixed interval", "speca": "SpeCa, other rules",
    "schedule": "a fixed schedule", "rival": "a cache of diffusers or cache-dit",
}  # fmt: skip

READING = """## How to read it

A sample is compared with the one that the same model makes from the same seed with every step computed. PSNR is of
floats, in dB. A method is swept, and its value at a speed lies between two neighbours of the best settings of its own
sweep. *Speed* is FLOPs of the transformer, with everything a method adds counted; time stands beside it. P5 is the 5th
percentile over samples: one image in twenty is worse. Brackets are 95 % bootstrap intervals over samples and, where
time is measured, over rounds of timing too. These are small models: what they say of FLUX or HunyuanVideo is the order
of methods at most.

Written by `make bench` from the raw results in `docs/results/bench/`; no figure here is typed by hand. Each file there
was made by `speca bench MODEL --suite full`, whose first line names seeds, hardware and versions.
"""


# ------------------------------------------------------------------------------------------------ the first page
def overview(found: Mapping[str, Rows], gpu: bool = False, pages: str = "benchmarks", pictures: str = "img") -> str:
    """Return docs/benchmarks.md from the rows of each model.

    `pages` and `pictures` are folder paths relative to it. With `gpu`, link the page of the GPU suite.
    """
    lines = ["# Benchmarks", ""]
    others = ["", f"Full-size models with random weights on a GPU: [gpu]({pages}/gpu.md)."] if gpu else []
    if not found:
        return "\n".join([*lines, "No results are committed yet.", *others]) + "\n"
    counts = " or ".join(map(str, sorted({len(rows[0]["seeds"]) for rows in found.values()})))
    opening = (
        f"How close a run stays to the full run of the same seed, at the same cost: PSNR in dB, median / 5th "
        f"percentile over {counts} samples. Columns that name a method show the best of their kind. SpeCa uses the "
        f"calibration that comes with the model, as the fixed schedules use a search on the model; the column after it "
        f"is SpeCa with a budget and no calibration. "
        f"*Time* is by how much SpeCa shortens a run at that number of FLOPs. The best of a row is bold."
    )
    lines += [textwrap.fill(opening, 119), "", *overview_table(found)]
    for model, rows in found.items():
        first = rows[0]
        lines += [
            "", f"## {model}", "", f"![{model}: typical and worst at the same cost]({pictures}/bench-{model}.svg)", "",
            f"`{first['pipeline']}`, {first['parameters'] / 1e6:.1f} M parameters, {first['suite']['steps']} steps. "
            f"All methods, times, scores and curves: [{model}]({pages}/{model}.md).",
        ]  # fmt: skip
    return "\n".join([*lines, *others, "", READING])


def overview_table(found: Mapping[str, Rows]) -> list[str]:
    """Return a table with one row per model and speed: SpeCa with and without calibration, best of each other kind."""
    kinds = [kind for kind in KINDS if kind != "speca"]
    heads = ["SpeCa", "SpeCa, not calibrated", *(KINDS[kind] for kind in kinds)]
    lines = [f"| model | fewer FLOPs | time | {' | '.join(heads)} |", f"| --- | ---: | ---: |{' --- |' * len(heads)}"]
    for model, rows in found.items():
        swept, family, times = curves(rows), families(rows), _times(rows)
        for speed in ASKED:
            own, generic = (_first(swept, names, speed) for names in (OWN, GENERIC))
            others = [_best(swept, [n for n in swept if family[n] == kind], speed) for kind in kinds]
            shown = [own, generic, *others]
            best = max((float(found[1].values.quantile(0.5)) for found in shown if found), default=0.0)
            spent = times(own[0], speed) if own else None
            cells = ["-" if spent is None else f"{spent:.2f}x", *(_named(found, best) for found in shown)]
            lines.append(f"| {model} | {speed:g}x | {' | '.join(cells)} |")
    return lines


def _named(found: tuple[str, Reading] | None, best: float) -> str:
    """Return a method's median and 5th percentile, and its name unless it is SpeCa; bold if the median is `best`."""
    if found is None:
        return "-"
    name, read = found
    shown = f"**{_two(read.values)}**" if float(read.values.quantile(0.5)) >= best else _two(read.values)
    return shown if name in (*OWN, *GENERIC) else f"{shown} `{name}`"


# ------------------------------------------------------------------------------------------------ the page of a model
def model_page(model: str, rows: Rows, back: str = "../benchmarks.md", pictures: str = "../img") -> str:
    """Return the page of one model; `back` is the path of the first page, `pictures` that of the folder of plots."""
    lines = [f"# Benchmarks of {model}", "", f"[All models, and how to read this]({back}).", ""]
    lines += [line for paragraph in about(rows[0]) for line in (paragraph, "")]
    run = {row["method"] for row in rows if "method" in row}
    if absent := [method.name for method in chosen([], rows[0]["suite"]["steps"]) if method.name not in run]:
        lines += [f"Methods of the field that were left out of this run: {', '.join(absent)}.", ""]
    lines += [*answers(rows), "", f"![Typical and worst]({pictures}/bench-{model}.svg)", ""]
    lines += [f"![Curves]({pictures}/bench-{model}-curves.svg)"]
    titled = {
        "In quality": quality_table(rows),
        "In seconds": in_seconds(rows),
        "How fast at a given 5th percentile": [*guarantee_table(rows), "", *adapting(rows)],
        "How good is the check?": signals(rows),
        "Agreement and distances": score_table(rows),
        "Batches": batch_table(rows),
        "What could not run": missing_table(rows),
    }
    for title, part in titled.items():
        if part:
            lines += ["", f"## {title}", "", *part]
    return "\n".join(lines).rstrip() + "\n"


def answers(rows: Rows, axis: str = "flops") -> list[str]:
    """Return, for each speed, SpeCa and the best method of each other family with the paired difference."""
    found, family = curves(rows, axis), families(rows)
    lines = []
    for speed in ASKED:
        own = _first(found, OWN, speed)
        if own is None:
            lines.append(f"- **{speed:g}x.** The sweep of `{OURS}` does not reach {speed:g}x here.")
            continue
        ours = own[1]
        lines.append(
            f"- **{speed:g}x.** `{own[0]}`: {_three(ours.values)} dB (median / P5 / worst). The best of the others:"
        )
        for kind, words in KINDS.items():
            best = _best(found, [name for name in found if family[name] == kind and name not in OWN], speed)
            if best:
                name, other = best
                mean, low, high = paired_difference(ours, other)
                lines.append(f"  - {words} `{name}` {_three(other.values)}, {_against(mean, low, high)}.")
    return lines


def _first(found: dict[str, list[Point]], names: Sequence[str], speed: float) -> tuple[str, Reading] | None:
    """Return the first of the methods whose sweep reaches a speed."""
    read = ((name, reading(found.get(name, []), speed)) for name in names)
    return next(((name, values) for name, values in read if values is not None), None)


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
    """Return a table of the median, P5 and worst PSNR of every method at each speed-up in FLOPs."""
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
    """Return the comparison at each speed-up in time, and a table of speed-up in time by FLOPs and quality by time."""
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
    times_at = _times(rows)
    for name, points in by_time.items():
        times = [times_at(name, speed) for speed in ASKED]
        values = [at_speed(points, speed) for speed in ASKED]
        cells = [*("-" if t is None else f"{t:.2f}x" for t in times), *(_two(v) for v in values)]
        if set(cells) != {"-"}:
            lines.append(f"| {f'**{name}**' if name == OURS else name} | {' | '.join(cells)} |")
    return lines


def _times(rows: Rows) -> Callable[[str, float], float | None]:
    """Return the speed-up in time of a method at a speed-up in FLOPs."""
    swept: dict[str, list[Point]] = {}
    for row in measured(rows):
        if row["wall_speedup"]:
            swept.setdefault(row["method"], []).append(Point(row["flops_speedup"], (row["wall_speedup"],)))
    return lambda name, speed: _between(swept.get(name, []), speed)


def _between(points: Sequence[Point], speed: float) -> float | None:
    """Interpolate linearly between the two settings with the nearest lower and higher speed, ignoring quality."""
    ordered = sorted(points, key=lambda p: p.speed)
    for low, high in pairwise(ordered):
        if low.speed <= speed <= high.speed:
            share = (speed - low.speed) / (high.speed - low.speed) if high.speed > low.speed else 0.0
            return low.values[0] + share * (high.values[0] - low.values[0])
    return None


def _two(values: Tensor | None) -> str:
    return "-" if values is None else f"{values.quantile(0.5):.1f} / {values.quantile(0.05):.1f}"
