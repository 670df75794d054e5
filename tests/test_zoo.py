"""The bundled models, and what a model name may be."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import tiny
from speca import InputError, zoo
from speca.cli.request import Request
from speca.zoo.classifier import Classifier


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shelf with one bundled model, `tiny-dit`, of two named classes."""
    folder = tmp_path / "weights" / "tiny-dit"
    tiny.dit().pipe.to(torch.float16).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": {"0": "cat", "1": "dog, hound"}}))
    (folder / "README.md").write_text("---\nlicense: mit\nmakes: noise of two kinds\n---\n# tiny-dit\n")
    (folder / "scores.json").write_text('{"agreement": 0.5}')
    save_file({k: v.half() for k, v in Classifier().state_dict().items()}, folder / "classifier.safetensors")
    monkeypatch.setattr(zoo, "WEIGHTS", folder.parent)
    return folder.parent


def test_a_card_says_what_the_files_say(shelf: Path) -> None:
    (card,) = zoo.models()
    assert (card.name, card.pipeline, card.makes) == ("tiny-dit", "DiTPipeline", "noise of two kinds")
    assert (card.licence, card.scores) == ("mit", {"agreement": 0.5})
    assert card.parameters == sum(p.numel() for p in tiny.dit_transformer().parameters())
    assert card.bytes == sum(path.stat().st_size for path in shelf.rglob("*") if path.is_file())
    json.dumps(card.to_dict())


def test_a_card_lives_without_readme_and_scores(shelf: Path) -> None:
    (shelf / "tiny-dit" / "README.md").unlink()
    (shelf / "tiny-dit" / "scores.json").unlink()
    (card,) = zoo.models()
    assert (card.makes, card.licence, card.scores) == ("", "", {})


def test_load_gives_float32_and_labels_by_name(shelf: Path) -> None:
    pipe = zoo.load("tiny-dit")
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32
    assert pipe.labels == {"cat": 0, "dog": 1, "hound": 1}
    assert zoo.load("tiny-dit", dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_load_names_the_nearest_model(shelf: Path) -> None:
    with pytest.raises(InputError, match="'tinny-dit'; did you mean 'tiny-dit'"):
        zoo.load("tinny-dit")


def test_classifier_is_float32_and_ready(shelf: Path) -> None:
    scorer = zoo.load_classifier("tiny-dit")
    assert not scorer.training
    assert {p.dtype for p in scorer.parameters()} == {torch.float32}
    assert scorer(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(InputError, match="without reference features"):
        zoo.load_reference("tiny-dit")
    (shelf / "tiny-dit" / "classifier.safetensors").unlink()
    with pytest.raises(InputError, match="without a classifier"):
        zoo.load_classifier("tiny-dit")


def test_a_folder_says_what_its_calls_are_given(shelf: Path) -> None:
    assert zoo.call_arguments("tiny-dit") == {}
    assert zoo.call_arguments("owner/name") == {}
    path = shelf / "tiny-dit" / "call.json"
    path.write_text('{"guidance_scale": 2.5}')
    assert zoo.call_arguments("tiny-dit") == zoo.call_arguments(str(path.parent)) == {"guidance_scale": 2.5}
    asked = Request("tiny-dit", ["cat"], [], None, 8, 0, None)
    assert asked.call(zoo.load("tiny-dit"))[0]["guidance_scale"] == 2.5
    asked = Request("tiny-dit", ["cat"], [], None, 8, 0, 3.0)
    assert asked.call(zoo.load("tiny-dit"))[0]["guidance_scale"] == 3.0, "what is asked for goes first"
    for broken in ("{", "[1]"):
        path.write_text(broken)
        with pytest.raises(InputError, match="mend it or delete it"):
            zoo.call_arguments("tiny-dit")


def test_resolve_takes_a_bundled_name_and_a_folder(shelf: Path) -> None:
    assert isinstance(zoo.resolve("tiny-dit"), diffusers.DiTPipeline)
    assert isinstance(zoo.resolve(str(shelf / "tiny-dit")), diffusers.DiTPipeline)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("tiny-dti", "did you mean 'tiny-dit'"),
        ("./missing/", "no bundled model, no folder and no hub id"),
        ("a/b/c", "no bundled model, no folder and no hub id"),
        ("nobody/nothing", "check the spelling, the network, HF_HUB_OFFLINE"),
    ],
)
def test_resolve_refuses_what_is_no_model(shelf: Path, model: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        zoo.resolve(model)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (None, "holds no model_index.json"),
        ("{", "is not valid JSON"),
        ("{}", "does not name a pipeline class"),
        ('{"_class_name": "NoSuchPipeline"}', "does not load as a diffusers pipeline"),
        ('{"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"]}', "does not load as a diffusers"),
    ],
)
def test_resolve_refuses_a_broken_folder(tmp_path: Path, index: str | None, sentence: str) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(InputError, match=sentence):
        zoo.resolve(str(tmp_path))


def test_resolve_refuses_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(InputError, match="is a file; give the pipeline's folder"):
        zoo.resolve(str(path))


# -- the real thing -----------------------------------------------------------------------------------
def test_fashion_dit_comes_with_the_package() -> None:
    card = {card.name: card for card in zoo.models()}["fashion-dit"]
    assert card.pipeline == "DiTPipeline"
    assert card.bytes <= 15 * 2**20
    assert card.licence
    assert card.makes
    assert card.scores["agreement"] >= 0.85
    assert card.scores["classifier_accuracy"] >= 0.90


def test_fashion_dit_draws_what_is_asked() -> None:
    pipe = zoo.load("fashion-dit")
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe.transformer.transformer_blocks) >= 16
    assert sorted(pipe.labels.values()) == list(range(10))
    assert pipe.labels["ankle boot"] == 9
    seeds = [torch.Generator().manual_seed(k) for k in range(10)]
    out = pipe(class_labels=list(range(10)), generator=seeds, num_inference_steps=20, output_type="np")
    images = torch.from_numpy(out.images).permute(0, 3, 1, 2)
    assert images.shape == (10, 1, 28, 28)
    guessed = zoo.load_classifier("fashion-dit")(images * 2 - 1).argmax(1)
    assert (guessed == torch.arange(10)).sum() >= 7
