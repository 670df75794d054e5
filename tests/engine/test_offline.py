"""`speca batch`: a file of requests in, pictures and a manifest out, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import tiny
from speca.cli.main import app

SOURCES = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny class-to-image pipeline on disk."""
    folder = tmp_path_factory.mktemp("models") / "dit"
    tiny.dit().pipe.save_pretrained(folder)
    return folder


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["batch", *map(str, arguments)])


def manifest(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_pictures_manifest_report_and_timeline(model: Path, tmp_path: Path) -> None:
    lines = [{"class_labels": [n % 5], "num_inference_steps": 6 + n % 3} for n in range(7)]
    lines[3] |= {"class_labels": [1, 2], "preset": "fast", "seed": 77}
    file, out = write(tmp_path / "requests.jsonl", *lines), tmp_path / "out"
    done = run(model, file, "--out", out, "--steps", 6, "--max-batch", 4)
    assert done.exit_code == 0, done.output
    entries = {entry["line"]: entry for entry in manifest(out)}
    assert sorted(entries) == list(range(7))
    assert entries[3]["images"] == ["000003-0.png", "000003-1.png"] and entries[3]["request"]["generator_seed"] == 77
    for entry in entries.values():
        assert all(Image.open(out / name).size == (8, 8) for name in entry["images"])
        decisions = [s["decisions"] for s in entry["report"]["samples"]]
        assert {len(d) for d in decisions} == {entry["request"]["num_inference_steps"]}
    report = json.loads((out / "report.json").read_text())
    assert report["made"] == 7 and report["failed"] == 0 and report["statistics"]["done"] == 7
    assert (out / "engine.png").is_file() and not [p for p in out.iterdir() if p.name.startswith(".")]


def test_what_is_there_is_not_made_again_and_what_changed_is(model: Path, tmp_path: Path) -> None:
    lines = [{"class_labels": [n]} for n in range(4)]
    file, out = write(tmp_path / "requests.jsonl", *lines), tmp_path / "out"
    assert run(model, file, "--out", out, "--steps", 5).exit_code == 0
    (out / "000002.png").unlink()
    with (out / "manifest.jsonl").open("a") as text:
        text.write('{"line": 0, "ma')  # as a kill in the middle of a line leaves it
    write(file, *lines[:1], {"class_labels": [9]}, *lines[2:])
    done = run(model, file, "--out", out, "--steps", 5, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["made"] == 2
    text = (out / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in text if line.endswith("}")][4:] in ([1, 2], [2, 1])
    assert json.loads(run(model, file, "--out", out, "--steps", 5, "--json").stdout)["made"] == 0


def test_a_line_that_fails_is_told_and_tried_again(model: Path, tmp_path: Path) -> None:
    file, out = write(tmp_path / "r.jsonl", {"class_labels": [1]}, {"class_labels": [4000]}), tmp_path / "out"
    done = run(model, file, "--out", out, "--steps", 5, "--json")
    assert done.exit_code == 1 and "1 of 2 lines failed" in done.stderr
    assert "IndexError" in next(entry for entry in manifest(out) if entry["line"] == 1)["error"]
    write(file, {"class_labels": [1]}, {"class_labels": [4]})
    assert json.loads(run(model, file, "--out", out, "--steps", 5, "--json").stdout)["made"] == 1


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(model: Path, tmp_path: Path) -> None:
    file, out = write(tmp_path / "r.jsonl", *[{"class_labels": [n % 9]} for n in range(120)]), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "speca.cli.main",
        "batch",
        str(model),
        str(file),
        "--out",
        str(out),
        "--steps",
        "40",
    ]
    env = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 90
        while not (out / "manifest.jsonl").is_file() or (out / "manifest.jsonl").stat().st_size < 2000:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = (out / "manifest.jsonl").read_bytes().count(b"\n")
    done = run(model, file, "--out", out, "--steps", 40, "--json")
    assert done.exit_code == 0, done.output
    assert 0 < before < 120 and json.loads(done.stdout)["made"] == 120 - before
    assert len(list(out.glob("*.png"))) == 121  # and engine.png


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("{", "line 1 is not valid JSON"),
        ("[1]", "line 1 is neither a text nor an object"),
        ('{"class_labels": [1], "stepz": 3}', "takes no argument 'stepz'"),
        ('{"label": "boot"}', "has no class 'boot'"),
    ],
)
def test_a_wrong_file_is_refused(model: Path, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    done = run(model, tmp_path / "r.jsonl", "--out", tmp_path / "out", "--steps", 5)
    assert done.exit_code == 2 and says in " ".join(done.stderr.split()), done.output


def test_a_missing_file_is_refused(model: Path, tmp_path: Path) -> None:
    done = run(model, tmp_path / "none.jsonl", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "cannot be read" in done.stderr
