"""The command line, driven as a user would: results, JSON, and one clear sentence for every wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
from click.testing import Result
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from typer.testing import CliRunner

import speca
import tiny
from speca import zoo
from speca.cli import output
from speca.cli.main import app
from speca.cli.request import Request, class_numbers
from speca.reports import comparison, measure

NAMES = ("t-shirt", "trouser", "sneaker", "ankle boot")


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as models: `labelled` and `numbered` (DiT with and without class names), `unet`, `embedder`, `empty`."""
    root = tmp_path_factory.mktemp("models")
    pipe = tiny.dit().pipe
    pipe.save_pretrained(root / "numbered")
    pipe.save_pretrained(root / "labelled")
    index = root / "labelled" / "model_index.json"
    labels = {str(number): name for number, name in enumerate(NAMES)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": labels}))
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(clip_sample=False)).save_pretrained(root / "unet")
    small = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    parts = (
        transformers.SiglipVisionModel(small), transformers.SiglipImageProcessorPil(),
        ReduxImageEncoder(redux_dim=8, txt_in_features=8),
    )  # fmt: skip
    diffusers.FluxPriorReduxPipeline(*parts).save_pretrained(root / "embedder")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


# -- generate -----------------------------------------------------------------------------------------
def test_generate_writes_images_timeline_and_report(shelf: Path, here: Path) -> None:
    result = done("generate", shelf / "labelled", "--label", "Sneaker", "--label", 1, "--n", 3, "--steps", 8)
    out = here / "speca-out"
    assert sorted(path.name for path in out.iterdir()) == [
        "image-000.png", "image-001.png", "image-002.png", "report.json", "timeline.png",
    ]  # fmt: skip
    assert Image.open(out / "image-002.png").size == (8, 8)
    report = json.loads((out / "report.json").read_text())
    assert (report["seeds"], report["steps"], report["preset"]) == ([0, 1, 2], 8, "balanced")
    assert [len(sample["decisions"]) for sample in report["samples"]] == [8, 8, 8]
    for word in ("computed steps", "fewer", "written to", "speca-out"):
        assert word in result.stdout


def test_generate_prints_json_and_nothing_else(shelf: Path, here: Path) -> None:
    result = done("generate", shelf / "numbered", "--label", 500, "--steps", 4, "--json", "--out", "deep/er")
    assert json.loads(result.stdout) == json.loads((here / "deep" / "er" / "report.json").read_text())
    assert not result.stderr


def test_compare_writes_the_grid_and_the_figures(shelf: Path, here: Path) -> None:
    settings = ("--preset", "paper", "--set", "threshold=1e9", "--set", "rule=interval", "--set", "forecaster=reuse")
    result = done(
        "generate", shelf / "labelled", "--label", "trouser", "--n", 2, "--steps", 10, "--seed", 40,
        *settings, "--compare", "--json", "--out", "out",
    )  # fmt: skip
    figures = json.loads(result.stdout)
    assert figures == json.loads((here / "out" / "report.json").read_text())
    assert figures["model"] == str(shelf / "labelled")
    assert figures["seeds"] == [sample["seed"] for sample in figures["samples"]] == [40, 41]
    assert figures["config"]["threshold"] == 1e9
    assert figures["config"]["rule"] == "interval" and figures["config"]["forecaster"] == "reuse"
    assert isinstance(figures["wall_speedup"], float)
    assert figures["command"].startswith("speca ")
    assert {"grid.png", "timeline.png", "image-001.png"} <= {path.name for path in (here / "out").iterdir()}


def test_compare_prints_a_summary(shelf: Path, here: Path) -> None:
    result = done("generate", shelf / "labelled", "--label", 0, "--steps", 6, "--compare")
    for word in ("model", "whole call", "PSNR", "median", "memory"):
        assert word in result.stdout


