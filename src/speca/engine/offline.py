"""Requests from a file, run by an engine, with their pictures in a folder. A run that was killed is taken up again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .engine import Engine
from .future import Result
from .inputs import read_requests

MANIFEST = "manifest.jsonl"
PARTS = "parts"
"""The folder in which workers of a run over several processes write what they finish, a file each shard."""
Labels = Callable[[Sequence[str]], Sequence[int]]


@dataclass(frozen=True)
class Line:
    """One line of the file: its number, counted from 0, the request, and a mark that changes when either does."""

    number: int
    asked: dict[str, Any]
    mark: str


def read_lines(path: Path, common: dict[str, Any], seed: int, labels: Labels) -> list[Line]:
    """The requests of a file: JSON lines, CSV or Parquet (`read_requests`).

    A line is a text, which is a prompt, or an object of arguments of the pipeline and of the engine. Two words are for
    convenience: `seed` for `generator_seed`, and `label` for `class_labels` by name. `common` holds what lines do not
    say; a line without a seed gets `seed` plus its number, so that a second run asks for the same.

    Raises:
        InputError: no such file, or a line that is neither.
        ConfigError: Parquet without pyarrow.
    """
    lines = []
    for number, given in read_requests(path):
        asked = {**common, **(dict(prompt=given) if isinstance(given, str) else given)}
        asked["generator_seed"] = asked.pop("seed", asked.get("generator_seed", seed + number))
        if "label" in asked:
            asked["class_labels"] = list(labels([str(asked.pop("label"))]))
        try:
            text = json.dumps([number, asked], sort_keys=True)
        except TypeError as error:
            raise InputError(f"{path}, row {number + 1} holds what a manifest cannot hold ({error}).") from error
        mark = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        lines.append(Line(number, asked, mark))
    if not lines:
        raise InputError(f'{path} is empty; give one request a line, for example {{"prompt": "a red boat"}}.')
    return lines


@dataclass
class Folder:
    """Pictures and the manifest of a run. A line of the manifest is written after its pictures, and both whole."""

    place: Path
    entries: dict[int, dict[str, Any]] = field(default_factory=dict)
    manifest: str = MANIFEST

    @classmethod
    def open(cls, place: Path, manifest: str = MANIFEST) -> Folder:
        """Return the folder, made if need be, and read what an earlier run has finished in it.

        `manifest` is the file, under `place`, that is read and written. What workers of a run over several processes
        have finished and that run did not get to copy is moved to the manifest.

        Raises:
            InputError: it cannot be made or written to.
        """
        path = place / manifest
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            found = cls(place, {e["line"]: e for e in entries_of(path.read_bytes())}, manifest)
            for part in sorted((place / PARTS).glob("*.jsonl")) if manifest == MANIFEST else ():
                found.add(entries_of(part.read_bytes()))
                part.unlink()  # or it would count again after a later run has replaced its lines
        except OSError as error:
            raise InputError(f"--out {place} cannot be written ({error.strerror}); name another folder.") from error
        return found

    def add(self, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Append entries to the manifest, but those that it has; return the ones that are new."""
        new = [entry for entry in entries if self.entries.get(entry["line"]) != entry]
        if new:
            self.entries.update({entry["line"]: entry for entry in new})
            self._append(new)
        return new

    def has(self, line: Line) -> bool:
        """Whether this very request is done and its pictures are there."""
        entry = self.entries.get(line.number, {})
        pictures = [self.place / name for name in entry.get("images", [])]
        return bool(pictures) and entry.get("mark") == line.mark and all(p.is_file() for p in pictures)

    def keep(self, line: Line, result: Result) -> None:
        """Write the pictures of a request, and then its line."""
        entry: dict[str, Any] = {"line": line.number, "mark": line.mark, "request": line.asked}
        if result.error is not None:
            entry["error"] = f"{type(result.error).__name__}: {result.error}"
        else:
            samples = torch.as_tensor(np.asarray(result.output[0]), dtype=torch.float32)
            several = len(samples) > 1
            entry["images"] = [self._write(s, line.number, i if several else None) for i, s in enumerate(samples)]
            entry |= {"seconds": round(result.seconds, 4), "waited": round(result.waited, 4)}
        if result.report is not None:
            reported = result.report.to_dict()
            names = ("steps", "samples", "flops_speedup", "bytes_per_sample", "notes")
            entry["report"] = {name: reported[name] for name in names}
        self.entries[line.number] = entry
        self._append([entry])

    def _write(self, sample: torch.Tensor, number: int, index: int | None) -> str:
        from ..reports.pictures import save_png, save_webp

        video = sample.ndim == 4
        stem = f"{number:06d}" + ("" if index is None else f"-{index}")
        name, save = f"{stem}.{'webp' if video else 'png'}", save_webp if video else save_png
        part = self.place / f".{name}"  # the same ending, which says how to write it
        save(sample, part)
        os.replace(part, self.place / name)
        return name

    def _append(self, entries: Sequence[dict[str, Any]]) -> None:
        path = self.place / self.manifest
        with path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:  # a run that was killed may have left half a line
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
            file.flush()
            os.fsync(file.fileno())


def entries_of(text: bytes) -> list[dict[str, Any]]:
    """The entries of a manifest, without lines that a kill has left half written."""
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "line" in entry:
            found.append(entry)
    return found


def run(engine: Engine, lines: Sequence[Line], folder: Folder) -> Iterator[Result]:
    """Run the lines whose pictures are not in `folder`, and yield each result once it is written."""
    todo = [line for line in lines if not folder.has(line)]
    for result in engine.generate({**line.asked, "output_type": "np"} for line in todo):
        folder.keep(todo[result.index], result)
        yield result
