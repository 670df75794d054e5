"""The paper's suites, driven on bundled siblings and local folders; scorers are stood in for where they are absent."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import speca
import tiny
from speca.bench import papers, published, scorers
from speca.cli.main import app
from speca.zoo import resolve

SIZES = {"num_inference_steps": 6, "height": 64, "width": 64, "max_sequence_length": 12}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red apple\n\na key\n")
    return file


def run(pipe: Any, name: str, out: Path, **asked: Any) -> papers.PaperRun:
    pipe.set_progress_bar_config(disable=True)
    work = papers.PaperRun(pipe, name, out, **{"names": ["fewer-steps", "speca-paper"], "sweep": 1, **asked})
    work.run()
    return work


def test_paper_dit_on_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny DiTPipeline by save_pretrained: images in a folder that torch-fidelity is given, once each."""
    tiny.dit().pipe.save_pretrained(tmp_path / "model")
    seen: list[dict[str, Any]] = []

    def calculate_metrics(**given: Any) -> dict[str, float]:
        seen.append(given)
        return {"frechet_inception_distance": 2.5, "inception_score_mean": 90.0}

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=calculate_metrics))
    real = tmp_path / "real"
    work = run(
        resolve(str(tmp_path / "model")), "paper-dit", tmp_path / "out", samples=3, reference=real,
        sizes={"num_inference_steps": 6},
    )  # fmt: skip
    by = {row["method"]: row for row in work.rows if row["kind"] == "quality"}
    assert by["none"]["flops_speedup"] == 1.0 and by["fewer-steps"]["flops_speedup"] > 1
    assert all(row["scores"] == {"FID": 2.5, "IS": 90.0} and row["made"] == 3 for row in by.values())
    assert seen[0]["input2"] == str(real) and seen[0]["fid"] and seen[0]["isc"]
    folder = Path(seen[0]["input1"])
    assert [p.name for p in sorted(folder.iterdir())] == ["000000.png", "000001.png", "000002.png"]
    assert tiny.dit().pipe and len(seen) == 3
    again = run(
        resolve(str(tmp_path / "model")), "paper-dit", tmp_path / "out", samples=3, sizes={"num_inference_steps": 6}
    )
    assert again.rows == work.rows and len(seen) == 3, "what is there is not made or scored again"
    text = papers.table("paper-dit", work.rows)
    assert "| 2.500 |" in text and "3 of 50000 samples" in text
    assert "| SpeCa, the paper's row | 4.99x | - | 2.72 |" in text and "issue 10" in text


def test_from_the_command_line(tmp_path: Path) -> None:
    """Arguments of a folder's call.json replace those of the paper."""
    tiny.dit().pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "call.json").write_text('{"num_inference_steps": 4}')
    words = ["bench", str(tmp_path / "model"), "--suite", "paper-dit", "--samples", "2", "--methods", "fewer-steps"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "report.md").read_text()
    assert (
        "| none 0 | 2 | 1.00x |" in text
        and "| fewer-steps 2 | 2 | 2.00x |" in text
        and "pip install torch-fidelity" in text
    )


def test_an_interrupted_setting_goes_on_where_it_stood(tmp_path: Path) -> None:
    case = tiny.dit()
    work = papers.PaperRun(
        case.pipe, "paper-dit", tmp_path, names=["none"], samples=3, sizes={"num_inference_steps": 4}
    )
    folder = tmp_path / "samples" / "none-0"
    folder.mkdir(parents=True)
    papers.save(torch.zeros(16, 16, 3), folder.parent / "000000")  # a file beside the folder does not count
    papers.save(torch.zeros(16, 16, 3), folder / "000001")
    before = (folder / "000001.png").read_bytes()
    work.run()
    row = next(r for r in work.rows if r["kind"] == "quality")
    assert row["made"] == 2 and (folder / "000001.png").read_bytes() == before
    assert len(list(folder.iterdir())) == 3
    assert "torch-fidelity" in row["unscored"][0] or row["scores"]


