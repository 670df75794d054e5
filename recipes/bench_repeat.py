"""Does a bench repeat itself? Two runs of one suite, set against each other.

    speca bench fashion-dit --suite quick --out one && speca bench fashion-dit --suite quick --out two
    python recipes/bench_repeat.py one two

At every speed and on both axes, the median PSNR that a method reached in the second run is looked up in the 95 %
interval of the first. Seeds are the same, so settings give the same pictures; how fast each was differs, and with it
what is read off at a speed in seconds.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from speca.bench.pareto import SPEEDS, at_speed, median_interval
from speca.bench.report import AXES, curves, measured


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def main(
    one: Annotated[Path, typer.Argument(help="Folder of the first run.", exists=True)],
    two: Annotated[Path, typer.Argument(help="Folder of the second run.", exists=True)],
) -> None:
    """Print how many medians of the second run lie in the intervals of the first, and how much times differ."""
    first, second = rows_of(one), rows_of(two)
    table = Table("axis", "speed", "methods", "median inside", "outside")
    for axis, name in AXES.items():
        before, after = curves(first, axis), curves(second, axis)
        for speed in SPEEDS:
            inside, outside = [], []
            for method in sorted(before.keys() & after.keys()):
                then, now = at_speed(before[method], speed), at_speed(after[method], speed)
                if then is None or now is None:
                    continue
                _, low, high = median_interval(then)
                met = low <= float(now.quantile(0.5)) <= high
                (inside if met else outside).append(method)
            count = len(inside) + len(outside)
            table.add_row(name, f"{speed:g}x", str(count), str(len(inside)), ", ".join(outside))
    console = Console(width=120)
    console.print(table)
    known = {(r["method"], r["value"]): r for r in map(_hashable, measured(first))}
    pairs = [(known[key], r) for r in map(_hashable, measured(second)) if (key := (r["method"], r["value"])) in known]
    apart = [max(abs(x - y) for x, y in zip(a["psnr"], b["psnr"], strict=True)) for a, b in pairs]
    same = sum(value == 0 for value in apart)
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
