"""Plots of quality against speed, one colour per family, with `speca` in front and names at the ends of the lines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .pareto import SPEEDS, Point, at_speed, front
from .results import OURS, Rows, curves, families, missing

COLOURS = {
    "speca": "#c2410c", "steps": "#2563eb", "forecast": "#0f766e", "schedule": "#7c3aed", "rival": "#57534e",
    "oracle": "#a8a29e", "old": "#a16207",
}  # fmt: skip
TITLES = {
    "steps": "Fewer steps, better solvers",
    "forecast": "Fixed intervals",
    "speca": "SpeCa, other rules and settings",
    "schedule": "Fixed schedules",
    "rival": "Caches of diffusers and cache-dit",
    "oracle": "Oracles: placed by what no method knows",
}
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
MARKS = "osD^vPX*<>"
FAST = 10.0  # times; faster settings are not drawn


def plot(rows: Rows, place: Path, name: str, axis: str = "flops") -> None:
    """Write `name`.svg and .png to `place`: one panel per family with `speca`, medians as lines, shaded to P5."""
    from matplotlib.figure import Figure

    found, family = curves(rows, axis), families(rows)
    kinds = [kind for kind in TITLES if any(family[method] == kind and method != OURS for method in found)]
    figure = Figure(figsize=(4.1 * max(1, (len(kinds) + 1) // 2), 8.4), layout="constrained")
    panels = figure.subplots(2, max(1, (len(kinds) + 1) // 2), sharex=True, sharey=True, squeeze=False).flatten()
    heights = [_q(p, 0.5) for points in found.values() for p in points if p.speed <= FAST] or [0.0, 60.0]
    panels[0].set_ylim(max(8.0, min(heights) - 2), min(62.0, max(heights) + 3))
    for panel, kind in zip(panels, kinds, strict=False):
        others = {method: points for method, points in found.items() if family[method] == kind and method != OURS}
        _panel(panel, kind, others, found.get(OURS, []))
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    words = "FLOPs" if axis == "flops" else "time"
    about = rows[0]
    count = len(about["seeds"])
    figure.suptitle(
        f"{about['model']}: what is left at what cost    "
        f"({count} samples, {about['suite']['steps']} steps; medians; shaded: down to the 5th percentile of speca)",
        fontsize=12, ha="left", x=0.012,
    )  # fmt: skip
    figure.supxlabel(f"times less {words} in the transformer", fontsize=10)
    figure.supylabel("PSNR to the own full run, dB", fontsize=10)
    absent = dict.fromkeys(method for method, _ in missing(rows) if method not in found)
    if absent:
        words = f"could not run: {', '.join(absent)}"
        figure.text(0.99, 0.004, words, ha="right", fontsize=7.5, color="#78716c")
    _save(figure, place, name)


def summary(rows: Rows, place: Path, name: str, axis: str = "flops") -> None:
    """Write `name`.svg and .png to `place`: P5 to median of each method at 3x, 5x and 7x."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    found, family = curves(rows, axis), families(rows)
    values = {m: {s: at_speed(points, s) for s in SPEEDS if s > 2} for m, points in found.items()}
    values = {m: v for m, v in values.items() if m != "presets" and any(x is not None for x in v.values())}
    order = sorted(values, key=lambda m: statistics.fmean(_rank(values, m, s) for s in SPEEDS if s > 2))
    figure = Figure(figsize=(12, 1.6 + 0.25 * len(order)), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for panel, speed in zip(panels, (s for s in SPEEDS if s > 2), strict=True):
        for height, method in enumerate(reversed(order)):
            x, colour = values[method][speed], COLOURS["speca" if method == OURS else _tint(family[method])]
            if method == OURS:
                panel.axhspan(height - 0.5, height + 0.5, color=COLOURS["speca"], alpha=0.08, lw=0)
            if x is None:
                continue
            low, middle = float(x.quantile(0.05)), float(x.quantile(0.5))
            panel.plot([low, middle], [height] * 2, color=colour, lw=2.2, alpha=0.55, solid_capstyle="round")
            panel.plot(float(x.min()), height, marker="|", ms=7, color=colour, alpha=0.7)
            panel.plot(middle, height, marker="o", ms=6 if method == OURS else 5, color=colour)
        panel.set_title(
            f"{speed:g}x fewer FLOPs" if axis == "flops" else f"{speed:g}x less time", fontsize=11, loc="left"
        )
        panel.grid(axis="x", alpha=0.2)
        panel.tick_params(labelsize=8.5, length=0)
        panel.spines[["top", "right", "left", "bottom"]].set_visible(False)
    panels[0].set_yticks(range(len(order)), list(reversed(order)))
    for label in panels[0].get_yticklabels():
        method = label.get_text()
        label.set_color(COLOURS["speca" if method == OURS else _tint(family[method])])
        label.set_weight("bold" if method == OURS else "normal")
    panels[1].set_xlabel("PSNR to the own full run, dB: dot median, bar to the 5th percentile, stroke the worst sample")
    names = {"steps": "steps, solvers", "forecast": "intervals", "old": "SpeCa, other rules", "schedule": "schedules",
             "rival": "rivals", "oracle": "oracles"}  # fmt: skip
    used = {_tint(family[m]) for m in order if m != OURS}
    keys = [Line2D([], [], color=COLOURS[k], marker="o", lw=2, label=n) for k, n in names.items() if k in used]
    figure.legend(handles=keys, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    figure.suptitle(f"{rows[0]['model']}: typical and worst at the same cost", fontsize=12, ha="left", x=0.012)
    _save(figure, place, name)


def _rank(values: dict[str, dict[float, Any]], method: str, speed: float) -> int:
    """Return how many methods are better at a speed; all of them if the method does not reach it."""
    own = values[method][speed]
    if own is None:
        return len(values)
    return sum(v[speed] is not None and bool(v[speed].quantile(0.5) > own.quantile(0.5)) for v in values.values())


def _tint(family: str) -> str:
    return "old" if family == "speca" else family


def _save(figure: Any, place: Path, name: str) -> None:
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": name}):  # the same rows give the same file, so that a diff shows what changed
        figure.savefig(place / f"{name}.svg", metadata={"Date": None})
    figure.savefig(place / f"{name}.png", dpi=150)


def _panel(panel: Any, kind: str, others: dict[str, list[Point]], ours: Sequence[Point]) -> None:
    panel.set_title(TITLES[kind], fontsize=10, loc="left", color="#1c1917")
    labels: list[tuple[float, float, str, Any]] = []
    for index, (name, points) in enumerate(others.items()):
        colour = _shade(COLOURS[_tint(kind)], index, len(others))
        best = [p for p in front(points) if p.speed <= FAST]
        if best:
            panel.plot(
                [p.speed for p in best], [_q(p, 0.5) for p in best], color=colour, lw=1.5, ls=DASHES[index % 4],
                marker=MARKS[index % len(MARKS)], ms=3.7,
            )  # fmt: skip
            labels.append((_q(best[-1], 0.5), best[-1].speed, name, colour))
    best = [p for p in front(ours) if p.speed <= FAST]
    if best:
        speeds, middle = [p.speed for p in best], [_q(p, 0.5) for p in best]
        panel.plot(speeds, middle, color=COLOURS["speca"], lw=2.8, marker="o", ms=5, zorder=4)
        panel.fill_between(
            speeds, [_q(p, 0.05) for p in best], middle, color=COLOURS["speca"], alpha=0.12, lw=0, zorder=0
        )
        labels.append((_q(best[-1], 0.5), best[-1].speed, OURS, COLOURS["speca"]))
    _label(panel, labels)
    panel.set_xscale("log")
    panel.set_xlim(1.1, 17)
    ticks = (1.5, *SPEEDS, FAST)
    panel.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    panel.set_xticks([], minor=True)
    panel.tick_params(labelsize=8, length=0, labelbottom=True, labelleft=True)
    panel.grid(alpha=0.18)
    panel.spines[["top", "right", "left", "bottom"]].set_visible(False)


def _label(panel: Any, labels: Sequence[tuple[float, float, str, Any]]) -> None:
    """Draw names at the right edge without overlap, each with a thin line to the end of its curve."""
    ordered = sorted(labels, key=lambda label: label[0])
    low, high = panel.get_ylim()
    gap = 0.041 * (high - low)
    places = [min(height, high) for height, *_ in ordered]
    for k in range(1, len(places)):  # move up, away from the name below
        places[k] = max(places[k], places[k - 1] + gap)
    excess = max(0.0, places[-1] - high) if places else 0.0
    for k in reversed(range(len(places))):  # move down names that left the panel
        places[k] = min(places[k], high - gap * (len(places) - 1 - k)) if excess else places[k]
    for at, (height, speed, name, colour) in zip(places, ordered, strict=True):
        panel.annotate(
            name, (speed, min(height, high)), (10.6, at), fontsize=7.5, color=colour, va="center",
            annotation_clip=False,
            weight="bold" if name == OURS else "normal",
            arrowprops=dict(arrowstyle="-", color=colour, lw=0.4, alpha=0.6, shrinkA=0, shrinkB=2),
        )  # fmt: skip


def _shade(colour: str, index: int, count: int) -> tuple[float, float, float]:
    """Return one of `count` shades of a colour, from the colour itself towards a light one."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    share = 0.55 * index / max(1, count - 1)
    return (red + (1 - red) * share, green + (1 - green) * share, blue + (1 - blue) * share)


def _q(point: Point, q: float) -> float:
    return float(torch.tensor(point.values, dtype=torch.float64).quantile(q))
