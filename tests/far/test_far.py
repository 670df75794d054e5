"""Whole pipelines on a device that is not there: nothing mixes devices, and the host reads what reports say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_gpu
import pytest
import torch

import speca
import tiny
from far import device
from far.device import Far, move
from pipelines.cases import RECIPES
from speca import zoo
from speca.engine import Engine
from speca.reports import comparison
from speca.sampler import scheduler

SEEDS = [3, 8]
FILES = {path.name for path in Path(speca.__file__).parent.rglob("*.py")} - {"__init__.py"}
AHEAD = "history.py: return (found.pin_memory() if ahead else found).to(device, non_blocking=ahead)"
"""The one line that brings numbers to a device; on CUDA without waiting."""
AT_FIRST = 3
"""Reads at the beginning of a run: timesteps and sigmas of its scheduler. They do not grow with its steps."""


def of_ours(lines: list[str]) -> list[str]:
    return [line for line in lines if line.partition(":")[0] in FILES]


def moved(case: tiny.Case) -> tiny.Case:
    """The same pipeline on the device, and its conditions with it; what was found of its scheduler is forgotten."""
    scheduler._found.cache_clear()
    for part in case.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            move(part)
    return tiny.Case(case.pipe, move(case.arguments), lambda seeds: move(case.conditions(seeds)))


def run(case: tiny.Case, steps: int = tiny.STEPS) -> tuple[torch.Tensor, speca.Report]:
    torch.manual_seed(0)  # autoencoders draw from it
    made = case(SEEDS, steps=steps)
    return made.cpu(), speca.report(case.pipe)


def demand_same(near: torch.Tensor, far: torch.Tensor) -> None:
    assert (near - far).abs().max() <= 1e-4 * near.abs().max()


# ------------------------------------------------------------------------------------------------ the device itself
def test_the_device_refuses_a_mixture_and_notes_what_is_read() -> None:
    there, here = torch.ones(2, device="far"), torch.ones(2)
    assert isinstance(there, Far) and there.device.type == "far" and (there * 2.0)[0].shape == ()
    for mixed in (lambda: there + here, lambda: there.add_(here), lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    device.reads.clear()
    device.puts.clear()
    moved_there = here.to("far") * there[torch.tensor([0, 1])]
    moved_there[0] = 5.0
    assert not device.reads
    assert float(there[0]) == 1.0 and there.tolist() == [1.0, 1.0] and bool((there == 1).all())
    assert [line[:12] for line in device.puts] == ["test_far.py:"]
    assert torch.equal(moved_there.cpu(), torch.tensor([5.0, 1.0])) and there.sum().item() == 2.0
    assert [line[:12] for line in device.reads] == ["test_far.py:"] * 5
    device.doubles.clear()
    assert there.double().dtype == torch.float64 and len(device.doubles) == 1


# ------------------------------------------------------------------------------------------------ pipelines
@pytest.mark.parametrize("name", RECIPES)
def test_a_pipeline_does_there_what_it_does_here(name: str) -> None:
    """Same decisions and numbers; and what the host reads beyond the pipeline's own does not grow with the steps."""
    case = RECIPES[name].build()
    speca.enable(case.pipe, speedup=2.5)
    near, expected = run(case)
    speca.disable(case.pipe)
    far = moved(case)
    speca.enable(far.pipe, speedup=2.5)
    made, found = run(far)
    demand_same(near, made)
    assert [s.decisions for s in found.samples] == [s.decisions for s in expected.samples]
    assert found.notes == expected.notes
    device.reads.clear()
    device.puts.clear()
    device.doubles.clear()
    _, again = run(far)
    assert not of_ours(device.doubles)
    assert set(of_ours(device.puts)) <= {AHEAD}
    known = [line for line in of_ours(device.reads) if line.startswith("executor.py")]
    assert len(known) <= again.host_reads <= len(known) + 2
    assert len(of_ours(device.reads)) - len(known) <= AT_FIRST


