"""What keeps two workers from doing the same line, without Ray."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from speca.cli.main import app
from speca.cluster import data, shards
from speca.engine.future import Result
from speca.engine.offline import Folder, Line
from speca.errors import ConfigError, InputError

LINES = [Line(n, {"class_labels": [n]}, f"mark{n}") for n in range(10)]


class Drawn:
    """An engine that draws at once, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(self, requests: Any) -> Any:
        for index, asked in enumerate(requests):
            self.asked += asked["class_labels"]
            yield Result(index=index, output=[np.zeros((1, 4, 4, 3))])


def test_shards_hold_every_line_once() -> None:
    for count, workers, batch in [(1, 2, 16), (40, 2, 16), (1000, 2, 16), (1000, 3, 4), (5, 8, 1)]:
        lines = [Line(n, {}, str(n)) for n in range(count)]
        found = shards.cut(lines, workers, batch)
        assert [line for shard in found for line in shard.lines] == lines
        assert len(found) >= min(workers, count) - 1 and max(len(s.lines) for s in found) <= 4 * batch
        assert len({shard.name for shard in found}) == len(found)
    assert shards.Shard.from_json(found[0].to_json()) == found[0]


def test_what_a_worker_did_is_copied_once_and_not_done_again(tmp_path: Path) -> None:
    shard = shards.Shard.of(LINES[:4])
    with shards.claimed(tmp_path) as name:
        collector = shards.Collector(Folder.open(tmp_path), {shard.name: shard})
        part = Folder.open(tmp_path, shard.part)
        part.keep(LINES[1], Result(index=0, output=[np.zeros((1, 4, 4, 3))]))
        with (tmp_path / shard.part).open("a") as file:
            file.write('{"line": 2, "ma')  # a worker that was killed
        assert [entry["line"] for entry in collector.collect()] == [1]
        assert shards.work(engine := Drawn(), tmp_path, name, shard) == 3 and engine.asked == [0, 2, 3]
        assert [entry["line"] for entry in collector.finish(shard.name)] == [0, 2, 3]
    text = (tmp_path / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in text] == [1, 0, 2, 3] and not (tmp_path / "parts").exists()


def test_a_folder_takes_over_what_was_not_copied(tmp_path: Path) -> None:
    shard = shards.Shard.of(LINES)
    with shards.claimed(tmp_path) as name:
        shards.work(Drawn(), tmp_path, name, shard)
    folder = Folder.open(tmp_path)
    assert all(map(folder.has, LINES)) and not (tmp_path / shard.part).exists()


def test_a_worker_stops_when_its_run_has_ended(tmp_path: Path) -> None:
    with shards.claimed(tmp_path) as name:
        pass
    with pytest.raises(shards.StaleRunError, match="has to see --out"):
        shards.work(Drawn(), tmp_path, name, shards.Shard.of(LINES))

    class Interrupted(Drawn):
        def generate(self, requests: Any) -> Any:
            for number, result in enumerate(super().generate(requests)):
                if number == 2:
                    (tmp_path / "parts" / "run").write_text("another")
                yield result

    with shards.claimed(tmp_path) as name, pytest.raises(shards.StaleRunError):
        shards.work(engine := Interrupted(), tmp_path, name, shards.Shard.of(LINES))
    assert engine.asked == [0, 1, 2]


def _claim(place: Path, answer: Any) -> None:
    try:
        with shards.claimed(place):
            answer.put("claimed")
    except InputError as error:
        answer.put(str(error))


def test_one_run_at_a_time_has_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    with shards.claimed(tmp_path):
        other = context.Process(target=_claim, args=(tmp_path, answer))
        other.start()
        assert "another run writes to" in answer.get()
        other.join()
    _claim(tmp_path, answer)
    assert answer.get() == "claimed"


def test_workers_share_what_there_is() -> None:
    job = data.Job("m", None)
    two, eight = ({"CPU": 2.0}, {"CPU": 64.0, "GPU": 8.0})

    def reserved(found: dict[str, float], asked: int | None = None, **how: Any) -> Any:
        return data.workers_of(SimpleNamespace(cluster_resources=lambda: found), data.Job("m", None, **how), asked)

    assert (
        job.threads == 1 and reserved(two) == (2, {"num_cpus": 0.75}) and reserved(two, 4) == (4, {"num_cpus": 0.375})
    )
    assert reserved(two, threads=2) == (1, {"num_cpus": 1.5})
    assert reserved(eight) == (8, {"num_gpus": 1.0, "num_cpus": 0.1}) and reserved(eight, 16)[1]["num_gpus"] == 0.5
    assert reserved(eight, device="cpu")[0] == 64
    with pytest.raises(InputError, match="no such device"):
        reserved(two, device="cuda")


def test_without_ray_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install"), data.connected("local"):
        pass
    (tmp_path / "r.jsonl").write_text('{"class_labels": [1]}\n')
    command = ["batch", "fashion-dit", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "out"), "--ray", "local"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "pip install 'speca-diffusers[cluster]'" in done.stderr
    done = CliRunner().invoke(app, [*command[:-2], "--workers", "2"])
    assert done.exit_code == 2 and "give --ray" in done.stderr
