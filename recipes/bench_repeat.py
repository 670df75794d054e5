"""Does a bench repeat itself? Two runs of one suite, set against each other.

    speca bench fashion-dit --suite quick --out one && speca bench fashion-dit --suite quick --out two
    python recipes/bench_repeat.py one/results.jsonl two/results.jsonl
    python recipes/bench_repeat.py docs/results/bench/fashion-dit.jsonl      # its earlier rounds and its later ones

At every speed and on both axes, the median PSNR that a method reached in the second run is looked up in the 95 %
interval of the first. Seeds are the same, so settings give the same pictures; how fast each was differs, and with it
what is read off at a speed in seconds. For comparison, how many would lie in intervals over samples alone.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from speca.bench.pareto import SPEEDS, Reading, median_interval, reading
from speca.bench.report import AXES
from speca.bench.results import curves, measured


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def halves(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same rows twice, with the earlier and with the later rounds of what was timed in four rounds or more."""
    at = [(r["method"], r["value"], r["batch"]) if r["kind"] == "time" else None for r in rows]
    count = Counter(at)
    half = [count[key] // 2 if count[key] >= 4 else 0 for key in at]
    timed = list(zip(rows, at, half, strict=True))
    return (
        [r for r, key, middle in timed if key is None or r["round"] < middle],
        [r for r, key, middle in timed if key is None or (middle and r["round"] >= middle)],
    )


def main(
    one: Annotated[Path, typer.Argument(help="Results of the first run.", exists=True)],
    two: Annotated[Path | None, typer.Argument(help="Those of the second; without, rounds are halved.")] = None,
) -> None:
    """Print how many medians of the second run lie in the intervals of the first, and how much times differ."""
    first, second = (rows_of(one), rows_of(two)) if two else halves(rows_of(one))
    table = Table("axis", "speed", "methods", "median inside", "by samples alone", "outside")
    for axis, name in AXES.items():
        before, after = curves(first, axis), curves(second, axis)
        for speed in SPEEDS:
            inside, narrow, outside = 0, 0, []
            for method in sorted(before.keys() & after.keys()):
                then, now = reading(before[method], speed), reading(after[method], speed)
                if then is None or now is None:
                    continue
                middle = float(now.values.quantile(0.5))
                (_, low, high), (_, least, most) = median_interval(then), median_interval(Reading(then.values))
                inside += low <= middle <= high
                narrow += least <= middle <= most
                if not low <= middle <= high:
                    outside.append(f"{method} ({middle:.1f}, {low:.1f} to {high:.1f})")
            count = inside + len(outside)
            table.add_row(name, f"{speed:g}x", str(count), str(inside), str(narrow), ", ".join(outside))
    console = Console(width=120)
    console.print(table)
    known = {(r["method"], r["value"]): r for r in map(_hashable, measured(first))}
    pairs = [(known[key], r) for r in map(_hashable, measured(second)) if (key := (r["method"], r["value"])) in known]
    apart = [max(abs(x - y) for x, y in zip(a["psnr"], b["psnr"], strict=True)) for a, b in pairs]
    same = sum(value == 0 for value in apart)
    if two:
        console.print(
            f"{same} of {len(pairs)} settings gave the same PSNR for every sample, others within {max(apart):.3f} dB"
        )
    ratios = [b["wall_speedup"] / a["wall_speedup"] for a, b in pairs if a["wall_speedup"] and b["wall_speedup"]]
    if ratios:
        off = sorted(abs(ratio - 1) for ratio in ratios)
        console.print(f"speed-ups differ by {statistics.median(off):.1%} at the median, by {off[-1]:.1%} at most")


def _hashable(row: dict[str, Any]) -> dict[str, Any]:
    value = row["value"]
    return {**row, "value": tuple(value) if isinstance(value, list) else value}


if __name__ == "__main__":
    typer.run(main)
