"""Requests of `speca batch` as JSON lines, CSV and Parquet."""

from __future__ import annotations

from pathlib import Path

import pytest

from speca.engine.inputs import read_requests
from speca.engine.offline import read_lines
from speca.errors import InputError

ROWS = [
    {"prompt": "a red boat, at sea", "seed": 5, "num_inference_steps": 12, "preset": "fast"},
    {"prompt": "7"},
]
CSV = 'prompt,seed,num_inference_steps,preset\n"a red boat, at sea",5,12,fast\n7,,,\n'


def test_csv_and_parquet_ask_for_the_same_as_json_lines(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(CSV)
    (tmp_path / "r.jsonl").write_text('{"prompt": "a red boat, at sea", "seed": 5, "num_inference_steps": 12, '
                                      '"preset": "fast"}\n"7"\n')  # fmt: skip
    assert [given for _, given in read_requests(tmp_path / "r.csv")] == ROWS
    lines = read_lines(tmp_path / "r.csv", {}, 3, lambda names: [])
    assert lines == read_lines(tmp_path / "r.jsonl", {}, 3, lambda names: [])
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame(ROWS).astype({"seed": "Int64", "num_inference_steps": "Int64"}).to_parquet(tmp_path / "r.parquet")
    assert read_lines(tmp_path / "r.parquet", {}, 3, lambda names: []) == lines


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "text,seed\nboat,1\n", "has the columns text, seed"),
        ("a.csv", "", "has the columns none"),
        ("a.csv", "prompt,seed\nboat\n", "row 1 has more or fewer cells"),
        ("a.csv", "prompt,seed\nboat,1,2\n", "row 1 has more or fewer cells"),
        ("a.jsonl", "[1]", "neither a text nor an object"),
        ("none.jsonl", None, "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        list(read_requests(tmp_path / name))


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_text("prompt")
    with pytest.raises(InputError, match="is not a Parquet file"):
        list(read_requests(tmp_path / "a.parquet"))
