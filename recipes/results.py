"""Write the table of the README from the raw results of `ablation.py`.

python recipes/ablation.py fashion-dit --samples 32 --threads 1    # and emoji-flux, emoji-video
python recipes/results.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from speca.config import PRESETS

MODELS = ("fashion-dit", "emoji-flux", "emoji-video")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def cell(row: dict[str, Any]) -> str:
    """Full steps, FLOPs and PSNR of one preset."""
    spent = row["full_steps"]
    return f"{sum(spent) / len(spent):.3g}, {row['flops_speedup']:.2f}x less, {row['median']:.1f} / {row['p5']:.1f}"


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table in Markdown, from the rows of each model by name."""
    head = ["| preset | " + " | ".join(f"`{model}`" for model in found) + " |", "| --- " * (1 + len(found)) + "|"]
    body = [f"| `{p}` | " + " | ".join(cell(rows[p]) for rows in found.values()) + " |" for p in PRESETS]
    return "\n".join(head + body)


def main(
    raw: Annotated[Path, typer.Option(help="Folder of the raw results.", exists=True)] = Path("docs/results"),
    readme: Annotated[Path, typer.Option(help="File whose region is replaced.", exists=True)] = Path("README.md"),
) -> None:
    """Read and write."""
    found = {}
    for model in MODELS:
        rows = json.loads((raw / f"ablation-{model}.json").read_text())["rows"]
        found[model] = {row["name"]: row for row in rows}
    region = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    readme.write_text(region.sub(f"{BEGIN}\n{table(found)}\n{END}", readme.read_text()))


if __name__ == "__main__":
    typer.run(main)
