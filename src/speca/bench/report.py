"""Write the report of one results file as Markdown and HTML, with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .page import page
from .pareto import SPEEDS
from .plots import plot, summary
from .results import Rows, measured
from .tables import (
    adapting,
    batch_table,
    guarantee_table,
    missing_table,
    score_table,
    settings_table,
    signal_table,
    table,
)

AXES = {"flops": "FLOPs", "wall": "transformer seconds"}


def about(row: dict[str, Any]) -> list[str]:
    """Return paragraphs about the model, the suite, the hardware and the versions."""
    tuning, seeds, plan = row["tuning_seeds"], row["seeds"], row["suite"]
    machine = ", ".join(f"{k} {v}" for k, v in row["hardware"].items())
    return [
        f"`{row['pipeline']}` with {row['transformer']} ({row['blocks']} blocks, {row['parameters'] / 1e6:.1f} M "
        f"parameters) and {row['scheduler']}, {plan['steps']} steps, {len(seeds)} samples (seeds {seeds[0]} to "
        f"{seeds[-1]}). Each is compared with the full run of its own seed. Schedules were searched, and rivals "
        f"calibrated, on seeds from {tuning[0]}. A method's value at a speed lies between two neighbours of the best "
        "settings of its own sweep, never beyond. Names in italics are oracles: they know the full run, and no method "
        "can. A star marks a difference whose 95 % interval leaves out zero; intervals are over samples "
        "and, where speed is time, over rounds of timing."
        + (" Seconds are processor seconds." if row["hardware"].get("device") == "cpu" else ""),
        f"Hardware: {machine}. Versions: {', '.join(f'{k} {v}' for k, v in row['versions'].items())}.",
    ]


def markdown(rows: Rows) -> str:
    """Return the report in Markdown; it links plots in the same folder."""
    lines = [f"# Bench: {rows[0]['model']}", ""]
    for paragraph in about(rows[0]):
        lines += [paragraph, ""]
    lines += ["![Typical and worst at the same cost](summary.svg)", "", "![Quality against speed](curves.svg)"]
    for axis, words in AXES.items():
        if any(r.get(f"{axis}_speedup") for r in measured(rows)):
            for speed in SPEEDS:
                lines += ["", f"## {speed:g}x fewer {words}", "", *table(rows, speed, axis)]
    parts = {
        "How fast for a guarantee": [*guarantee_table(rows), "", *adapting(rows)],
        "How good is the check?": signal_table(rows),
        "Agreement and distances": [*score_table(rows), *_notes(rows)],
        "Batches": batch_table(rows),
        "Every setting": settings_table(rows),
        "What could not run": missing_table(rows),
    }
    for title, part in parts.items():
        if part:
            lines += ["", f"## {title}", "", *part]
    return "\n".join(lines) + "\n"


def _notes(rows: Rows) -> list[str]:
    notes: list[str] = next((r.get("notes", []) for r in rows if r["kind"] == "full"), [])
    return ["", *(f"{note[0].upper()}{note[1:]}" for note in notes)] if notes else []


def write(rows: Rows, place: Path) -> None:
    """Write `report.md`, the plots as SVG and PNG, and `index.html` without external files to the folder `place`."""
    plot(rows, place, "curves")
    summary(rows, place, "summary")
    words = markdown(rows)
    (place / "report.md").write_text(words, encoding="utf-8")
    (place / "index.html").write_text(
        page(words, {name: place / name for name in ("summary.svg", "curves.svg")}), encoding="utf-8"
    )
