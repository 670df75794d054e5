"""Shards of a run: parts of its lines, done by one worker each, and what keeps two workers from doing the same line.

While a run lasts, `parts/` in its folder holds `run`, which names the run and is locked by its driver, and a file for
each shard that was begun, to which its worker appends what it finishes. The driver copies these lines to the manifest
and removes the files of finished shards. All locks are advisory (`flock`), and end with the process that holds them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..engine import Engine
from ..engine.offline import PARTS, Folder, Line, entries_of, run
from ..errors import InputError, SpecaError

RUN = "run"
PATIENCE = 120.0
"""Seconds to wait for a worker of a run that was killed: it stops at the next line that it finishes."""


class StaleRunError(SpecaError):
    """The run of this worker has ended, or another run has taken its folder."""


@dataclass(frozen=True)
class Shard:
    """Some lines, under a name that other lines do not get."""

    name: str
    lines: tuple[Line, ...]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> Shard:
        """Return the shard of these lines."""
        marks = hashlib.blake2b("".join(line.mark for line in lines).encode(), digest_size=8).hexdigest()
        return cls(f"{lines[0].number:06d}-{marks}", tuple(lines))

    @property
    def part(self) -> str:
        """The file of the shard, under the folder of the run."""
        return f"{PARTS}/{self.name}.jsonl"

    def to_json(self) -> str:
        """Return the shard as text."""
        return json.dumps([[line.number, line.asked, line.mark] for line in self.lines])

    @classmethod
    def from_json(cls, text: str) -> Shard:
        """Return the shard that `to_json` wrote."""
        return cls.of([Line(*fields) for fields in json.loads(text)])


def cut(lines: Sequence[Line], workers: int, max_batch: int) -> list[Shard]:
    """Return the lines in shards: about eight for each worker, each of one to four batches of the engine.

    A shard ends with fewer and fewer rows in a batch, so small ones cost speed; large ones leave workers without work
    at the end of a run.
    """
    size = min(max(len(lines) // (8 * workers), max_batch), 4 * max_batch)
    size = max(1, min(size, -(-len(lines) // workers)))
    return [Shard.of(lines[start : start + size]) for start in range(0, len(lines), size)]


# ------------------------------------------------------------------------------------------------ a worker
def work(engine: Engine, place: Path, run_name: str, shard: Shard) -> int:
    """Do the lines of a shard that nobody has done yet, and return how many these were.

    Raises:
        StaleRunError: the run is not the one that has the folder.
        InputError: the folder cannot be written, or a line asks for what cannot be.
    """
    demand_run(place, run_name)
    made = 0
    with _locked(place / shard.part):
        demand_run(place, run_name)
        for _ in run(engine, shard.lines, Folder.open(place, shard.part)):
            made += 1
            demand_run(place, run_name)
    return made


def demand_run(place: Path, run_name: str) -> None:
    """Raise `StaleRunError` if the folder is not that of this run."""
    try:
        found = (place / PARTS / RUN).read_text()
    except OSError:
        found = ""
    if found != run_name:
        raise StaleRunError(
            f"the worker finds no {PARTS}/{RUN} of its run in {place}; every machine of the cluster has to see --out, "
            "for example on a network drive, and one run at a time may use it."
        )


# ------------------------------------------------------------------------------------------------ the driver
@contextmanager
def claimed(place: Path) -> Iterator[str]:
    """Take the folder for one run, wait until workers of earlier runs have stopped, and yield the run's name.

    Raises:
        InputError: another run has the folder, a worker of an earlier run does not stop, or it cannot be written.
    """
    path = place / PARTS / RUN
    with _written(place):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take(path)
        if file is None:
            raise InputError(f"another run writes to --out {place}; wait for it, or name another folder.")
    with file:
        try:
            with _written(place):
                name = _named(file)
                for part in path.parent.glob("*.jsonl"):  # whose workers see the new name
                    with _locked(part):
                        pass
            yield name
        finally:
            path.unlink(missing_ok=True)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _named(file: IO[str]) -> str:
    """Write a new name to the file and return it."""
    name = uuid.uuid4().hex
    file.truncate(0)
    file.write(name)
    file.flush()
    return name


@contextmanager
def _written(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--out {place} cannot be written ({error}); name another folder.") from error


@dataclass
class Collector:
    """Copies what workers write to the manifest of the run."""

    folder: Folder
    shards: dict[str, Shard]
    _read: dict[str, int] = field(default_factory=dict)

    def collect(self) -> list[dict[str, Any]]:
        """Copy what was written since the last call, and return it."""
        return self.folder.add([entry for shard in self.shards.values() for entry in self._news(shard)])

    def finish(self, name: str) -> list[dict[str, Any]]:
        """Copy the rest of a shard that is done, remove its file, and return what is new."""
        shard = self.shards.pop(name)
        new = self.folder.add(self._news(shard))
        (self.folder.place / shard.part).unlink(missing_ok=True)
        return new

    def _news(self, shard: Shard) -> list[dict[str, Any]]:
        start = self._read.get(shard.name, 0)
        try:
            with (self.folder.place / shard.part).open("rb") as file:
                file.seek(start)
                text = file.read()
        except FileNotFoundError:  # not begun
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read[shard.name] = start + len(whole)
        return entries_of(whole)


# ------------------------------------------------------------------------------------------------ locks
@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, made if need be. Raises `InputError` if another process keeps it for two minutes."""
    until = time.monotonic() + PATIENCE
    while (file := _take(path)) is None:
        if time.monotonic() > until:
            raise InputError(f"another process keeps {path} locked; end the run that it belongs to.")
        time.sleep(0.2)
    with file:
        yield


def _take(path: Path) -> IO[str] | None:
    """Open a file under its lock; None if another process has it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # it was removed before it was locked
