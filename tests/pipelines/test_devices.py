"""Where and how a transformer runs: half precision, offloading, adapters and the sequence spread over processes."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks.group_offloading import (
    GroupOffloadingConfig,
    GroupOffloadingType,
    ModuleGroup,
    _apply_group_offloading,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

import speca
import tiny
from speca.verified.errors import ERRORS
from speca.verified.shards import total_of

LOOSE = dict(preset=tiny.VERIFYING, threshold=1e9, min_draft=0, max_draft=3)
EXACT = dict(preset=tiny.VERIFYING, threshold=0.0, min_draft=0)
DRAFTED = "FFF" + "AAAF" * 2 + "AAF"
FORECAST: dict[str, Any] = dict(schedule=(0, 1, 5, 9))
"""Settings that forecast outputs, with nothing of the model run in a draft."""
SEEDS = [3, 8, 5]


def decisions(case: tiny.Case) -> list[str]:
    return [s.decisions for s in speca.report(case.pipe).samples]


def mixed(case: tiny.Case) -> dict[str, Any]:
    """Settings at which some drafts of some samples are rejected."""
    speca.enable(case.pipe, **LOOSE)
    case(SEEDS)
    errors = sorted(e for s in speca.report(case.pipe).samples for e in s.errors if e is not None)
    return dict(
        preset=tiny.VERIFYING, threshold=errors[len(errors) // 2] * 1.01, threshold_decay=1.0, min_draft=0, max_draft=4
    )


def assert_exact_and_drafts(case: tiny.Case, plain: Tensor) -> None:
    """Enabled already or not: threshold 0 gives `plain` bit for bit, and a loose one drafts."""
    speca.enable(case.pipe, **EXACT)
    assert torch.equal(case(SEEDS), plain)
    assert all(set(d) == {"F", "R"} for d in decisions(case))
    speca.enable(case.pipe, **LOOSE)
    assert not torch.equal(case(SEEDS), plain)
    assert decisions(case) == [DRAFTED] * len(SEEDS)


def assert_forecasts(case: tiny.Case, plain: Tensor) -> None:
    """Where outputs are forecast: a threshold of 0 gives `plain` bit for bit, and a schedule is kept to; rows are their
    own."""
    speca.enable(case.pipe, threshold=0.0)
    assert torch.equal(case(SEEDS), plain)
    assert decisions(case) == ["F" * len(DRAFTED)] * len(SEEDS)
    speca.enable(case.pipe, **FORECAST)
    images = case(SEEDS)
    assert not torch.equal(images, plain) and images.dtype == plain.dtype and bool(images.isfinite().all())
    assert decisions(case) == ["FFAAAFAAAFAAAA"] * len(SEEDS)
    report = speca.report(case.pipe)
    assert report.evaluations * len(DRAFTED) == report.evaluations_full * 4 and report.notes == ()
    assert torch.equal(case(SEEDS), images)
    if plain.dtype == torch.float32:
        # DiT's pictures are in single precision also where the model rounds to half: rows alone then differ by that.
        close = max(2e-4, torch.finfo(case.pipe.transformer.dtype).eps)
        for seed, image in zip(SEEDS, images, strict=True):
            torch.testing.assert_close(image, case([seed])[0], rtol=close, atol=close)


def assert_rows_are_their_own(case: tiny.Case) -> None:
    """Every sample decides as it does alone, and gives the same values up to rounding."""
    speca.enable(case.pipe, **mixed(case))
    images = case(SEEDS)
    together = decisions(case)
    assert len(set(together)) > 1, "the samples must differ for this test to say anything"
    assert {"A", "R"} <= set("".join(together))
    for seed, image, decided in zip(SEEDS, images, together, strict=True):
        alone = case([seed])[0]
        assert decisions(case) == [decided]
        torch.testing.assert_close(image, alone, rtol=2e-4, atol=2e-4)


# -- half precision -----------------------------------------------------------------------------------
def in_dtype(case: tiny.Case, dtype: torch.dtype) -> tiny.Case:
    """The pipeline and its conditions in another precision."""

    def conditions(seeds: list[int]) -> dict[str, Any]:
        given = case.conditions(seeds)
        return {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in given.items()}

    case.pipe.to(dtype)
    return dataclasses.replace(case, conditions=conditions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["dit", "flux", "hunyuan-video"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = in_dtype(tiny.PIPELINES[name](), dtype)
    plain = case(SEEDS)
    assert bool(plain.isfinite().all())
    assert_exact_and_drafts(case, plain)
    held = {}
    for kept in ("model", "float32", "bfloat16", "float16"):
        speca.enable(case.pipe, history_dtype=kept, **LOOSE)
        image = case(SEEDS)
        assert image.dtype == plain.dtype and bool(image.isfinite().all())
        assert decisions(case) == [DRAFTED] * len(SEEDS)
        held[kept] = speca.report(case.pipe).bytes_per_sample
    assert held["float32"] == 2 * held["model"] == 2 * held["bfloat16"] == 2 * held["float16"] > 0
    assert_forecasts(case, plain)


def test_outputs_are_kept_in_single_precision() -> None:
    """Forecasts and corrections are differences of outputs, which half precision would not hold."""
    held = []
    for dtype in (torch.float32, torch.bfloat16):
        case = in_dtype(tiny.flux(), dtype)
        speca.enable(case.pipe, **FORECAST)
        case(SEEDS)
        held.append(speca.report(case.pipe).bytes_per_sample)
    assert held[0] == held[1] > 0


def test_int8_weights() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    case = tiny.flux()
    unquantised = case(SEEDS)
    quantization.quantize_(case.transformer, quantization.Int8WeightOnlyConfig())
    parameters = dict(case.transformer.named_parameters())
    plain = case(SEEDS)
    assert not torch.equal(plain, unquantised)
    assert_exact_and_drafts(case, plain)
    assert_rows_are_their_own(case)
    speca.enable(case.pipe, **mixed(case))
    assert torch.equal(case(SEEDS), case(SEEDS))
    assert {"A", "R"} <= set("".join(decisions(case)))
    assert_forecasts(case, plain)
    speca.disable(case.pipe)
    assert torch.equal(case(SEEDS), plain)
    assert all(p is parameters[n] for n, p in case.transformer.named_parameters()), "the weights are as they were"


# -- what is added to a model's inputs ----------------------------------------------------------------
def with_ip_adapter() -> tiny.Case:
    """FLUX with an IP-Adapter: two image prompts per sample, which travel in `joint_attention_kwargs`."""
    case = tiny.flux()
    torch.manual_seed(0)
    model: Any = case.transformer
    processors = {
        name: FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=12, num_tokens=(4, 4), scale=0.7)
        if not name.startswith("single") else processor
        for name, processor in model.attn_processors.items()
    }  # fmt: skip
    model.set_attn_processor(processors)
    layers = [ImageProjection(image_embed_dim=9, cross_attention_dim=12, num_image_text_embeds=4) for _ in range(2)]
    model.encoder_hid_proj = MultiIPAdapterImageProjection(layers)
    model.config.encoder_hid_dim_type = "ip_image_proj"
    model.eval().requires_grad_(False)
    # The pipeline repeats one image prompt for the whole batch; here every sample has its own.
    case.pipe.prepare_ip_adapter_image_embeds = lambda image, embeds, *_: embeds

    def conditions(seeds: list[int]) -> dict[str, Any]:
        images = [tiny._draw([100 * k + s for s in seeds], 1, 9) for k in (1, 2)]
        return {**case.conditions(seeds), "ip_adapter_image_embeds": images, "negative_ip_adapter_image_embeds": images}

    return dataclasses.replace(case, conditions=conditions)


def with_controlnet() -> tiny.Case:
    """FLUX with residuals for both of its block lists, as many for the first as it has blocks."""
    case = tiny.flux()
    control = tiny.randomised(
        diffusers.FluxControlNetModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ), seed=1,
    )  # fmt: skip
    parts = {**case.pipe.components, "controlnet": control}
    pipe = diffusers.FluxControlNetPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)

    def conditions(seeds: list[int]) -> dict[str, Any]:
        return {**case.conditions(seeds), "control_image": tiny._draw(seeds, 3, 16, 16).clamp(0, 1)}

    return dataclasses.replace(case, pipe=pipe, conditions=conditions)


ADAPTED = {"ip-adapter": with_ip_adapter, "controlnet": with_controlnet}


@pytest.mark.parametrize("name", list(ADAPTED))
def test_adapters(name: str) -> None:
    case = ADAPTED[name]()
    plain = case(SEEDS)
    others = {
        n: v.flip(0) if isinstance(v, Tensor) else [x.flip(0) for x in v]
        for n, v in case.conditions(SEEDS).items()
        if n in ("ip_adapter_image_embeds", "control_image")
    }
    assert others and not torch.equal(case(SEEDS, **others), plain), "the adapter must have an effect"
    assert_exact_and_drafts(case, plain)
    assert_rows_are_their_own(case)
    assert_forecasts(case, plain)


def test_residuals_of_as_many_blocks_as_rows() -> None:
    """Two rows and two blocks with a residual each: a list of that length is not one item per row."""
    case = with_controlnet()
    speca.enable(case.pipe, **mixed(case))
    seeds = SEEDS[:2]
    images, together = case(seeds), decisions(case)
    for seed, image, decided in zip(seeds, images, together, strict=True):
        alone = case([seed])[0]
        assert decisions(case) == [decided] and "A" in decided
        torch.testing.assert_close(image, alone, rtol=2e-4, atol=2e-4)


# -- offloading ---------------------------------------------------------------------------------------
def _sequential(case: tiny.Case) -> None:
    for model in (case.pipe.vae, case.transformer):  # with a copy of the weights, as on a device of their own
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        cpu_offload(model, execution_device=torch.device("cpu"), state_dict=kept)


def _model(case: tiny.Case) -> None:
    case.pipe.enable_model_cpu_offload(device="cpu")


def _groups(kind: str) -> Callable[[tiny.Case], None]:
    def offload(case: tiny.Case) -> None:
        model: Any = case.transformer
        device = torch.device("cpu")
        blocks = dict(num_blocks_per_group=1) if kind == "block_level" else {}
        model.enable_group_offload(onload_device=device, offload_device=device, offload_type=kind, **blocks)

    return offload


def watched(name: str, case: tiny.Case) -> Any:
    """A patch that sees whether the offloading of the transformer is asked for its weights."""
    if "groups" in name:
        return mock.patch.object(ModuleGroup, "onload_", autospec=True, side_effect=ModuleGroup.onload_)
    hook: Any = case.transformer._hf_hook
    return mock.patch.object(hook, "pre_forward", wraps=hook.pre_forward)


OFFLOADS = {
    "model": _model,
    "sequential": _sequential,
    "block-groups": _groups("block_level"),
    "leaf-groups": _groups("leaf_level"),
}


@pytest.mark.parametrize("road", ["verified", "forecast"])
@pytest.mark.parametrize("enabled_first", [False, True], ids=["offload-first", "speca-first"])
@pytest.mark.parametrize("name", list(OFFLOADS))
def test_offload(name: str, enabled_first: bool, road: str) -> None:
    case = tiny.flux()
    plain = case(SEEDS)
    settings, letters = (LOOSE, DRAFTED) if road == "verified" else (FORECAST, "FFAAAFAAAFAAAA")
    if enabled_first:
        speca.enable(case.pipe, **settings)
    OFFLOADS[name](case)
    if not enabled_first:
        speca.enable(case.pipe, **settings)
    drafts = []
    for _ in range(2):  # a pipeline with model offload takes its hooks off and puts them on again after each call
        drafts.append(case(SEEDS))
        assert decisions(case) == [letters] * len(SEEDS)
    assert torch.equal(drafts[0], drafts[1]) and not torch.equal(drafts[0], plain)
    assert_exact_and_drafts(case, plain)
    assert_forecasts(case, plain)
    speca.disable(case.pipe)
    with watched(name, case) as moved:
        assert torch.equal(case(SEEDS), plain)
    assert moved.called, "offloading must still be at work"
    with pytest.raises(speca.NotEnabledError):
        speca.report(case.pipe)


class Away:
    """Equal to the device that weights are on while their group is offloaded: on a CPU all devices are the same one."""

    def __init__(self, group: ModuleGroup, away: dict[Tensor, Tensor]) -> None:
        self.group, self.away = group, away

    def __eq__(self, device: object) -> bool:
        return any(t in self.away for t in held(self.group))

    __hash__ = None  # type: ignore[assignment]


class Stream:
    """Copies are only there once they were waited for."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []

    def synchronize(self) -> None:
        for arrive in self.pending:
            arrive()
        self.pending.clear()