def test_paper_flux_on_the_bundled_sibling(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    class Model:
        def score(self, prompt: str, paths: list[str]) -> float:
            asked.append((prompt, Path(paths[0]).name))
            return 0.5

    monkeypatch.setitem(sys.modules, "ImageReward", types.SimpleNamespace(load=lambda name: Model()))
    work = run(speca.zoo.load("emoji-flux"), "paper-flux", tmp_path, prompts=prompts, sizes=SIZES, names=["speca"])
    row = work.rows[-1]
    assert row["method"] == "speca" and row["scores"]["ImageReward"] == 0.5 and work.samples == 2
    assert asked[:2] == [("a red apple", "000000.png"), ("a key", "000001.png")]
    assert "CLIP" in row["scores"] or "hf download openai/clip-vit-large-patch14" in row["unscored"][0]


def test_paper_hunyuan_writes_videos_as_vbench_names_them(tmp_path: Path, prompts: Path) -> None:
    pipe = tiny.hunyuan_video().pipe
    embeds = dict(
        prompt_embeds=torch.randn(1, 6, 12), pooled_prompt_embeds=torch.randn(1, 8),
        prompt_attention_mask=torch.ones(1, 6),
    )  # fmt: skip

    class WithoutEncoders(type(pipe)):  # type: ignore[misc]
        def encode_prompt(self, **_: Any) -> tuple[torch.Tensor, ...]:
            """The tiny pipeline has no text encoders."""
            return embeds["prompt_embeds"], embeds["pooled_prompt_embeds"], embeds["prompt_attention_mask"]

    pipe.__class__ = type("HunyuanVideoPipeline", (WithoutEncoders,), {})
    work = run(
        pipe, "paper-hunyuan", tmp_path, prompts=prompts, names=["none"], samples=6,
        sizes=dict(height=32, width=32, num_frames=5, num_inference_steps=4, guidance_scale=1.0),
    )  # fmt: skip
    row = work.rows[-1]
    assert "reason" not in row, row
    stems = sorted(p.stem for p in (tmp_path / "samples" / "none-0").iterdir())
    assert stems == ["a key-0", *(f"a red apple-{k}" for k in range(5))]
    assert {p.suffix for p in (tmp_path / "samples" / "none-0").iterdir()} <= {".mp4", ".gif"}
    assert "pip install vbench" in row["unscored"][0]


def test_a_video_keeps_its_frames(tmp_path: Path) -> None:
    from PIL import Image

    frames = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 16, 16, 3)
    path = papers.save(frames, tmp_path / "clip. of-0")
    assert path.name.startswith("clip. of-0.")
    if path.suffix == ".gif":
        with Image.open(path) as film:
            assert getattr(film, "n_frames", 1) == 5


def test_without_weights_it_says_what_to_get_and_where_it_looks(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--suite", "paper-dit", "--out", str(tmp_path)])
    words = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code != 0
    assert "hf download facebook/DiT-XL-2-256" in words and "huggingface" in words and "DiTPipeline" in words
    with pytest.raises(speca.InputError, match="about a FluxPipeline; fashion-dit is a DiTPipeline"):
        papers.weights(papers.paper("paper-flux"), "fashion-dit", resolve)
    with pytest.raises(speca.InputError, match=r"needs --prompts FILE, one a line \(none was given\): the 200 prompts"):
        papers.PaperRun(tiny.flux().pipe, "paper-flux", tmp_path)
    with pytest.raises(speca.InputError, match="did you mean 'paper-dit'"):
        papers.paper("paper-dti")


def test_absent_scorers_name_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch_fidelity", "ImageReward", "vbench"):
        monkeypatch.setitem(sys.modules, module, None)
    for scorer, package in ((scorers.fidelity, "torch-fidelity"), (scorers.image_reward, "image-reward")):
        with pytest.raises(speca.InputError, match=f"pip install {package}"):
            scorer(tmp_path, [], None)
    with pytest.raises(speca.InputError, match="pip install vbench"):
        scorers.vbench(tmp_path, [], None)


def test_every_published_row_has_a_source() -> None:
    for name in papers.PAPERS:
        rows = published.PUBLISHED[name]
        assert len(rows) > 5 and all(len(row.source) > 5 for row in rows)
        assert any(row.method.startswith("SpeCa") for row in rows)