def test_options_reach_the_pipeline(shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(pipe: Any, call: dict[str, Any], seeds: list[int], config: speca.SpecaConfig, **kwargs: Any) -> Any:
        seen.update(call=call, seeds=seeds, config=config, dtype=str(pipe.transformer.dtype), **kwargs)
        raise speca.SpecaError("enough seen")

    monkeypatch.setattr(measure, "generate", spy)
    run(
        "generate", shelf / "labelled", "--label", "sneaker", "--label", "0", "--n", 3, "--steps", 9, "--seed", 5,
        "--guidance", 2.5, "--preset", "fast", "--set", "max_draft=2", "--batch", 2, "--dtype", "bfloat16",
    )  # fmt: skip
    assert seen["call"] == {"num_inference_steps": 9, "guidance_scale": 2.5, "class_labels": [2, 0, 2]}
    assert (seen["seeds"], seen["batch"], seen["dtype"]) == ([5, 6, 7], 2, "torch.bfloat16")
    assert seen["config"] == speca.SpecaConfig.build("fast", max_draft=2)


def test_names_that_look_like_markup_are_printed_as_they_are(
    shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = done("generate", shelf / "labelled", "--label", 0, "--steps", 4, "--out", "[bold]")
    assert "[bold]" in result.stdout
    assert (here / "[bold]" / "report.json").is_file()


def test_an_older_result_is_replaced_and_other_files_stay(shelf: Path, here: Path) -> None:
    (here / "image-007.png").touch()
    (here / "mine.txt").touch()
    done("generate", shelf / "labelled", "--label", 0, "--steps", 4, "--out", ".")
    assert sorted(path.name for path in here.iterdir()) == ["image-000.png", "mine.txt", "report.json", "timeline.png"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(
    shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(comparison.Comparison, "grid", fail)
    (here / "kept").mkdir()
    for out in ("new/folder", "kept"):
        result = run("generate", shelf / "labelled", "--label", 0, "--steps", 4, "--compare", "--out", out)
        assert result.exit_code != 0
    assert [path.name for path in here.rglob("*")] == ["kept"]


# -- wrong input --------------------------------------------------------------------------------------
LABELLED, PAPER = ("labelled", "--label", "0"), ("--preset", "paper")
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown preset": ((*LABELLED, "--preset", "balancd"), "unknown preset 'balancd'; did you mean 'balanced'?"),
    "misspelt key": ((*LABELLED, "--set", "treshold=1"), "unknown setting 'treshold'; did you mean 'threshold'?"),
    "no key": ((*LABELLED, "--set", "threshold"), "--set takes KEY=VALUE, not 'threshold'; for example"),
    "bad number": ((*LABELLED, "--set", "threshold=high"), "threshold='high' must be of type float"),
    "bad whole number": ((*LABELLED, "--set", "order=1.5"), "order='1.5' must be of type int"),
    "bad flag": ((*LABELLED, "--set", "corrector=maybe"), "corrector='maybe' must be of type bool"),
    "bad choice": ((*LABELLED, "--set", "prior=mesured"), "did you mean 'measured'?"),
    "bad choice of the paper's": ((*LABELLED, *PAPER, "--set", "forecaster=tailor"), "did you mean 'taylor'?"),
    "a key of the paper's": ((*LABELLED, "--set", "forecaster=reuse"), "forecaster is a setting of VerifiedConfig"),
    "a key that is gone": ((*LABELLED, "--set", "verify=false"), "the setting 'verify' is gone; use VerifiedConfig"),
    "out of range": ((*LABELLED, "--set", "threshold=-1"), "threshold=-1.0 is out of range; use a value from 0"),
    "order without warm-up": ((*LABELLED, *PAPER, "--set", "order=4"), "set warmup=5 or order=2"),
    "too few steps": ((*LABELLED, "--steps", "3"), "--steps 3 leaves nothing to forecast; use 4 steps or more"),
    "too many steps": ((*LABELLED, "--steps", "1001"), "--steps 1001 is more than"),
    "no images": ((*LABELLED, "--n", "0"), "--n 0 is out of range; use 1 or more"),
    "fewer images than labels": ((*LABELLED, "--label", "1", "--n", "1"), "--n 1 is fewer than the 2 labels"),
    "negative seed": ((*LABELLED, "--seed", "-1"), "--seed -1 is out of range; use a whole number from 0"),
    "bad guidance": ((*LABELLED, "--guidance", "nan"), "--guidance nan is out of range; use 0 or more"),
    "no passes": ((*LABELLED, "--compare", "--repeats", "0"), "--repeats 0 is out of range; use 1 or more"),
    "no batch": ((*LABELLED, "--batch", "0"), "--batch 0 is out of range; use 1 or more"),
    "no threads": ((*LABELLED, "--threads", "0"), "--threads 0 is out of range; use 1 or more"),
    "unknown device": ((*LABELLED, "--device", "gpu9"), "--device gpu9 cannot be used here; use cpu"),
    "unknown label": (("labelled", "--label", "sneeker"), "has no class 'sneeker'; did you mean 'sneaker'?"),
    "label out of range": (("labelled", "--label", "4"), "label 4 is out of range;"),
    "number out of range": (("numbered", "--label", "1000"), "has classes 0 to 999."),
    "name where there are none": (("numbered", "--label", "cat"), "knows its classes by number only, 0 to 999"),
    "label and prompt": ((*LABELLED, "--prompt", "x"), "give either --label or --prompt, not both."),
    "no label or prompt": (("labelled",), "give either --label or --prompt, for example"),
    "prompt to a class model": (("labelled", "--prompt", "x"), "does not take --prompt; try --label."),
    "label to a model without classes": (("unet", "--label", "0"), "takes neither labels nor prompts; call it from"),
    "no denoising model": (("embedder", "--label", "0"), "FluxPriorReduxPipeline has no denoising model: none of its"),
    "no model": (("empty", "--label", "0"), "holds no model_index.json"),
    "no such model": (("nonsense", "--label", "0"), "is no bundled model, no folder and no hub id"),
    "a file": (("labelled/model_index.json", "--label", "0"), "is a file; give the pipeline's folder"),
}


def assert_refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("speca: ")
    assert not result.stdout


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_sentence(shelf: Path, here: Path, arguments: tuple[str, ...], sentence: str) -> None:
    model, *rest = arguments
    place = shelf / model
    result = run("generate", place if place.exists() else model, *rest, "--out", "new/out")
    assert_refused(result, sentence)
    assert not list(here.iterdir())


def test_many_class_names_are_not_all_listed(shelf: Path) -> None:
    pipe = tiny.dit().pipe
    pipe.labels = {f"breed {number}": number for number in range(500)}
    with pytest.raises(speca.InputError, match="the nearest are breed 12, ") as caught:
        class_numbers(pipe, "dogs", ["bred 12"])
    assert len(str(caught.value)) < 100


class Painter:
    """The signature of a pipeline that takes prompts, and no guidance scale."""

    def __call__(self, prompt: list[str], num_inference_steps: int = 50) -> None: ...


def test_prompts_take_turns_over_the_images() -> None:
    call, captions = Request("hub/painter", [], ["a cat", "a dog"], 3, 20, 0, None).call(Painter())
    assert call == {"num_inference_steps": 20, "prompt": ["a cat", "a dog", "a cat"]}
    assert captions == ("a cat", "a dog", "a cat")


@pytest.mark.parametrize(
    ("labels", "prompts", "guidance", "sentence"),
    [
        ([], ["a cat"], 4.0, "Painter has no guidance scale; leave --guidance away."),
        (["cat"], [], None, r"hub/painter \(Painter\) does not take --label; try --prompt."),
    ],
)
def test_a_prompt_model_refuses_what_it_does_not_take(
    labels: list[str], prompts: list[str], guidance: float | None, sentence: str
) -> None:
    with pytest.raises(speca.InputError, match=sentence):
        Request("hub/painter", labels, prompts, None, 20, 0, guidance).call(Painter())


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/speca"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_work(
    shelf: Path, here: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (here / "file").touch()
    monkeypatch.setattr(zoo, "resolve", None)  # nothing may be loaded
    result = run("generate", shelf / "labelled", "--label", 0, "--out", out)
    assert_refused(result, f"{out}")
    assert "name" in result.stderr
    assert [path.name for path in here.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [("generate",), ("check",), ("generate", "x", "--dtype", "int8"), ("make",)])
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


# -- check, models, the bare command ------------------------------------------------------------------
def test_check_says_what_was_found(shelf: Path) -> None:
    result = done("check", shelf / "labelled")
    for word in (
        "sampler", "linear, memory 1", "possible (preset paper)", "transformer_blocks", "self-test", "memory",
        "class_labels=[0, 1]",
    ):  # fmt: skip
        assert word in result.stdout
    found = json.loads(done("check", shelf / "labelled", "--json").stdout)
    assert found["supported"] is True
    assert found["bytes_per_sample"] > 0
    assert found["state"]
    assert found["call"].startswith("DiTPipeline(")


def test_check_of_a_model_without_transformer_blocks_says_what_can_be_done(shelf: Path) -> None:
    """Outputs of a U-Net are forecast; drafts that are verified need its blocks, which are none."""
    found = json.loads(done("check", shelf / "unet", "--json").stdout)
    assert found["supported"] is False and found["reason"]
    assert found["sampler"].startswith("linear") and found["bytes_per_sample"] > 0
    assert found["call"] == "DDPMPipeline(num_inference_steps=4)"
    assert "not possible" in done("check", shelf / "unet").stdout


def test_check_of_an_unsupported_model_exits_with_1(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dict.fromkeys(("bytes_per_sample", "flops_full", "flops_draft"))
    found = speca.CheckReport(
        model="Odd", supported=False, reason="its blocks take no state", sampler="it draws at random", blocks="",
        verify_block="", state=(), self_test="not run", **plain,
    )  # fmt: skip
    monkeypatch.setattr(speca, "check", lambda *_: found)
    result = run("check", shelf / "labelled")
    assert result.exit_code == 1
    assert "its blocks take no state" in result.stdout


@pytest.mark.parametrize(("model", "sentence"), [("embedder", "no denoising model"), ("nope", "no bundled model")])
def test_check_refuses_what_cannot_be_examined(shelf: Path, model: str, sentence: str) -> None:
    assert_refused(run("check", shelf / model if model == "embedder" else model), sentence)


def test_check_says_which_call_failed(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def demanding(*_: object, **__: object) -> None:
        raise ValueError("`image` is missing")

    monkeypatch.setattr(diffusers.DiTPipeline, "__call__", demanding)
    result = run("check", shelf / "labelled")
    assert_refused(result, "did not run as DiTPipeline(class_labels=[0, 1], num_inference_steps=4)")


def test_models_lists_the_shelf(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "WEIGHTS", shelf)
    assert "labelled" in done("models").stdout
    cards = json.loads(done("models", "--json").stdout)
    assert {"labelled", "numbered", "unet", "embedder"} == {card["name"] for card in cards}
    assert all(card["bytes"] > 0 for card in cards)


def test_version() -> None:
    assert done("--version").stdout.strip() == speca.__version__


def test_help_is_quick_and_complete() -> None:
    """Importing diffusers alone takes seconds."""
    path = {**os.environ, "PYTHONPATH": str(Path(speca.__file__).parents[1])}
    heavy = ("diffusers", "transformers", "matplotlib", "PIL")
    code = f"import sys, speca.cli.main; print(sorted({set(heavy)} & set(sys.modules)))"
    listed = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert listed.stdout.strip() == "[]"
    for command in ("generate", "check", "models"):
        assert command in done("--help").stdout
        assert "--json" in done(command, "--help").stdout


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"), (2**31, "2.0 GiB")]
)
def test_sizes_have_units(count: int, text: str) -> None:
    assert output.size(count) == text


def test_calibrate_and_generate_with_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    asked = ("--samples", "4", "--confidence", "0.8", "--target", "20", "--steps", "16", "--threads", "1")
    result = run("calibrate", "fashion-dit", *asked, "--out", str(file))
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["model"] == "DiTTransformer2DModel" and len(found["trials"]) >= 2
    shown = run(
        "generate", "fashion-dit", "--label", "bag", "--steps", "8", "--calibration", str(file),
        "--out", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["config"]["tolerance"] == found["tolerance"]


VERIFIED = (*PAPER, "--set", "rule=schedule", "--set", "order=1", "--set", "warmup=2", "--set", "final=0")


@pytest.mark.parametrize("method", [(), VERIFIED], ids=["outputs", "features"])
def test_schedule_from_the_command_line(tmp_path: Path, method: tuple[str, ...]) -> None:
    settings = (*method, "--set", "schedule=0,1,4")
    shown = run(
        "generate", "fashion-dit", "--label", "bag", "--steps", "8", *settings, "--out", str(tmp_path), "--json"
    )
    assert shown.exit_code == 0, shown.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"][0]["decisions"] == "FFAAFAAA"
