"""Curves that can be read: our method in front, each family in a colour of its own, names at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .pareto import SPEEDS, Point, front
from .report import OURS, curves, families, missing_table

Rows = Sequence[dict[str, Any]]

COLOURS = {
    "speca": "#c2410c", "steps": "#2563eb", "forecast": "#0f766e", "schedule": "#7c3aed", "rival": "#57534e",
    "oracle": "#a8a29e",
}  # fmt: skip
TITLES = {
    "steps": "Fewer steps, better solvers",
    "forecast": "Fixed intervals",
    "speca": "SpeCa as published and as released",
    "schedule": "Fixed schedules",
    "rival": "Caches of diffusers and cache-dit",
    "oracle": "Oracles: what could be gained at most",
}
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
MARKS = "osD^vPX*<>"
FAST = 10.0  # times; faster settings are not drawn


def plot(rows: Rows, place: Path, name: str, axis: str = "flops") -> None:
    """`name`.svg and .png in `place`: one panel a family against `speca`, median as lines, 5th percentile below."""
    from matplotlib.figure import Figure

    found, family = curves(rows, axis), families(rows)
    kinds = [kind for kind in TITLES if any(family[method] == kind and method != OURS for method in found)]
    figure = Figure(figsize=(4.1 * max(1, (len(kinds) + 1) // 2), 8.4), layout="constrained")
    panels = figure.subplots(2, max(1, (len(kinds) + 1) // 2), sharex=True, sharey=True, squeeze=False).flatten()
    for panel, kind in zip(panels, kinds, strict=False):
        others = {method: points for method, points in found.items() if family[method] == kind and method != OURS}
        _panel(panel, kind, others, found.get(OURS, []))
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    heights = [_q(p, 0.5) for points in found.values() for p in points if p.speed <= FAST]
    if heights:
        panels[0].set_ylim(max(8.0, min(heights) - 2), min(62.0, max(heights) + 3))
    words = "FLOPs" if axis == "flops" else "time"
    about = rows[0]
    count = len(about["seeds"])
    figure.suptitle(
        f"{about['model']}: what is left at what cost    "
        f"({count} samples, {about['suite']['steps']} steps; lines: median, thin: 5th percentile)",
        fontsize=12, ha="left", x=0.012,
    )  # fmt: skip
    figure.supxlabel(f"times less {words} in the transformer", fontsize=10)
    figure.supylabel("PSNR to the own full run, dB", fontsize=10)
    absent = [line.split("|")[1].strip() for line in missing_table(rows)[2:]]
    if absent:
        figure.text(
            0.99, 0.004, f"could not run: {', '.join(dict.fromkeys(absent))}", ha="right", fontsize=7.5, color="#78716c"
        )
    for kind in ("svg", "png"):
        figure.savefig(place / f"{name}.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else None)


def _panel(panel: Any, kind: str, others: dict[str, list[Point]], ours: Sequence[Point]) -> None:
    panel.set_title(TITLES[kind], fontsize=10, loc="left", color="#1c1917")
    labels: list[tuple[float, float, str, Any]] = []
    for index, (name, points) in enumerate(others.items()):
        colour = _shade(COLOURS[kind] if kind != "speca" else "#92400e", index, len(others))
        best = [p for p in front(points) if p.speed <= FAST]
        if best:
            _curve(panel, best, colour, 1.5, DASHES[index % 4], MARKS[index % len(MARKS)])
            labels.append((_q(best[-1], 0.5), best[-1].speed, name, colour))
    best = [p for p in front(ours) if p.speed <= FAST]
    if best:
        _curve(panel, best, COLOURS["speca"], 2.8, "-", "o")
        labels.append((_q(best[-1], 0.5), best[-1].speed, OURS, COLOURS["speca"]))
    _label(panel, labels)
    panel.set_xscale("log")
    panel.set_xlim(1.5, 16)
    ticks = [s for s in (2.0, *SPEEDS, 10.0) if s <= FAST]
    panel.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    panel.set_xticks([], minor=True)
    panel.tick_params(labelsize=8, length=0, labelbottom=True, labelleft=True)
    panel.grid(alpha=0.18)
    panel.spines[["top", "right", "left", "bottom"]].set_visible(False)


def _curve(panel: Any, points: Sequence[Point], colour: Any, width: float, dash: Any, mark: str) -> None:
    speeds = [p.speed for p in points]
    panel.plot(speeds, [_q(p, 0.5) for p in points], color=colour, lw=width, ls=dash, marker=mark, ms=width + 2.2)
    panel.plot(speeds, [_q(p, 0.05) for p in points], color=colour, lw=0.7 * width / 1.5, ls=dash, alpha=0.45)


def _label(panel: Any, labels: Sequence[tuple[float, float, str, Any]]) -> None:
    """Names at the right edge, moved apart where they would touch, with a hair line to the end of their curve."""
    ordered = sorted(labels, key=lambda label: label[0])
    gap, below = 2.1, -1e9
    for height, speed, name, colour in ordered:
        at = max(height, below + gap)
        below = at
        panel.annotate(
            name, (speed, height), (10.6, at), fontsize=7.5, color=colour, va="center", annotation_clip=False,
            weight="bold" if name == OURS else "normal",
            arrowprops=dict(arrowstyle="-", color=colour, lw=0.4, alpha=0.6, shrinkA=0, shrinkB=2),
        )  # fmt: skip


def _shade(colour: str, index: int, count: int) -> tuple[float, float, float]:
    """One of `count` shades of a colour, from itself towards a light one."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    share = 0.55 * index / max(1, count - 1)
    return (red + (1 - red) * share, green + (1 - green) * share, blue + (1 - blue) * share)


def _q(point: Point, q: float) -> float:
    return float(torch.tensor(point.values, dtype=torch.float64).quantile(q))
