"""The rows of a results file: settings that ran, the curve of each method, and what could not run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .measure import IDENTICAL
from .pareto import Point, redrawn

Rows = Sequence[dict[str, Any]]
OURS = "speca"


def measured(rows: Rows, batch: int | None = None) -> list[dict[str, Any]]:
    """The settings that ran, with `wall_speedup` where they were timed: the median over rounds, in calls of `batch`.

    Without `batch`, of the first size that was timed. Each time is set against the full run that was timed beside it.
    On a CPU it is processor time, which does not change with what else the machine does.
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
    """The sweep of each method: realised speed along `axis` ("flops" or "wall") and quality of each sample.

    Settings that drew what the full run draws are left out: their PSNR is a cap, and what is read off on the way to a
    cap is made up. Speeds in time carry what other rounds of timing might have given.
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
    """The family of each method."""
    return {r["method"]: r["family"] for r in rows if r["kind"] == "quality"}


def missing(rows: Rows) -> dict[tuple[str, str], list[Any]]:
    """The settings that could not run, by method and reason."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        if row["kind"] == "quality" and "reason" in row:
            found.setdefault((row["method"], row["reason"]), []).append(row["value"])
    return found
