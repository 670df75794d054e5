"""One server for all tests that only use it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serve.served import Served, serving
from speca.serve.settings import Limits, ModelConfig, ServerConfig

STEPS = 12


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of three bundled models with few steps."""
    config = ServerConfig(
        models=tuple(ModelConfig(model=name) for name in ("emoji-flux", "fashion-dit", "emoji-video")),
        steps=STEPS, jobs=tmp_path_factory.mktemp("jobs"), threads=1, limits=Limits(steps=60),
    )  # fmt: skip
    with serving(config) as found:
        yield found
