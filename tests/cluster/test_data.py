"""`speca batch --ray` on a Ray of this machine: the pictures of one process, and none lost or made twice by a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from speca.cli.main import app
from speca.cluster import data
from speca.config import SpecaConfig
from speca.engine.offline import Line
from speca.errors import InputError

pytestmark = pytest.mark.ray
SOURCES = Path(__file__).resolve().parents[2] / "src"
LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
ROWS = [{"label": LABELS[n % 10], "seed": 100 + n, "num_inference_steps": 20} for n in range(40)]
"""At 20 steps the calibration of fashion-dit holds; where it does not, an engine learns so from its first requests."""
OPTIONS = ("--steps", "20", "--max-batch", "4")


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("ray.data", reason="needs Ray: pip install 'speca-diffusers[cluster]'")


def batch(file: Path, out: Path, *options: str) -> dict[str, Any]:
    """The report of `speca batch` in this process."""
    done = CliRunner().invoke(app, ["batch", "fashion-dit", str(file), "--out", str(out), *OPTIONS, "--json", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def alone(file: Path) -> Path:
    """The folder of a run in one process."""
    batch(file, file.parent / "alone", "--threads", "1")
    return file.parent / "alone"


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def assert_same(out: Path, alone: Path) -> None:
    """Each line was done once, with the decisions and the pictures of a run in one process."""
    found, wanted = manifest(out), {entry["line"]: entry for entry in manifest(alone)}
    assert sorted(entry["line"] for entry in found) == sorted(wanted) == list(range(len(ROWS)))
    identical = 0
    for entry in found:
        other = wanted[entry["line"]]
        assert [entry[name] for name in ("mark", "request", "images")] == [
            other[name] for name in ("mark", "request", "images")
        ]
        assert entry["report"]["samples"][0]["decisions"] == other["report"]["samples"][0]["decisions"]
        (name,) = entry["images"]
        mine, theirs = (np.asarray(Image.open(place / name)).astype(int) for place in (out, alone))
        assert np.abs(mine - theirs).max() <= 1
        identical += (out / name).read_bytes() == (alone / name).read_bytes()
    assert identical >= len(ROWS) * 0.9
    assert not (out / "parts").exists() and len(list(out.glob("*.png"))) == len(ROWS) + (out == alone)


def test_two_workers_make_what_one_process_makes(file: Path, alone: Path, tmp_path: Path) -> None:
    import pandas

    pandas.DataFrame(ROWS).to_parquet(tmp_path / "prompts.parquet")
    report = batch(tmp_path / "prompts.parquet", tmp_path / "out", "--ray", "local", "--workers", "2")
    assert_same(tmp_path / "out", alone)
    done = report["hardware"]["workers"]
    assert len(done) == 2 and sum(done.values()) == 40 == report["made"]
    assert report["statistics"]["full"] + report["statistics"]["accepted"] == sum(
        row["num_inference_steps"] for row in ROWS
    )
    pandas.DataFrame(ROWS).to_csv(tmp_path / "prompts.csv", index=False)
    again = batch(tmp_path / "prompts.csv", tmp_path / "out", "--ray", "local")  # as one file, by their marks
    assert again["made"] == 0 and len(manifest(tmp_path / "out")) == 40


def test_a_driver_that_was_killed_is_taken_up(file: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "import sys; from speca.cli import main; sys.exit(main())", "batch", "fashion-dit"]
    command += [str(file), "--out", str(out), *OPTIONS, "--ray", "local", "--workers", "2"]
    env = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while len(list(out.glob("*.png"))) < 6:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    made = batch(file, out, "--ray", "local", "--workers", "2")["made"]
    assert 0 < made <= 36
    assert_same(out, alone)


def run(job: data.Job, file: Path, out: Path, tell: Callable[[Sequence[dict], bool], None], address: str) -> Any:
    """What `data.run` gives for the lines of an earlier manifest."""
    lines = [Line(e["line"], e["request"], e["mark"]) for e in sorted(manifest(file), key=lambda e: e["line"])]
    return data.run(job, lines, out, address, 2, tell)


def workers_of_this_process() -> list[int]:
    """Processes of actors that descend from this process."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    found = [line.split(maxsplit=2) for line in listed.splitlines()]
    mine = {os.getpid()}
    for _ in range(4):
        mine |= {int(pid) for pid, parent, *_ in found if int(parent) in mine}
    return [int(pid) for pid, _, *args in found if int(pid) in mine and args[0].startswith("ray::MapWorker")]


def job() -> data.Job:
    return data.Job("fashion-dit", SpecaConfig.build("balanced"), engine={"max_batch": 4})


def test_a_worker_that_is_killed_costs_nothing(alone: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(new: Sequence[dict], earlier: bool) -> None:
        if new and not killed:
            killed.append(workers_of_this_process()[0])
            os.kill(killed[0], signal.SIGKILL)

    run(job(), alone, tmp_path / "out", kill, "local")
    assert killed
    assert_same(tmp_path / "out", alone)


def test_what_cannot_be_is_refused_and_the_rest_kept(alone: Path, tmp_path: Path) -> None:
    lines = [Line(n, {"class_labels": [n], "num_inference_steps": 5, **({"stepz": 1} if n == 3 else {})}, str(n))
             for n in range(4)]  # fmt: skip
    with pytest.raises(InputError, match="takes no argument 'stepz'"):
        data.run(job(), lines, tmp_path, "local", 1)
    assert not (tmp_path / "parts" / "run").exists()
    with pytest.raises(InputError, match="cannot be reached"):
        data.run(job(), lines, tmp_path, "127.0.0.1:1", 1)
