"""calibrate for one's own loop: a `Denoiser` and a function from seeds to samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import speca

STEPS = 24
TIMES = torch.linspace(1, 0, STEPS + 1)
MIX = torch.randn((8, 8), generator=torch.Generator().manual_seed(0)) / 2


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x @ MIX + 2 * t.view(-1, 1)) + x * t.view(-1, 1)


def euler(denoise: object, x: Tensor, times: Tensor) -> Tensor:
    for i in range(len(times) - 1):
        x = x + denoise(x, times[i].expand(len(x))) * (times[i + 1] - times[i])  # type: ignore[operator]
    return x


def noise(seeds: list[int]) -> Tensor:
    return torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(s)) for s in seeds])


def denoiser(**settings: object) -> speca.Denoiser:
    return speca.Denoiser(velocity, sampler=euler, sigmas=TIMES, prediction="velocity", **settings)  # type: ignore[arg-type]


def test_a_loop_is_calibrated_and_its_file_serves_it(tmp_path: Path) -> None:
    denoise = denoiser()
    before = denoise.config
    found = speca.calibrate(
        denoise, loop=lambda seeds: euler(denoise, noise(seeds), TIMES), target_psnr=40, samples=10, confidence=0.8
    )
    assert denoise.config == before and denoise.knowledge.given is None
    assert found.model == "velocity" and found.scheduler == "euler" and found.steps == STEPS
    assert found.fresh_median > 40 and len(found.trials) >= 2
    found.save(tmp_path / "loop.json")
    x = noise(list(range(16)))
    full = euler(velocity, x, TIMES)
    ours = denoiser(calibration=tmp_path / "loop.json")
    gap = (euler(ours, x, TIMES) - full).norm()
    spent = ours.report().samples[0].full
    assert spent < STEPS / 2
    blind = denoiser(speedup=STEPS / spent, prior="none")
    assert gap < (euler(blind, x, TIMES) - full).norm(), "what was measured helps"
    assert gap < (euler(velocity, x, torch.linspace(1, 0, spent + 1)) - full).norm()


def test_what_cannot_be_calibrated_says_what_to_pass() -> None:
    with pytest.raises(speca.InputError, match="pass loop="):
        speca.calibrate(denoiser())
    with pytest.raises(speca.InputError, match=r"make a speca\.Denoiser and pass it with loop="):
        speca.calibrate(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    denoise = denoiser()
    with pytest.raises(speca.InputError, match="one sample for each of 10 seeds"):
        speca.calibrate(denoise, loop=lambda seeds: torch.zeros(3, 8), samples=10)
    with pytest.raises(speca.InputError, match="No step was taken"):
        speca.calibrate(denoise, loop=noise, samples=10)


def test_a_run_inside_calibrating_is_learnt_from() -> None:
    denoise, x = denoiser(speedup=4), noise(list(range(8)))
    full = euler(velocity, x, TIMES)
    blind = (euler(denoise, x, TIMES) - full).norm()
    with speca.calibrating(denoise) as pending:
        with pytest.raises(speca.InputError, match="nothing was learnt"):
            _ = pending.calibration
        drawn = euler(denoise, noise([100]), TIMES)
    assert torch.equal(drawn, euler(velocity, noise([100]), TIMES)), "every step was computed"
    ours = denoiser(speedup=4, calibration=pending)
    assert (euler(ours, x, TIMES) - full).norm() < blind and ours.report().samples[0].full == STEPS // 4
    assert (euler(denoise, x, TIMES) - full).norm() == blind, "its own settings are back"
    with speca.calibrating(denoise) as nothing:
        pass
    with pytest.raises(speca.InputError, match="nothing was learnt"):
        denoiser(calibration=nothing)


def test_a_denoiser_can_learn_by_itself() -> None:
    denoise, x = denoiser(speedup=4, calibration="auto"), noise(list(range(8)))
    full = euler(velocity, x, TIMES)
    assert torch.equal(euler(denoise, x, TIMES), full)
    assert any("to learn from it" in note for note in denoise.report().notes)
    gap = (euler(denoise, x, TIMES) - full).norm()
    assert denoise.report().samples[0].full == STEPS // 4 and not denoise.report().notes
    assert gap < (euler(denoiser(speedup=4), x, TIMES) - full).norm()
