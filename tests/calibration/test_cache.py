"""What a machine has learnt: found again by other processes, not by other models, and never an obstacle."""

from __future__ import annotations

import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

import tiny
from speca.calibration.cache import MOST_RUNS, PriorCache, default_folder, fingerprint
from speca.core.prior import Prior

NOISE = (1.0, 0.6, 0.2)


def prior(scale: float = 1.0, noise: tuple[float, ...] = NOISE) -> Prior:
    return Prior(noise, scale * (np.eye(len(noise)) + 1.0))


def add_many(folder: Path, scale: float) -> None:
    for _ in range(4):
        PriorCache(folder).add(("model", "kind"), prior(scale))


def test_another_process_finds_it_and_two_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=add_many, args=(tmp_path, scale)) for scale in (1.0, 3.0)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = PriorCache(tmp_path).find(("model", "kind"), NOISE)
    assert found is not None and np.allclose(found.moments, prior(2.0).moments)
    assert len(list(tmp_path.glob("*/*.json"))) == 8 and not list(tmp_path.glob("*/*.part"))


def test_it_belongs_to_its_key(tmp_path: Path) -> None:
    PriorCache(tmp_path).add(("model", "kind"), prior())
    assert PriorCache(tmp_path).find(("model", "other kind"), NOISE) is None
    assert PriorCache(tmp_path / "elsewhere").find(("model", "kind"), NOISE) is None


def test_runs_of_the_same_steps_count_alone_and_others_serve_until_there_are_any(tmp_path: Path) -> None:
    cache, five = PriorCache(tmp_path), (1.0, 0.8, 0.6, 0.4, 0.2)
    cache.add(("m",), prior(4.0, five))
    taken = cache.find(("m",), NOISE)
    assert taken is not None and len(taken.at(NOISE).noise) == 3
    cache.add(("m",), prior(1.0))
    own = cache.find(("m",), NOISE)
    assert own is not None and np.allclose(own.moments, prior(1.0).moments)


def test_a_folder_does_not_grow_without_end(tmp_path: Path) -> None:
    for _ in range(MOST_RUNS + 3):
        PriorCache(tmp_path).add(("m",), prior())
    assert len(list(tmp_path.glob("*/*.json"))) == MOST_RUNS


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1, "prior": {}}', "\x00\xff"])
def test_damaged_files_are_left_out_with_one_line(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = PriorCache(tmp_path)
    cache.add(("m",), prior())
    folder = next(tmp_path.iterdir())
    (folder / "damaged.json").write_text(text, encoding="latin-1")
    (folder / "half.part").write_text('{"format": 1')
    with caplog.at_level(logging.WARNING, "speca"):
        found = cache.find(("m",), NOISE)
    assert found is not None and np.allclose(found.moments, prior().moments)
    assert len(caplog.records) == 1 and "damaged.json" in caplog.text


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = PriorCache(tmp_path / "file")  # a file where the folder should be, as root may write to any folder
    with caplog.at_level(logging.INFO, "speca"):
        cache.add(("m",), prior())
    assert cache.find(("m",), NOISE) is not None, "it is kept in memory"
    assert PriorCache(tmp_path / "file").find(("m",), NOISE) is None and "cannot be written" in caplog.text


def test_the_folder_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECA_CACHE", os.fspath(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.setenv("SPECA_CACHE", "")
    assert default_folder() is None and PriorCache(None).find(("m",), NOISE) is None
    monkeypatch.delenv("SPECA_CACHE")
    assert "speca" in os.fspath(default_folder() or "")


def test_a_fingerprint_tells_models_apart() -> None:
    def linear(seed: int, width: int = 4) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(3, width)

    assert fingerprint(linear(0)) == fingerprint(linear(0))
    assert len({fingerprint(linear(0)), fingerprint(linear(1)), fingerprint(linear(0, 5))}) == 3
    assert fingerprint(linear(0).half()) != fingerprint(linear(0))


def test_a_lora_and_its_scale_are_part_of_a_fingerprint() -> None:
    model = tiny.flux().pipe.transformer
    found = [fingerprint(model)]
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    found.append(fingerprint(model))
    model.set_adapters(["default"], [0.5])
    found.append(fingerprint(model))
    model.disable_adapters()
    found.append(fingerprint(model))
    assert len(set(found)) == 4


class Sealed(torch.Tensor):
    """A tensor that hands out no element, as some quantized and sharded ones."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            raise NotImplementedError("no element of it")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_that_cannot_be_looked_at_count_by_shape() -> None:
    def model(size: int) -> nn.Module:
        made = nn.Linear(size, 2)
        made.weight = nn.Parameter(torch.randn(2, size).as_subclass(Sealed), requires_grad=False)
        made.bias.data.zero_()
        return made

    assert fingerprint(model(3)) == fingerprint(model(3)) != fingerprint(model(4))
