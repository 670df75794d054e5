"""From rows to a Markdown report, a plot of every method's curve, and one static page."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .pareto import SPEEDS, Point, at_speed, median_interval, paired_difference

Rows = Sequence[dict[str, Any]]
OURS = "speca"
AXES = {"flops": "FLOPs", "wall": "transformer seconds"}


def measured(rows: Rows) -> list[dict[str, Any]]:
    """The settings that ran, each with `wall_speedup` where it was timed: median over rounds, each to its own full."""
    times = {(r["method"], r["value"], r["round"]): r["seconds"] for r in rows if r["kind"] == "time"}
    out = []
    for row in rows:
        if row["kind"] != "quality" or "reason" in row:
            continue
        ratios = [
            times["none", 0, number] / seconds
            for (method, value, number), seconds in times.items()
            if (method, value) == (row["method"], row["value"]) and ("none", 0, number) in times
        ]
        out.append({**row, "wall_speedup": statistics.median(ratios) if ratios else None})
    return out


def curves(rows: Rows, axis: str = "flops", metric: str = "psnr") -> dict[str, list[Point]]:
    """The sweep of each method: realised speed along `axis` ("flops" or "wall") and quality of each sample."""
    found: dict[str, list[Point]] = {}
    for row in measured(rows):
        if row[f"{axis}_speedup"] is not None and row["method"] != "none" and row[metric]:
            found.setdefault(row["method"], []).append(Point(row[f"{axis}_speedup"], tuple(row[metric])))
    return found


def table(rows: Rows, speed: float, axis: str) -> list[str]:
    """Markdown: every method at one speed, best median first; the difference is paired with `speca`."""
    found = curves(rows, axis)
    ours = at_speed(found.get(OURS, []), speed)
    lines = []
    for name, points in found.items():
        values = at_speed(points, speed)
        if values is None:
            continue
        median, low, high = median_interval(values)
        p5, worst = values.quantile(0.05).item(), values.min().item()
        versus = "-"
        if ours is not None and name != OURS:
            mean, least, most = paired_difference(values, ours)
            versus = f"{mean:+.2f} [{least:+.2f}, {most:+.2f}]"
        line = f"| {name} | {median:.2f} [{low:.2f}, {high:.2f}] | {p5:.2f} | {worst:.2f} | {versus} |"
        lines.append((median, line))
    head = [
        "| method | PSNR dB, median [95 %] | P5 | worst | mean minus speca [95 %] |",
        "| --- | --- | --- | --- | --- |",
    ]
    body = [line for _, line in sorted(lines, reverse=True)]
    return [*head, *body] if body else [f"No method's sweep spans {speed:g}x on this axis."]


def markdown(rows: Rows) -> str:
    """The report; its plot is expected beside it."""
    about, reasons = rows[0], [r for r in rows if "reason" in r]
    hardware = ", ".join(f"{k} {v}" for k, v in about["hardware"].items())
    tuning = about["tuning_seeds"]
    lines = [
        f"# Bench: {about['model']}",
        "",
        f"{len(about['seeds'])} samples, seeds {about['seeds'][0]} to {about['seeds'][-1]}, {about['suite']['steps']} "
        f"steps. Each is compared with the full run of its own seed. Schedules were searched on seeds {tuning[0]} to "
        f"{tuning[-1]}. A method's value at a speed lies between two neighbours of its own sweep, never beyond.",
        "",
        f"Hardware: {hardware}. Versions: {', '.join(f'{k} {v}' for k, v in about['versions'].items())}.",
        "",
        "![Quality against speed](curves.svg)",
    ]
    for axis, words in AXES.items():
        if any(r.get(f"{axis}_speedup") for r in measured(rows)):
            for speed in SPEEDS:
                lines += ["", f"## {speed:g}x fewer {words}", "", *table(rows, speed, axis)]
    lines += ["", "## Every setting", "", *settings_table(rows)]
    if reasons:
        lines += ["", "## What could not run", "", "| method | settings | why |", "| --- | --- | --- |"]
        settings: dict[tuple[str, str], list[str]] = {}
        for row in reasons:
            settings.setdefault((row["method"], row["reason"].replace("|", "/")), []).append(str(row["value"]))
        lines += [f"| {method} | {', '.join(values)} | {why} |" for (method, why), values in settings.items()]
    return "\n".join(lines) + "\n"


def settings_table(rows: Rows) -> list[str]:
    """Markdown: realised cost and quality of each setting."""
    lines = [
        "| method | setting | FLOPs | seconds | full steps, from to | PSNR median | P5 | worst | SSIM | rel. L2 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in measured(rows):
        values = torch.tensor(row["psnr"], dtype=torch.float64)
        wall = f"{row['wall_speedup']:.2f}x" if row["wall_speedup"] else "-"
        similar = f"{statistics.median(row['ssim']):.4f}" if row["ssim"] else "-"
        low, high = min(row["full_steps"]), max(row["full_steps"])
        lines.append(
            f"| {row['method']} | {row['knob']} {row['value']} | {row['flops_speedup']:.2f}x | {wall} | {low:.3g} to "
            f"{high:.3g} | {values.quantile(0.5):.2f} | {values.quantile(0.05):.2f} | {values.min():.2f} | {similar} | "
            f"{statistics.median(row['relative_l2']):.4f} |"
        )
    return lines


def plot(rows: Rows, place: Path) -> None:
    """`curves.svg` and `curves.png`: median and 5th percentile of PSNR against FLOPs speed-up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (title, q) in zip(axes, {"median sample": 0.5, "5th percentile": 0.05}.items(), strict=True):
        for index, (name, points) in enumerate(curves(rows).items()):
            ordered = sorted(points, key=lambda point: point.speed)
            heights = [torch.tensor(point.values, dtype=torch.float64).quantile(q).item() for point in ordered]
            style = dict(color="#d8573c", lw=2.6, zorder=5) if name == OURS else dict(color=f"C{index % 10}", lw=1.1)
            mark = "osv^D"[index // 10 + index % 2]
            panel.plot([p.speed for p in ordered], heights, marker=mark, ms=3.5, label=name, **style)
        panel.set(xscale="log", xlabel="times fewer FLOPs in the transformer", title=title)
        panel.set_xticks(SPEEDS, [f"{speed:g}x" for speed in SPEEDS], minor=False)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("PSNR to the own full run, dB")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(f"{rows[0]['model']}: what is left at what cost")
    for kind in ("svg", "png"):
        figure.savefig(place / f"curves.{kind}", dpi=150)


def write(rows: Rows, place: Path) -> None:
    """`report.md`, `curves.svg`, `curves.png` and `index.html`, which needs no other file, into `place`."""
    plot(rows, place)
    words = markdown(rows)
    (place / "report.md").write_text(words, encoding="utf-8")
    picture = base64.b64encode((place / "curves.svg").read_bytes()).decode()
    (place / "index.html").write_text(page(words, picture), encoding="utf-8")


def page(words: str, picture: str) -> str:
    """The Markdown of `markdown` as HTML: headings, tables, paragraphs, and the picture within it."""
    body, in_table = [], False
    for line in words.splitlines():
        cells = [html.escape(cell.strip()) for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if in_table and not cells:
            body.append("</table>")
        if cells and not line.startswith("| ---"):
            tag = "td" if in_table else "th"
            body.append(("" if in_table else "<table>") + "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells))
        in_table = bool(cells)
        if line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            body.append(f"<h{level}>{html.escape(line.lstrip('# '))}</h{level}>")
        elif line.startswith("!["):
            body.append(f'<img src="data:image/svg+xml;base64,{picture}" alt="Quality against speed">')
        elif line and not cells:
            body.append(f"<p>{html.escape(line)}</p>")
    style = (
        "body{font:15px/1.5 system-ui;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#18181b}img{width:100%}"
        "table{border-collapse:collapse;font-size:13px}th,td{padding:.25rem .7rem;text-align:left;"
        "border-bottom:1px solid #e4e4e7}"
    )
    close = "</table>" if in_table else ""
    return f'<!doctype html><meta charset="utf-8"><title>speca bench</title><style>{style}</style>' + "\n".join(
        [*body, close]
    )
