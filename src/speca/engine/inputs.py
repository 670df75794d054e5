"""Requests as they are written in a file: JSON lines, CSV, or Parquet."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, InputError

TEXTS = ("prompt", "negative_prompt", "label")
"""Columns of a CSV file that are texts, even if they look like numbers."""
CONDITIONS = ("prompt", "label", "class_labels")
"""A table needs one of these columns."""


def read_requests(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line or row, counted from 0, and what it asks for: a text, or arguments by name.

    The ending says what the file is: `.csv` and `.parquet` are tables with a column `prompt` (or `label` or
    `class_labels`), whose other columns are arguments; an empty cell is an argument that is not given. All other files
    are JSON lines.

    Raises:
        InputError: the file cannot be read, or a line or its columns are wrong.
        ConfigError: Parquet without pyarrow.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".csv":
            yield from _csv(path)
        else:
            yield from _json(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); name a file of JSON lines, CSV or Parquet."
        ) from error


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not text.strip():
            continue
        try:
            given = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}, line {number + 1} is not valid JSON ({error}).") from error
        if not isinstance(given, (str, dict)):
            raise InputError(f"{path}, line {number + 1} is neither a text nor an object of arguments.")
        yield number, given


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _demand_condition(path, list(reader.fieldnames or ()))
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                raise InputError(f"{path}, row {number + 1} has more or fewer cells than the first line has names.")
            yield number, {name: _cell(name, text) for name, text in row.items() if text.strip()}


def _cell(name: str, text: str) -> Any:
    """The value of a cell: a number, a truth value or a list where it is written as in JSON, else the text."""
    try:
        return text if name in TEXTS else json.loads(text)
    except ValueError:
        return text


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ConfigError(f"reading {path} needs pyarrow: pip install 'speca-diffusers[cluster]'.") from error
    try:
        table = parquet.read_table(path)
    except ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file ({error}).") from error
    _demand_condition(path, table.column_names)
    for number, row in enumerate(table.to_pylist()):
        yield number, {name: value for name, value in row.items() if not _absent(value)}


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN: what pandas writes for nothing


def _demand_condition(path: Path, columns: list[str]) -> None:
    if not set(columns) & set(CONDITIONS):
        raise InputError(
            f"{path} has the columns {', '.join(columns) or 'none'}; it needs one named prompt (or label)."
        )