@pytest.mark.parametrize("name", tiny.PIPELINES)
@pytest.mark.parametrize("kind", ["all rejected", "some rejected"])
def test_rows_are_picked_and_put_back_there(name: str, kind: str) -> None:
    case = tiny.PIPELINES[name]()
    settings: dict[str, Any] = dict(threshold=0.0, min_draft=0, max_draft=4)
    if kind == "some rejected":
        speca.enable(case.pipe, tiny.VERIFYING, **{**settings, "threshold": 1e9})
        run(case)
        settings["threshold"] = tiny.threshold_in_a_gap(case)
    speca.enable(case.pipe, tiny.VERIFYING, **settings)
    near, expected = run(case)
    speca.disable(case.pipe)
    far = moved(case)
    speca.enable(far.pipe, tiny.VERIFYING, **settings)
    made, found = run(far)
    demand_same(near, made)
    decisions = [s.decisions for s in found.samples]
    assert decisions == [s.decisions for s in expected.samples]
    assert "R" in "".join(decisions) and ("A" in "".join(decisions)) == (kind == "some rejected")


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_a_prior_drafts_and_corrects_there(name: str) -> None:
    """Drafts of the output, placed by the sampler alone; so the host need not know a single number."""
    case = tiny.PIPELINES[name]()
    settings: dict[str, Any] = dict(speedup=3.0, prior="generic")
    speca.enable(case.pipe, **settings)
    near, expected = run(case)
    speca.enable(case.pipe, **{**settings, "corrector": False})
    uncorrected, _ = run(case)
    speca.disable(case.pipe)
    far = moved(case)
    speca.enable(far.pipe, **settings)
    made, found = run(far)
    demand_same(near, made)
    # Corrections are seen: leaving them out changes ten times more than `demand_same` allows.
    assert (uncorrected - near).abs().max() > 1e-3 * near.abs().max()
    assert found.samples == expected.samples and found.notes == expected.notes
    assert found.host_reads == expected.host_reads == 0


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_a_tolerance_reads_once_a_full_step(name: str) -> None:
    """And nothing at a draft: the host may be steps ahead of the device."""
    case = tiny.PIPELINES[name]()
    settings: dict[str, Any] = dict(tolerance=1.0, prior="none")
    speca.enable(case.pipe, **settings)
    near, expected = run(case)
    speca.disable(case.pipe)
    far = moved(case)
    speca.enable(far.pipe, **settings)
    device.reads.clear()
    made, found = run(far)
    demand_same(near, made)
    assert [s.decisions for s in found.samples] == [s.decisions for s in expected.samples]
    known = [line for line in of_ours(device.reads) if line.startswith("executor.py")]
    branches = 2 if name == "hunyuan-video-cfg" else 1
    full = sum("F" in {s.decisions[step] for s in found.samples} for step in range(tiny.STEPS))
    assert len(known) <= found.host_reads <= branches * (full - 1) < branches * tiny.STEPS
    assert len(of_ours(device.reads)) - len(known) <= AT_FIRST


def test_the_step_is_known_without_reading_it() -> None:
    """`DiTPipeline` copies each timestep to the device, and its scheduler keeps no index: the loop is asked."""
    case = moved(tiny.dit())
    speca.enable(case.pipe, speedup=2.5)
    run(case)
    counts = []
    for steps in (14, 40):
        device.reads.clear()
        run(case, steps)
        counts.append(sum(not line.startswith("executor.py") for line in of_ours(device.reads)))
    assert counts[0] == counts[1]


def test_an_engine_serves_there() -> None:
    case = tiny.hunyuan_video()

    def served(put: Callable[[Any], Any]) -> list[torch.Tensor]:
        asked = [
            dict(**put(case.arguments), **put(case.conditions([seed])), num_inference_steps=steps,
                 generator=torch.Generator().manual_seed(seed))
            for seed, steps in ((3, 9), (8, 12))
        ]  # fmt: skip
        with Engine(case.pipe) as engine:
            return [result.output[0] for result in sorted(engine.generate(asked), key=lambda r: r.index)]

    near = served(lambda value: value)
    moved(case)
    for one, other in zip(near, served(move), strict=True):
        assert isinstance(other, Far)
        demand_same(one, other.cpu())


def test_an_offloaded_pipeline_drafts_there() -> None:
    case = tiny.flux()
    speca.enable(case.pipe, speedup=2.5)
    near, expected = run(case)
    speca.disable(case.pipe)
    case.pipe.enable_model_cpu_offload(device="far")
    speca.enable(case.pipe, speedup=2.5)
    far, found = run(tiny.Case(case.pipe, case.arguments, lambda seeds: move(case.conditions(seeds))))
    demand_same(near, far)
    assert found.samples[0].decisions == expected.samples[0].decisions
    assert case.transformer.device.type == "cpu", "it has gone home"


def test_a_model_is_calibrated_and_compared_there() -> None:
    pipe = zoo.load("fashion-dit", device="far")
    pipe.set_progress_bar_config(disable=True)
    call = dict(class_labels=[0, 1, 2, 3], num_inference_steps=12)
    found = speca.calibrate(pipe, call, target_psnr=20.0, samples=2, confidence=0.6, batch=2)
    made = comparison.compare(pipe, {**call, "class_labels": [4, 5]}, [0, 1], batch=2, calibration=found)
    assert 1.2 < found.speedup < 12
    assert made.report.flops_speedup == pytest.approx(found.speedup, rel=0.1)
    assert min(made.psnr) > 12 and made.full.hardware["device"] == "far"


def test_the_gpu_suite_runs_there(tmp_path: Path) -> None:
    """Full, draft and rejected steps of DiT, the authors' layout and the rivals, in toy sizes."""
    wanted = {"full", "speca", "module caches (the authors' layout)", "diffusers TaylorSeer"}
    for minutes in (0.5, 4.0):  # a busy machine leaves out what half a minute has no time for
        bench_gpu.main(tmp_path / "gpu.json", minutes=minutes, tiny=True, device="far", repeats=1)
        found = json.loads((tmp_path / "gpu.json").read_text())
        rows = [row for model in found["models"] for row in model["rows"]]
        reasons = [row["reason"] for row in rows if "reason" in row]
        assert not [reason for reason in reasons if "cache-dit is not installed" not in reason], reasons
        if wanted <= {row["method"] for row in rows}:
            return
    raise AssertionError(f"of {wanted} not all were run")
