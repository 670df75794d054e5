"""Learning by itself: the first run of a kind in full, later ones by what it showed, here and in other processes."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig

import speca
import tiny
from speca.calibration.knowledge import MOST_REJECTIONS
from speca.core.prior import Prior
from speca.diffusers.enable import accelerators_of
from speca.reports.comparison import psnr
from speca.zoo import call_arguments, load

STEPS = 20
TO_LEARN = "to learn from it"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for what is learnt."""
    monkeypatch.setenv("SPECA_CACHE", str(tmp_path / "cache"))
    warnings.filterwarnings("ignore", message="speca:")
    return tmp_path / "cache"


def full_steps(case: tiny.Case, seeds: list[int] | None = None, **how: Any) -> int:
    """Steps that each sample of a run has in full."""
    case(seeds or [3, 8], steps=how.pop("steps", STEPS), **how)
    (count,) = {sample.full for sample in speca.report(case.pipe).samples}
    return count


def learns(case: tiny.Case) -> bool:
    return any(TO_LEARN in note for note in speca.report(case.pipe).notes)


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_the_first_run_is_in_full_and_the_second_knows(name: str) -> None:
    case = tiny.PIPELINES[name]()
    plain, step = case([3, 8], steps=STEPS), case.pipe.scheduler.step
    speca.enable(case.pipe, speedup=4)
    with pytest.warns(UserWarning, match=TO_LEARN):
        first = case([3, 8], steps=STEPS)
    assert torch.equal(first, plain), "the run that is learnt from is that of the pipeline"
    assert learns(case) and case.pipe.scheduler.step == step and "step" not in vars(case.pipe.scheduler)
    second = case([3, 8], steps=STEPS)
    assert not learns(case) and {s.full for s in speca.report(case.pipe).samples} == {STEPS // 4}
    speca.enable(case.pipe, speedup=4, calibration=False)
    blind = case([3, 8], steps=STEPS)
    assert (second - plain).norm() < (blind - plain).norm(), "what was learnt helps"


def test_the_prior_is_that_of_what_guidance_makes_of_the_branches(cache: Path) -> None:
    """Two calls a step: what counts is what the scheduler is given."""
    case, given = tiny.hunyuan_video(true_cfg=True), list[torch.Tensor]()
    step = case.pipe.scheduler.step

    def noted(output: torch.Tensor, *rest: Any, **more: Any) -> Any:
        given.append(output.double().flatten(1))
        return step(output, *rest, **more)

    case.pipe.scheduler.step = noted
    case([3], steps=STEPS)
    del case.pipe.scheduler.step
    speca.enable(case.pipe, speedup=4)
    case([3], steps=STEPS)
    (file,) = cache.glob("*/*.json")
    outputs = torch.stack(given, 1)[0]
    found = Prior.from_dict(json.loads(file.read_text())["prior"]).moments
    torch.testing.assert_close(torch.from_numpy(found), outputs @ outputs.T / outputs.shape[1], rtol=1e-4, atol=1e-5)


def test_another_process_knows_it_and_other_weights_do_not() -> None:
    case = tiny.flux()
    speca.enable(case.pipe, speedup=4)
    assert full_steps(case) == STEPS
    program = (
        "import sys, warnings; sys.path.insert(0, 'tests'); warnings.simplefilter('ignore')\n"
        "import speca, tiny\n"
        "case = tiny.flux()\n"
        "speca.enable(case.pipe, speedup=4)\n"
        f"case([3, 8], steps={STEPS})\n"
        "print(speca.report(case.pipe).samples[0].full)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(STEPS // 4)
    other = tiny.flux()
    other.transformer.transformer_blocks[0].attn.to_q.weight.data += 0.1
    speca.enable(other.pipe, speedup=4)
    assert full_steps(other) == STEPS


def test_an_adapter_is_another_model() -> None:
    case = tiny.flux()
    speca.enable(case.pipe, speedup=4)
    assert [full_steps(case), full_steps(case)] == [STEPS, STEPS // 4]
    case.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    assert [full_steps(case), full_steps(case)] == [STEPS, STEPS // 4]
    case.transformer.disable_adapters()
    assert full_steps(case) == STEPS, "adapters that are switched off are none that were learnt with"


def test_each_kind_of_call_is_learnt_by_itself() -> None:
    """Guidance in two calls is another kind than none, and so is another size; another number of steps is not."""
    case = tiny.hunyuan_video()
    speca.enable(case.pipe, speedup=4)
    assert [full_steps(case), full_steps(case)] == [STEPS, STEPS // 4]
    assert full_steps(case, steps=28) == 7
    guided = tiny.hunyuan_video(true_cfg=True).conditions([3, 8])
    assert full_steps(case, true_cfg_scale=3.0, **guided) == STEPS
    assert full_steps(case, true_cfg_scale=3.0, **guided) == STEPS // 4
    assert full_steps(case, num_frames=17) == STEPS
    assert full_steps(case) == STEPS // 4


def test_a_run_that_is_broken_off_teaches_nothing() -> None:
    case = tiny.flux()
    speca.enable(case.pipe, speedup=4)

    def stop(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 9:
            raise KeyboardInterrupt
        return given

    with pytest.raises(KeyboardInterrupt):
        case([3], steps=STEPS, callback_on_step_end=stop)
    accelerators_of(case.pipe)[0].end()
    assert "step" not in vars(case.pipe.scheduler)
    assert full_steps(case) == STEPS and full_steps(case) == STEPS // 4


def test_nothing_is_learnt_where_it_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    for how in ({"calibration": False}, {"calibration": None}, {"prior": "none"}, {"preset": "paper"}):
        case = tiny.flux()
        speca.enable(case.pipe, **how)
        case([3, 8], steps=STEPS)
        assert not learns(case) and not cache.exists()
    monkeypatch.setenv("SPECA_CACHE", "")
    case = tiny.flux()
    speca.enable(case.pipe, speedup=4)
    assert full_steps(case) == STEPS // 4


def test_a_folder_that_cannot_be_written_is_learnt_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECA_CACHE", str(tmp_path / "file" / "folder"))
    case = tiny.flux()
    speca.enable(case.pipe, speedup=4)
    assert [full_steps(case), full_steps(case)] == [STEPS, STEPS // 4]


def test_a_sampler_of_which_nothing_can_be_learnt_is_no_hindrance() -> None:
    case = tiny.dit()
    case.pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        case.pipe.scheduler.config, thresholding=True
    )
    speca.enable(case.pipe, speedup=4)
    assert full_steps(case) == STEPS // 4 and not learns(case)


def test_one_s_own_loop_learns_too() -> None:
    model, scheduler = tiny.dit_transformer(), diffusers.DDIMScheduler(clip_sample=False)
    noise, labels = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])

    def loop() -> tuple[torch.Tensor, int]:
        scheduler.set_timesteps(STEPS)
        x, before = noise, computed[0]
        for t in scheduler.timesteps:
            out = model(x, timestep=t.expand(2), class_labels=labels).sample
            x = scheduler.step(out.chunk(2, 1)[0], t, x).prev_sample
        return x, computed[0] - before

    computed = [0]
    model.pos_embed.register_forward_hook(lambda *_: computed.__setitem__(0, computed[0] + 1))
    plain, _ = loop()
    speca.enable(model, scheduler=scheduler, speedup=4)
    first, count = loop()
    assert torch.equal(first, plain) and count == STEPS
    second, count = loop()
    assert count == STEPS // 4 and (second - plain).norm() < 0.2 * plain.norm()
    speca.disable(model)
    assert "step" not in vars(scheduler)
    with speca.calibrating(model, scheduler=scheduler) as pending:
        assert torch.equal(loop()[0], plain)
    assert pending.calibration.model == "DiTTransformer2DModel" and pending.calibration.scheduler == "DDIMScheduler"
    speca.enable(model, scheduler=scheduler, num_inference_steps=STEPS, speedup=4, calibration=pending)
    assert loop()[1] == STEPS // 4


def test_a_prior_that_does_not_hold_is_done_without_and_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here of outputs that hardly change, given to a model whose outputs do."""
    case = tiny.flux()
    noise = tuple(1 - i / STEPS for i in range(STEPS))
    still = torch.ones(STEPS, STEPS, dtype=torch.float64) + 1e-7 * torch.eye(STEPS, dtype=torch.float64)
    wrong = Prior(noise, still.numpy())
    speca.enable(case.pipe, speedup=4, calibration=wrong)
    case([3, 8], steps=STEPS)
    report = speca.report(case.pipe)
    assert any("does not hold for some samples" in note for note in report.notes)
    assert {s.full for s in report.samples} == {STEPS // 4}, "within the same budget"
    case([3, 8], steps=STEPS)
    assert any("not used: full steps of an earlier run" in note for note in speca.report(case.pipe).notes)
    speca.enable(case.pipe, tolerance=0.02, calibration=wrong)
    case([3, 8], steps=STEPS)
    assert all(s.full > 5 for s in speca.report(case.pipe).samples), "planned by errors from there on"


def test_what_keeps_failing_is_not_learnt_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speca.denoiser.run.SURPRISE_LIMIT_OF_BUDGET", 0.0)
    case = tiny.flux()
    speca.enable(case.pipe, speedup=4)
    done = [full_steps(case) for _ in range(2 * MOST_REJECTIONS + 2)]
    assert done[:4] == [STEPS, STEPS // 4, STEPS, STEPS // 4], "it is learnt again after it did not hold"
    assert done[-2:] == [STEPS // 4] * 2


def test_a_calibration_of_other_guidance_is_not_used() -> None:
    """As `emoji-flux` ships: measured without true guidance, and called with it."""
    pipe = load("emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = dict(prompt="a red apple", num_inference_steps=16, output_type="latent")

    def drawn(**how: Any) -> tuple[torch.Tensor, speca.Report]:
        speca.enable(pipe, calibration=how.pop("calibration", None))
        generator = torch.Generator().manual_seed(1)
        return pipe(**call_arguments("emoji-flux"), **call, **how, generator=generator).images, speca.report(pipe)

    _, report = drawn()
    assert not report.notes
    guided = dict(true_cfg_scale=3.0, negative_prompt="a house")
    made, report = drawn(**guided)
    assert any("measured with another kind of guidance" in note for note in report.notes)
    blind, without = drawn(calibration=False, **guided)
    torch.testing.assert_close(made, blind, rtol=1e-4, atol=1e-4)
    assert report.samples == without.samples


@pytest.mark.parametrize("change", ["size", "shift"])
def test_a_calibration_helps_at_another_size_and_shift(change: str) -> None:
    pipe = load("emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    call = {**call_arguments("emoji-flux"), "prompt": ["a red apple", "a boat"], "num_inference_steps": 28}
    if change == "size":
        call |= {"height": 96, "width": 96}
    else:
        config = {**pipe.scheduler.config, "shift": 8.0, "use_dynamic_shifting": False}
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)

    def drawn() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return torch.as_tensor(pipe(**call, generator=generators, output_type="np").images)

    whole, found = drawn(), {}
    for calibration in (None, False):
        speca.enable(pipe, speedup=3, calibration=calibration)
        found[calibration] = psnr(drawn(), whole).min().item()
        speca.disable(pipe)
    assert found[None] > 35 and found[None] > found[False]


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_online_the_first_run_has_every_third_step_in_full_and_teaches_all_the_same(name: str, cache: Path) -> None:
    case = tiny.PIPELINES[name]()
    speca.enable(case.pipe, speedup=4, calibration="online")
    with pytest.warns(UserWarning, match="at least every third step of this run is computed"):
        assert full_steps(case, steps=24) == 8
    assert full_steps(case, steps=24) == 6 and not learns(case)
    (file,) = cache.glob("*/*.json")
    assert len(json.loads(file.read_text())["prior"]["noise"]) == 24, "the steps between were filled in"
    speca.enable(case.pipe, speedup=4)
    assert full_steps(case, steps=24) == 24, "who asks for a full run is not given less"
