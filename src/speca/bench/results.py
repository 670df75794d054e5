"""Select rows of a results file: settings that ran, the curve of each method, and settings that could not run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .measure import IDENTICAL
from .pareto import Point, redrawn

Rows = Sequence[dict[str, Any]]
OURS = "speca"


def measured(rows: Rows, batch: int | None = None) -> list[dict[str, Any]]:
    """Return the settings that ran, with `wall_speedup`, the median over rounds, where calls of `batch` were timed.

    Without `batch`, use the first batch size that was timed. Each time is divided into that of the full run timed next
    to it. On a CPU, times are processor time, which depends little on other load of the machine.
    """
    times = [r for r in rows if r["kind"] == "time"]
    clock = "processor" if rows[0]["hardware"].get("device") == "cpu" else "seconds"
    batch = batch or (times[0]["batch"] if times else None)
    ratios: dict[tuple[str, Any], list[float]] = {}
    for row in times:
        if row["batch"] == batch:
            ratio = row[f"{clock}_full"] / row[clock]
            ratios.setdefault((row["method"], row["value"]), []).append(ratio)
    out = []
    for row in rows:
        if row["kind"] == "quality" and "reason" not in row:
            found = ratios.get((row["method"], row["value"]), [])
            out.append({**row, "wall_speedup": statistics.median(found) if found else None, "wall_all": found})
    return out


def curves(rows: Rows, axis: str = "flops", metric: str = "psnr", oracles: bool = True) -> dict[str, list[Point]]:
    """Return the sweep of each method: measured speed along `axis` ("flops" or "wall") and quality of each sample.

    Leave out settings with samples identical to the full run: their recorded PSNR is an upper limit, so interpolation
    towards it would be wrong. Speeds in time include bootstrap draws over rounds of timing.
    """
    settings, found = measured(rows), dict[str, list[Point]]()
    times = {(r["method"], r["value"]): r["wall_all"] for r in settings if r["wall_all"] and r["method"] != "none"}
    others = redrawn(times) if axis == "wall" else {}
    for row in settings:
        exact = row.get("psnr") and statistics.median(row["psnr"]) >= IDENTICAL
        if exact or row["method"] == "none" or not row.get(metric) or (row["family"] == "oracle" and not oracles):
            continue
        if row[f"{axis}_speedup"] is not None:
            point = Point(row[f"{axis}_speedup"], tuple(row[metric]), others.get((row["method"], row["value"])))
            found.setdefault(row["method"], []).append(point)
    return found


def families(rows: Rows) -> dict[str, str]:
    """Return the family of each method."""
    return {r["method"]: r["family"] for r in rows if r["kind"] == "quality"}


def missing(rows: Rows) -> dict[tuple[str, str], list[Any]]:
    """Return the settings that could not run, by method and reason."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        if row["kind"] == "quality" and "reason" in row:
            found.setdefault((row["method"], row["reason"]), []).append(row["value"])
    return found
