"""Shared fixtures: tiny random transformers and pipelines of the paper's three systems, built in memory."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # an accidental download fails at once
os.environ["SPECA_CACHE"] = ""  # nothing is learnt from a run, unless a test asks for it

import pytest
import torch

import tiny

FAR = "SPECA_FAR" in os.environ
collect_ignore = [] if FAR else ["far"]  # it gives torch another device, for good: `test_far.py` runs it in a process


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that start Ray run only with a `-m` that speaks of them (`make test-ray`)."""
    if "ray" not in config.option.markexpr:
        found = [item for item in items if item.get_closest_marker("ray")]
        config.hook.pytest_deselected(items=found)
        items[:] = [item for item in items if item not in found]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=tiny.PIPELINES, ids=list(tiny.PIPELINES))
def case(request: pytest.FixtureRequest) -> tiny.Case:
    """One tiny pipeline with the arguments of a short call; each of the paper's systems in turn."""
    return tiny.PIPELINES[request.param]()
