"""Write docs/benchmarks.md and its plots from the committed raw results.

    python recipes/benchmarks.py        # or `make bench`

It reads docs/results/bench/<model>.jsonl, as `speca bench` wrote them, and measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from speca.bench.benchmarks import document
from speca.bench.plots import plot, summary
from speca.bench.suites import read


def main(
    results: Annotated[Path, typer.Option(help="Folder with one JSON lines file a model.")] = Path(
        "docs/results/bench"
    ),
    out: Annotated[Path, typer.Option(help="The document to write.")] = Path("docs/benchmarks.md"),
    pictures: Annotated[Path, typer.Option(help="Folder of the plots.")] = Path("docs/img"),
) -> None:
    """Read, write, and say what was written."""
    found: dict[str, list[dict[str, Any]]] = {file.stem: read(file) for file in sorted(results.glob("*.jsonl"))}
    pictures.mkdir(parents=True, exist_ok=True)
    for model, rows in found.items():
        summary(rows, pictures, f"bench-{model}")
        plot(rows, pictures, f"bench-{model}-curves")
    gpu = results / "gpu.json"
    text = document(found, gpu.read_text(encoding="utf-8") if gpu.is_file() else "")
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {', '.join(found) or 'no results yet'}")


if __name__ == "__main__":
    typer.run(main)
