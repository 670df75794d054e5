"""More rounds of timing for a bench: those of another run of the same suite are added.

    speca bench fashion-dit --suite full --out again
    python recipes/bench_rounds.py docs/results/bench/fashion-dit.jsonl again/results.jsonl

One round differs from the next by several per cent on a shared machine, and tables take medians over rounds. Times are
added only if settings gave the same PSNR for every sample in both runs, but for rounding, on the same hardware with
the same versions; anything else is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

ROUNDING = 0.01  # dB: sums in another order
SAME = ("model", "suite", "seeds", "tuning_seeds", "hardware", "versions")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(
    first: Annotated[Path, typer.Argument(help="Results that get more rounds.", exists=True)],
    second: Annotated[Path, typer.Argument(help="Results of the other run.", exists=True)],
) -> None:
    """Add the times of the second file to the first."""
    known, more = read(first), read(second)
    for name in SAME:
        if known[0][name] != more[0][name]:
            raise typer.BadParameter(f"{name} differs: {known[0][name]} and {more[0][name]}.")
    quality = {_setting(row): row.get("psnr") for row in known if row["kind"] == "quality"}
    for row in more:
        if row["kind"] != "quality" or not row.get("psnr") or not quality.get(_setting(row)):
            continue
        apart = max(abs(a - b) for a, b in zip(quality[_setting(row)], row["psnr"], strict=True))
        if apart > ROUNDING:
            raise typer.BadParameter(f"{row['method']} {row['value']} is off by {apart:.3f} dB in the second run.")
    rounds = Counter((*_setting(row), row["batch"]) for row in known if row["kind"] == "time")
    added = []
    for row in more:
        if row["kind"] == "time" and _setting(row) in quality:
            place = (*_setting(row), row["batch"])
            added.append({**row, "round": rounds[place]})
            rounds[place] += 1
    with first.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in added)
    print(f"{first}: {len(added)} times added; a setting has up to {max(rounds.values())} rounds of a batch size")


def _setting(row: dict[str, Any]) -> tuple[str, str]:
    return row["method"], json.dumps(row["value"])


if __name__ == "__main__":
    typer.run(main)
