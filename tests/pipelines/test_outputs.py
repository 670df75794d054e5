"""What a model gives and what a pipeline makes of it: lists with one tensor a row, outputs whose sign is turned."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch

import speca
import tiny
from pipelines.cases import RECIPES

STEPS, SEEDS = 24, [3, 8]
SETTINGS = pytest.mark.parametrize(
    "settings",
    [
        dict(speedup=3.0, prior="none"),
        dict(speedup=3.0, prior="generic"),
        dict(speedup=3.0, prior="none", remembers=True),
        dict(preset="paper"),
    ],
    ids=["polynomials", "prior", "a sampler that remembers", "paper"],
)


class Listed(diffusers.FluxTransformer2DModel):
    """As Z-Image does it: a list of the samples' outputs."""

    @functools.wraps(diffusers.FluxTransformer2DModel.forward)  # what arguments are called is looked up
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (list(super().forward(*args, **kwargs)[0].unbind(0)),)


def looped(model: Any, settings: dict[str, Any], turn: float = 1.0) -> tuple[torch.Tensor, speca.Report]:
    """One's own sampling loop, which hands `turn` times the output to the sampler."""
    settings = {**settings}
    remembers = settings.pop("remembers", False)
    flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler = diffusers.UniPCMultistepScheduler(**flow) if remembers else diffusers.FlowMatchEulerDiscreteScheduler()
    speca.enable(model, scheduler=scheduler, **settings)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((16, 16), (6, 12), (10,)))
    places = dict(img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(6, 3), guidance=torch.full((2,), 3.5))
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = model(
                hidden_states=x, timestep=t.expand(2) / 1000, encoder_hidden_states=text, pooled_projections=pooled,
                return_dict=False, **places,
            )[0]  # fmt: skip
            out = torch.stack(out) if isinstance(out, list) else out
            x = scheduler.step(turn * out, t, x, return_dict=False)[0]
    return x, speca.report(model)


@SETTINGS
def test_a_list_of_outputs_is_corrected_as_one_tensor_is(settings: dict[str, Any]) -> None:
    plain, listed = tiny.flux_transformer(), Listed.from_config(tiny.flux_transformer().config).eval()
    listed.load_state_dict(plain.state_dict())
    (wanted, said), (given, told) = looped(plain, settings), looped(listed, settings)
    assert torch.equal(wanted, given)
    assert told.samples == said.samples and told.notes == said.notes
    if settings.get("preset") != "paper":
        uncorrected, _ = looped(listed, {**settings, "corrector": False})
        assert not torch.equal(uncorrected, given)


@SETTINGS
def test_a_loop_may_turn_the_sign(settings: dict[str, Any]) -> None:
    """Z-Image's pipeline negates what the model gives: corrections are of the model's output, and turn with it."""
    plain, turned = tiny.flux_transformer(), tiny.flux_transformer()
    for parameter in turned.proj_out.parameters():
        parameter.data.neg_()
    (wanted, said), (given, told) = looped(plain, settings), looped(turned, settings, turn=-1.0)
    assert (wanted - given).abs().max() < 1e-4 * wanted.abs().max()
    assert [s.decisions for s in told.samples] == [s.decisions for s in said.samples]


def test_z_image_is_corrected() -> None:
    case = RECIPES["z-image"].build()
    speca.enable(case.pipe, speedup=3.0, prior="generic")
    made = case(SEEDS, steps=STEPS)
    report = speca.report(case.pipe)
    assert not [note for note in report.notes if "corrected" in note]
    assert {s.full for s in report.samples} == {STEPS // 3} and report.flops_speedup > 2.5
    alone = torch.stack([case([seed], steps=STEPS)[0] for seed in SEEDS])
    assert (alone - made).abs().max() < 1e-3 * made.abs().max()