def held(group: ModuleGroup) -> list[Tensor]:
    return [*(p for m in group.modules for p in (*m.parameters(), *m.buffers())), *group.parameters, *group.buffers]


@contextmanager
def two_devices() -> Iterator[dict[Tensor, Tensor]]:
    """Weights that a group has offloaded, or whose copy was not waited for, are NaN."""
    away: dict[Tensor, Tensor] = {}

    def offload(group: ModuleGroup) -> None:
        for tensor in held(group):
            away.setdefault(tensor, tensor.data)
            tensor.data = torch.full_like(tensor.data, torch.nan)

    def onload(group: ModuleGroup) -> None:
        def arrive() -> None:
            for tensor in held(group):
                tensor.data = away.pop(tensor, tensor.data)

        if group.stream is not None:
            group.stream.synchronize()
            offload(group)
        if group.stream is not None and group.non_blocking:
            group.stream.pending.append(arrive)
        else:
            arrive()

    with mock.patch.multiple(ModuleGroup, onload_=onload, offload_=offload):
        yield away


def offload_blocks(case: tiny.Case, away: dict[Tensor, Tensor], kind: str, stream: Any, blocks: int | None) -> None:
    cpu = torch.device("cpu")
    config = GroupOffloadingConfig(
        cpu, cpu, GroupOffloadingType(kind), non_blocking=stream is not None, record_stream=False,
        low_cpu_mem_usage=True, num_blocks_per_group=blocks, stream=stream,
    )  # fmt: skip
    _apply_group_offloading(case.transformer, config)  # `apply_group_offloading` itself has no streams on a CPU
    for module in case.transformer.modules():
        hook = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).get("group_offloading")
        if hook is not None:
            hook.group.offload_device = Away(hook.group, away)


