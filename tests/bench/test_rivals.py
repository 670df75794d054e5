"""Rivals that patch the blocks of transformers say so where there are none."""

from __future__ import annotations

from typing import Any

import pytest

from speca import InputError
from speca.bench import modules, rivals
from speca.zoo import load

METHODS: dict[str, Any] = {
    "faster-cache": rivals.diffusers_cache(rivals.faster),
    "taylor-modules": modules.per_module(lambda _: modules.VerifiedConfig(), 1),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_unet_has_no_blocks_to_patch(name: str) -> None:
    with (
        pytest.raises(InputError, match="StableDiffusionPipeline has no transformer, whose blocks this method patches"),
        METHODS[name](load("emoji-unet"), {}, 2),
    ):
        pass
