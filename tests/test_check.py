"""check: what it finds is what a run does."""

from __future__ import annotations

import json

import pytest

import speca
import tiny
from speca.pipeline import ATTRIBUTE

FOUND = {
    "dit": ("transformer_blocks x 4", "transformer_blocks.3", {"hidden_states"}),
    "flux": (
        "transformer_blocks x 2, single_transformer_blocks x 3",
        "single_transformer_blocks.2",
        {"hidden_states", "encoder_hidden_states"},
    ),
    "hunyuan-video": (
        "transformer_blocks x 2, single_transformer_blocks x 3",
        "single_transformer_blocks.2",
        {"hidden_states", "encoder_hidden_states"},
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_check_tells_what_was_discovered(name: str) -> None:
    case = tiny.PIPELINES[name]()
    found = speca.check(case.pipe, lambda: case([1], steps=8))
    assert found.supported and found.self_test.startswith("passed")
    assert (found.blocks, found.verify_block, set(found.state)) == FOUND[name]
    assert found.flops_full is not None and found.flops_draft is not None
    assert 0 < found.flops_draft < found.flops_full
    assert ATTRIBUTE not in case.transformer.__dict__
    json.dumps(found.to_dict())
    assert found.verify_block in str(found)


def test_memory_per_sample_is_that_of_a_run(case: tiny.Case) -> None:
    found = speca.check(case.pipe, lambda: case([1], steps=8), "fast", order=2, warmup=3)
    speca.enable(case.pipe, "fast", order=2, warmup=3)
    case([3, 4, 5])
    assert found.bytes_per_sample == speca.report(case.pipe).bytes_per_sample


def test_an_unsupported_model_says_why() -> None:
    case = tiny.dit()
    found = speca.check(case.pipe, lambda: case([1], steps=3))
    assert not found.supported and "3 steps" in found.reason
    assert "runs plainly" in str(found)