@pytest.mark.parametrize("order", ["offload first", "speca first", "offload between runs"])
@pytest.mark.parametrize(
    ("kind", "blocks", "streams"),
    [("block_level", n, False) for n in (1, 2, 3)]
    + [("leaf_level", None, False), ("block_level", 1, True), ("leaf_level", None, True)],
)
@pytest.mark.parametrize("road", ["verified", "forecast"])
def test_groups_of_blocks(kind: str, blocks: int | None, streams: bool, order: str, road: str) -> None:
    """A draft skips blocks that bring, or have fetched ahead, the weights of the block that checks."""
    case = tiny.flux()
    plain = case(SEEDS)
    settings = LOOSE if road == "verified" else FORECAST
    speca.enable(case.pipe, **settings)
    drafted = case(SEEDS)
    if order != "offload between runs":
        speca.disable(case.pipe)
    if order == "speca first":
        speca.enable(case.pipe, **settings)
    with two_devices() as away:
        offload_blocks(case, away, kind, Stream() if streams else None, blocks)
        assert bool(next(case.transformer.parameters()).isnan().all()), "the weights must be away"
        if order == "offload first":
            speca.enable(case.pipe, **settings)
        assert not case(SEEDS).isnan().any()  # with streams, diffusers learns the order of blocks in the first call
        assert torch.equal(case(SEEDS), drafted)
        assert_exact_and_drafts(case, plain)
        assert_forecasts(case, plain)
        speca.disable(case.pipe)
        assert torch.equal(case(SEEDS), plain)


