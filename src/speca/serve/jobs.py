"""Jobs: requests whose results are kept. They live in a SQLite file and a folder, and outlive the server's process."""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["queued", "in_progress", "completed", "failed"]
FIELDS = ("id", "kind", "caller", "model", "status", "request", "created", "started", "ended", "progress", "error",
          "found", "files")  # fmt: skip
_JSON = ("request", "error", "found", "files")

TABLE = """
create table if not exists jobs (
    id text primary key, kind text not null, caller text not null, model text not null, status text not null,
    request text not null, created real not null, started real, ended real, progress real not null default 0,
    error text, found text, files text not null default '[]'
)"""


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        id: its name.
        kind: "video" or "image"; "picture" for an image that was drawn at once and is given by URL.
        caller: whose it is; nobody else sees it.
        model: that it runs on.
        status: a cancelled job is gone.
        request: the fields that were asked for; uploads are files of the job's folder, by the names "input-0", ...
        created, started, ended: seconds since 1970, None until then.
        progress: share of its steps, from 0 to 1.
        error: body of the error it failed with.
        found: what the `speca` object of its answer says, one for each file.
        files: names of its results in its folder.
    """

    id: str
    kind: str
    caller: str
    model: str
    status: Status
    request: dict[str, Any]
    created: float
    started: float | None
    ended: float | None
    progress: float
    error: dict[str, Any] | None
    found: list[dict[str, Any]] | None
    files: list[str]


class JobStore:
    """The jobs of a server. Its methods may be called from any thread.

    A change is on disk before the method returns, so a job that was accepted is found again after the process was
    killed.
    """

    def __init__(self, folder: Path, keep_s: float) -> None:
        """Open the jobs of a folder, which is made if need be; results are kept for `keep_s` seconds.

        Raises:
            OSError, sqlite3.Error: the folder cannot be written, or its file is none of jobs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.keep_s = folder, keep_s
        self._lock = threading.Lock()
        self._base = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
        self._base.execute("pragma journal_mode=wal")
        self._base.execute("pragma synchronous=full")
        self._base.execute(TABLE)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._base.close()

    def add(self, kind: str, caller: str, model: str, request: dict[str, Any], uploads: Sequence[bytes] = ()) -> Job:
        """Keep a new job and its uploads, and return it."""
        name = f"{kind}_{secrets.token_hex(12)}"
        place = self.place(name)
        place.mkdir()
        for number, upload in enumerate(uploads):
            (place / f"input-{number}").write_bytes(upload)
        values = (name, kind, caller, model, "queued", json.dumps(request), time.time())
        self._run("insert into jobs (id, kind, caller, model, status, request, created) values (?,?,?,?,?,?,?)", values)
        found = self.get(name)
        assert found is not None
        return found

    def place(self, name: str) -> Path:
        """Return the folder of a job's uploads and results."""
        return self.folder / name

    def uploads(self, job: Job) -> list[bytes]:
        """Return the pictures that came with a job, in order."""
        found = sorted(self.place(job.id).glob("input-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        return [path.read_bytes() for path in found]

    def get(self, name: str, caller: str | None = None) -> Job | None:
        """Return a job, if it is the caller's; with None whosever it is."""
        rows = self._run("select * from jobs where id = ?", (name,))
        return rows[0] if rows and caller in (None, rows[0].caller) else None

    def of_caller(self, caller: str, kind: str, *, after: str | None, limit: int, newest: bool) -> list[Job]:
        """Return at most `limit` jobs of a caller in the order in which they came, beginning after the job `after`."""
        order, compare = ("desc", "<") if newest else ("asc", ">")
        where = f"and (created, id) {compare} (select created, id from jobs where id = ?)" if after else ""
        query = f"select * from jobs where caller = ? and kind = ? {where} order by created {order}, id {order} limit ?"
        return self._run(query, (caller, kind, *([after] if after else []), limit))

    def unfinished(self) -> list[Job]:
        """Return the jobs that have not ended, in the order in which they came."""
        query = "select * from jobs where status in ('queued', 'in_progress') and kind != 'picture'"
        return self._run(f"{query} order by created, id", ())

    def change(self, name: str, **values: Any) -> None:
        """Set some fields of a job. Harmless if it is gone."""
        names = ", ".join(f"{n} = ?" for n in values)
        dumped = [json.dumps(v) if n in _JSON and v is not None else v for n, v in values.items()]
        self._run(f"update jobs set {names} where id = ?", (*dumped, name))

    def keep(self, name: str, files: dict[str, bytes], found: list[dict[str, Any]]) -> bool:
        """Write the results of a job and mark it as completed. False if it is gone, as it was deleted meanwhile."""
        place = self.place(name)
        try:
            for file, content in files.items():
                (place / f".{file}").write_bytes(content)
                (place / f".{file}").rename(place / file)
        except FileNotFoundError:
            return False
        self.change(name, status="completed", ended=time.time(), progress=1.0, files=list(files), found=found)
        return True

    def delete(self, name: str) -> None:
        """Forget a job and its files."""
        self._run("delete from jobs where id = ?", (name,))
        shutil.rmtree(self.place(name), ignore_errors=True)

    def expire(self) -> int:
        """Delete jobs that have ended longer than `keep_s` ago; return how many."""
        old = self._run("select * from jobs where ended < ?", (time.time() - self.keep_s,))
        for job in old:
            self.delete(job.id)
        return len(old)

    def _run(self, query: str, values: Sequence[Any]) -> list[Job]:
        with self._lock:
            rows = self._base.execute(query, values).fetchall()
        return [_job(row) for row in rows]


def _job(row: Sequence[Any]) -> Job:
    given = dict(zip(FIELDS, row, strict=True))
    return Job(**{n: json.loads(v) if n in _JSON and v is not None else v for n, v in given.items()})
