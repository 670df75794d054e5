"""A quick part of the sweep over diffusers' transformer classes; `make sweep` runs all of it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tokenizers
import transformers
from typer.testing import CliRunner

import tiny
from speca.cli.main import app
from speca.denoiser.arguments import CACHE_ARGUMENTS, TIME_ARGUMENTS
from sweep.cases import CASES, REASONS, Case
from sweep.checks import Result, build, check, classes, untested
from sweep.table import FIRST, PAGE, page

SLICE = [case for case in CASES if case.slice]
TESTED = (re.findall(r"diffusers (\d+\.\d+\.\d+)", PAGE.read_text(encoding="utf-8")) or ["none"])[0]
SAME = pytest.mark.skipif(diffusers.__version__ != TESTED, reason=f"docs/models.md is of diffusers {TESTED}")


@pytest.mark.parametrize("case", SLICE, ids=[case.name for case in SLICE])
def test_a_class_is_exact_and_forecast_and_restored_and_rows_do_not_touch_each_other(case: Case) -> None:
    result = check(case)
    assert result.failures == []
    assert result.accelerated, "its outputs are forecast"
    assert result.verified != bool(case.plain)


def test_the_quick_part_holds_what_is_unusual() -> None:
    assert {case.cls for case in SLICE} >= set(FIRST)
    assert any(case.plain for case in SLICE) and any(case.rows == 1 for case in SLICE)
    assert len({case.cls for case in SLICE}) >= 12


@SAME
def test_every_class_is_configured_or_has_a_reason() -> None:
    assert untested() == []
    named = {case.cls for case in CASES} | set(REASONS)
    assert sorted(named - set(classes())) == [], "no longer in diffusers"
    assert sorted({case.cls for case in CASES} & set(REASONS)) == []


def test_a_new_class_is_reported_as_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    class NewTransformer3DModel(diffusers.ModelMixin):
        pass

    known = {**classes(), "NewTransformer3DModel": NewTransformer3DModel}
    monkeypatch.setattr("sweep.checks.classes", lambda: known)
    assert "NewTransformer3DModel" in untested()
    assert "| `NewTransformer3DModel` | **untested**" in page([])


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in CASES]
    assert sorted(names) == sorted(set(names))


@SAME
def test_the_page_is_in_step_with_the_table() -> None:
    """Facts of the table as they are, and nothing failed; what was found is as new as the last `make sweep`."""
    text = PAGE.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)`( \([^|]*\))? \|(.*)\|$", text, re.MULTILINE)
    assert sorted(name + variant for name, variant, _ in listed) == sorted([c.name for c in CASES] + list(REASONS))
    rows = {name + variant: rest for name, variant, rest in listed}
    for case in CASES:
        assert case.guidance in rows[case.name] and case.note in rows[case.name], case.name
    for name, reason in REASONS.items():
        assert reason in rows[name]
    assert [name for name, _, _ in listed[:3]] == list(FIRST)
    assert "**failed**" not in text and "untested" not in text


def test_a_failed_check_is_seen_on_the_page() -> None:
    case = SLICE[0]
    failed = page([Result(case, failures=["bit-identical at threshold 0"], forecast=True)])
    assert (
        "**failed**: bit-identical" in failed and "**0 of 1 are exact" in failed and "the outputs of 0 of 1" in failed
    )


def words(length: int) -> Any:
    """A tokenizer that knows three words, and texts of `length` tokens."""
    known = {"<pad>": 0, "<unk>": 1, "a": 2, "photo": 3}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", unk_token="<unk>", eos_token="<unk>", model_max_length=length
    )


def clip(width: int) -> Any:
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=4, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip


def dit_pipeline(case: Case) -> Any:
    # The pipeline's empty class is number 1000; the tiny model of the sweep has fewer.
    model = build(dataclasses.replace(case, config={**case.config, "num_embeds_ada_norm": 1000}))
    return diffusers.DiTPipeline(model, tiny.vae(), diffusers.DDIMScheduler())


def flux_pipeline(case: Case) -> Any:
    t5 = transformers.T5Config(
        vocab_size=4, d_model=12, d_kv=6, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=tiny.vae(), transformer=build(case),
        text_encoder=clip(10), tokenizer=words(77), text_encoder_2=transformers.T5EncoderModel(t5),
        tokenizer_2=words(512),
    )  # fmt: skip


def hunyuan_pipeline(case: Case) -> Any:
    llama = transformers.LlamaConfig(  # of its layers the pipeline leaves out the last two
        vocab_size=4, hidden_size=12, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(llama), tokenizer=words(512), transformer=build(case),
        vae=tiny.hunyuan_video().pipe.vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=clip(8), tokenizer_2=words(77),
    )  # fmt: skip


FOLDERS = {
    "DiTTransformer2DModel": dit_pipeline,
    "FluxTransformer2DModel": flux_pipeline,
    "HunyuanVideoTransformer3DModel": hunyuan_pipeline,
}


@SAME
@pytest.mark.parametrize("name", FOLDERS)
def test_check_of_a_local_model_prints_the_facts_of_its_row(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    FOLDERS[name](case).save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    line = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{case.name}` |"))
    model, blocks, verify, state = (cell.strip().replace("`", "") for cell in line.split("|")[1:5])
    for head, fact in (("model", model), ("blocks", blocks), ("verify block", verify), ("state", state)):
        assert re.search(rf"^\s*{head}\s+{re.escape(fact)}\s*$", result.stdout, re.MULTILINE), (head, fact)


@SAME
def test_reasons_hold() -> None:
    """What a reason says of a forward is true of it."""
    for name, reason in REASONS.items():
        arguments = set(inspect.signature(classes()[name].forward).parameters)
        assert ("no timestep argument" in reason) <= (not arguments & set(TIME_ARGUMENTS)), name
        assert ("key-value cache" in reason) <= bool(arguments & CACHE_ARGUMENTS), name