# -- one sequence over several processes --------------------------------------------------------------
def every_error() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real, told = (torch.randn(3, 8, 5, generator=generator) for _ in range(2))
    return {"real": real, "told": told}


def sampled(case: tiny.Case, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Latents, decisions and errors of the same samples, plain and with each of the settings."""
    found: dict[str, Any] = {"plain": (case(SEEDS), [], [])}
    for name, setting in settings.items():
        speca.enable(case.pipe, **setting)
        image = case(SEEDS)
        samples = speca.report(case.pipe).samples
        found[name] = image, [s.decisions for s in samples], [s.errors for s in samples]
    return found


def one_of_two(rank: int, folder: str, settings: dict[str, dict[str, Any]], after: bool) -> None:
    """What each process does: FLUX with half of the tokens, on settings made by the single process."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name need not resolve
    store = f"file://{folder}/store"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    case = tiny.flux()
    if after:
        speca.enable(case.pipe, **LOOSE)
    model: Any = case.transformer
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):  # diffusers divides by it
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
    found = sampled(case, settings) if not after else {"loose": (case(SEEDS), decisions(case), [])}
    halves = {n: v.chunk(2, dim=1)[rank] for n, v in every_error().items()}
    total = total_of(model)
    found["errors"] = {n: error(halves["told"], halves["real"], total) for n, error in ERRORS.items()}
    broken = halves["told"].clone()
    broken[1, 0, 0] = float("nan") if rank == 0 else 0.0
    found["broken"] = {n: error(broken, halves["real"], total) for n, error in ERRORS.items()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def two_processes(folder: Path, settings: dict[str, dict[str, Any]], after: bool = False) -> Sequence[dict[str, Any]]:
    torch.multiprocessing.spawn(one_of_two, args=(str(folder), settings, after), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_decide_alike_and_as_one(tmp_path: Path) -> None:
    case = tiny.flux()
    by_errors = dict(tolerance=0.3, prior="none")  # the full steps follow from numbers that each process reads
    settings = {"exact": EXACT, "loose": LOOSE, "mixed": mixed(case), "forecast": FORECAST, "by errors": by_errors}
    speca.disable(case.pipe)
    alone = sampled(case, settings)
    ranks = two_processes(tmp_path, settings)
    assert {"A", "R"} <= set("".join(alone["mixed"][1])) and len(set(alone["mixed"][1])) > 1
    assert {"A", "F"} == set("".join(alone["by errors"][1])) and len(set(alone["by errors"][1])) > 1
    for name, (image, decided, errors) in alone.items():
        (first, decided_first, errors_first), (second, decided_second, errors_second) = (r[name] for r in ranks)
        assert decided_first == decided_second == decided
        assert errors_first == errors_second
        assert torch.equal(first, second)
        torch.testing.assert_close(first, image, rtol=2e-4, atol=2e-4)
        for told, known in zip(errors_first, errors, strict=True):
            pairs = list(zip(told, known, strict=True))
            assert [a is None for a, _ in pairs] == [b is None for _, b in pairs]
            assert [a for a, _ in pairs if a] == pytest.approx([b for _, b in pairs if b], rel=1e-3)
    assert all(torch.equal(r["exact"][0], r["plain"][0]) for r in ranks)
    given = every_error()
    for name, error in ERRORS.items():
        torch.testing.assert_close(ranks[0]["errors"][name], error(given["told"], given["real"]))
        assert all(bool(r["broken"][name][1].isnan()) and not bool(r["broken"][name][0].isnan()) for r in ranks)


def test_spreading_after_enabling(tmp_path: Path) -> None:
    case = tiny.flux()
    speca.enable(case.pipe, **LOOSE)
    image = case(SEEDS)
    for rank in two_processes(tmp_path, {}, after=True):
        told, decided, _ = rank["loose"]
        assert decided == [DRAFTED] * len(SEEDS)
        torch.testing.assert_close(told, image, rtol=2e-4, atol=2e-4)
