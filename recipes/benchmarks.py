"""Write docs/benchmarks.md, a page for each model beside it, and their plots, from the committed raw results.

    python recipes/benchmarks.py        # or `make bench`

It reads docs/results/bench/<model>.jsonl, as `speca bench` wrote them, and measures nothing. The pages of the models
are in docs/benchmarks/.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from speca.bench.benchmarks import model_page, overview
from speca.bench.gpu import gpu_page
from speca.bench.plots import plot, summary
from speca.bench.suites import read


def main(
    results: Annotated[Path, typer.Option(help="Folder with one JSON lines file a model.")] = Path(
        "docs/results/bench"
    ),
    out: Annotated[Path, typer.Option(help="The first page; those of the models are in a folder of its name.")] = Path(
        "docs/benchmarks.md"
    ),
    pictures: Annotated[Path, typer.Option(help="Folder of the plots.")] = Path("docs/img"),
) -> None:
    """Read, write, and say what was written."""
    found: dict[str, list[dict[str, Any]]] = {file.stem: read(file) for file in sorted(results.glob("*.jsonl"))}
    pages = out.with_suffix("")
    back = f"../{out.name}"
    for folder in (pictures, pages):
        folder.mkdir(parents=True, exist_ok=True)
    for model, rows in found.items():
        summary(rows, pictures, f"bench-{model}")
        plot(rows, pictures, f"bench-{model}-curves")
        words = model_page(model, rows, back, Path(os.path.relpath(pictures, pages)).as_posix())
        (pages / f"{model}.md").write_text(words, encoding="utf-8")
    gpu = results / "gpu.json"
    if gpu.is_file():
        (pages / "gpu.md").write_text(gpu_page(json.loads(gpu.read_text(encoding="utf-8")), back), encoding="utf-8")
    words = overview(found, gpu.is_file(), pages.name, Path(os.path.relpath(pictures, out.parent)).as_posix())
    out.write_text(words, encoding="utf-8")
    print(f"{out} and {pages}: {', '.join(found) or 'no results yet'}")


if __name__ == "__main__":
    typer.run(main)
