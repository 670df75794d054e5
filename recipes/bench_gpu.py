"""Speed and memory at full size on one GPU, in at most nine minutes: no weights needed, and no claim on quality.

    python recipes/bench_gpu.py                    # or `make bench-gpu`
    python recipes/bench_gpu.py --tiny --minutes 2 # the same on any machine, with toy sizes

DiT-XL/2, FLUX.1-dev and HunyuanVideo are built with random weights in bfloat16 straight on the device. For each:
seconds of a full step, of a draft and of a rejected one, what is spent outside of blocks, the memory that anchors take
beside the authors' layout of one tower for every module, and runs at the same number of full steps of `speca`, the
authors' layout, cache-dit and the caches of diffusers; eager and compiled; in batches of 1, 4 and 16. Random weights
say nothing of quality, and adaptive methods would decide on noise, so every method is put on a fixed period. Last come
the bundled models. When time is short what is left is skipped, and named as such in the JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import speca
from speca.bench import rivals
from speca.bench.field import methods
from speca.bench.methods import Method, Setup, plain
from speca.bench.modules import per_module
from speca.bench.suites import versions
from speca.model.gate import block_lists

STEPS, PERIOD = 10, 4  # a run: full at steps 0, 1, 5 and 9
ENOUGH = 12.0  # seconds of timed runs after which a contender is not run again
SPECA = speca.SpecaConfig(controller="interval", max_draft=PERIOD - 1, warmup=2, final=0)


@dataclass
class Subject:
    """A transformer under test: how it is built, and the inputs of a call of `batch` samples."""

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    batches: tuple[int, ...]


def subjects(tiny: bool, device: str, dtype: torch.dtype) -> list[Subject]:
    """The three models of the paper at full size, or toys in their shape."""
    import diffusers

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def whole(batch: int, value: float = 500.0) -> torch.Tensor:
        return torch.full((batch,), value, device=device)

    depth = (4, 2, 3, 2, 3) if tiny else (28, 19, 38, 20, 40)
    heads, width = (2, 16) if tiny else (16, 72)
    side = 8 if tiny else 32
    dit = dict(
        num_attention_heads=heads, attention_head_dim=width, in_channels=4, out_channels=8, num_layers=depth[0],
        sample_size=side, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", attention_bias=True,
    )  # fmt: skip
    text = 32 if tiny else 4096
    flux = dict(
        in_channels=64, num_layers=depth[1], num_single_layers=depth[2], guidance_embeds=True,
        attention_head_dim=16 if tiny else 128, num_attention_heads=2 if tiny else 24, joint_attention_dim=text,
        pooled_projection_dim=768, axes_dims_rope=(4, 6, 6) if tiny else (16, 56, 56),
    )  # fmt: skip
    video = dict(
        num_layers=depth[3], num_single_layers=depth[4], guidance_embeds=True,
        num_attention_heads=2 if tiny else 24, attention_head_dim=16 if tiny else 128, text_embed_dim=text,
        rope_axes_dim=(4, 6, 6) if tiny else (16, 56, 56),
    )  # fmt: skip
    tokens, told = (64, 16) if tiny else (4096, 512)
    grid = (2, 4, 4) if tiny else (17, 60, 80)  # latents of 65 frames of 480 x 640
    edge = int(tokens**0.5)
    places = torch.stack(
        torch.meshgrid(torch.zeros(1), torch.arange(1.0 * edge), torch.arange(1.0 * edge), indexing="ij"), -1
    )

    def of_dit(batch: int) -> dict[str, torch.Tensor]:
        labels = torch.arange(2 * batch, device=device) % 1000
        return dict(hidden_states=draw(2 * batch, 4, side, side), timestep=whole(2 * batch).long(), class_labels=labels)

    def of_flux(batch: int) -> dict[str, torch.Tensor]:
        return dict(
            hidden_states=draw(batch, tokens, 64), encoder_hidden_states=draw(batch, told, text),
            pooled_projections=draw(batch, 768), timestep=whole(batch, 0.5), guidance=whole(batch, 3.5),
            img_ids=places.reshape(-1, 3).to(device), txt_ids=torch.zeros(told, 3, device=device),
        )  # fmt: skip

    def of_video(batch: int) -> dict[str, torch.Tensor]:
        return dict(
            hidden_states=draw(batch, 16, *grid), timestep=whole(batch), encoder_hidden_states=draw(batch, told, text),
            encoder_attention_mask=torch.ones(batch, told, device=device, dtype=torch.long),
            pooled_projections=draw(batch, 768), guidance=whole(batch, 6000.0),
        )  # fmt: skip

    return [
        Subject("DiT-XL/2", lambda: diffusers.DiTTransformer2DModel(**dit), of_dit, (1, 4, 16)),
        Subject("FLUX.1-dev", lambda: diffusers.FluxTransformer2DModel(**flux), of_flux, (1, 4, 16)),
        Subject("HunyuanVideo", lambda: diffusers.HunyuanVideoTransformer3DModel(**video), of_video, (1,)),
    ]


class Loop:
    """A pipeline in miniature: the denoising loop alone, around one transformer and its fixed inputs."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.transformer, self.inputs = model, inputs
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self._execution_device = next(model.parameters()).device

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer}

    def __call__(self, steps: int = STEPS) -> list[float]:
        """Seconds of each step."""
        self.scheduler.set_timesteps(steps)
        latents, seconds = self.inputs["hidden_states"], []
        context = getattr(self.transformer, "cache_context", lambda _: contextlib.nullcontext())
        for t in self.scheduler.timesteps:
            time_of = {"timestep": torch.full_like(self.inputs["timestep"], self._time(t))}
            synchronize(latents.device)
            begin = time.perf_counter()
            with context("bench"):
                out = self.transformer(**{**self.inputs, "hidden_states": latents, **time_of}).sample
            synchronize(latents.device)
            seconds.append(time.perf_counter() - begin)
            latents = latents - 0.02 * out[:, : latents.shape[1]].reshape(latents.shape)
        reset = getattr(self.transformer, "_reset_stateful_cache", None)
        if reset:
            reset()
        return seconds

    def _time(self, t: torch.Tensor) -> float:
        return float(t) / 1000 if self.inputs["timestep"].dtype.is_floating_point and self._unit else float(t)

    @property
    def _unit(self) -> bool:
        return "img_ids" in self.inputs  # FLUX is given times in [0, 1]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def ours(loop: Any, call: dict[str, Any], config: speca.SpecaConfig) -> Iterator[Setup]:
    """`speca` on the bare transformer of the loop."""
    with speca.enabled(loop.transformer, config, scheduler=loop.scheduler) as session:
        yield Setup(loop, call, session)


def contenders(compiled: bool) -> list[Method]:
    """Everything on the same period, so on the same number of full steps.

    Wrapped modules are compiled anew for each module, which takes longer than there is time; they stay eager.
    """
    module = speca.SpecaConfig(controller="interval", max_draft=PERIOD - 1, warmup=2, final=0)
    checked = speca.SpecaConfig(
        threshold=1e9, threshold_decay=1.0, warmup=2, final=0, max_draft=PERIOD - 1, min_draft=0
    )
    setting = f"F1B0 W2 MC{PERIOD - 1} R0.99"
    cache = rivals.diffusers_cache
    found = [
        Method("full", "-", (0,), plain),
        Method("speca, unchecked", "-", (SPECA,), ours),
        Method("speca, every draft checked", "-", (checked,), ours),
        Method("speca, every draft rejected", "-", (speca.SpecaConfig(threshold=1e-30, warmup=2, final=0),), ours),
        Method("module towers (the authors' layout)", "-", (0,), per_module(lambda _: module)),
        Method("diffusers TaylorSeer", "-", (PERIOD,), cache(rivals.taylorseer(False))),
        Method("diffusers TaylorSeer lite", "-", (PERIOD,), cache(rivals.taylorseer(True))),
        Method("cache-dit", "-", (setting,), blocks_of_cache_dit),
    ]
    return [method for method in found if not (compiled and method.name.startswith(("module", "diffusers TaylorSeer")))]


@contextlib.contextmanager
def blocks_of_cache_dit(loop: Any, call: dict[str, Any], setting: str) -> Iterator[Setup]:
    """cache-dit on a bare transformer, as its documents say: with the number of steps told."""
    try:
        import cache_dit as library
    except ImportError as error:
        raise speca.InputError("cache-dit is not installed; pip install 'speca-diffusers[bench]'.") from error
    config = rivals.configuration(library, setting)
    config.num_inference_steps = call["num_inference_steps"]
    rivals.quiet()
    model = loop.transformer
    cls, before = type(model), {**model.__dict__, "_modules": dict(model._modules)}
    model.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__})
    library.enable_cache(model, cache_config=config)
    try:
        yield Setup(loop, call)
    finally:
        library.disable_cache(model)
        model.__class__ = cls  # what it leaves behind would be seen by the contenders of the next batch
        model.__dict__.clear()
        model.__dict__.update(before)


class Budget:
    """The time there is; every part asks before it begins, and may be given a share of what is left."""

    def __init__(self, seconds: float, left_out: list[str] | None = None) -> None:
        self.end = time.monotonic() + seconds
        self.left_out: list[str] = [] if left_out is None else left_out

    def part(self, share: float) -> Budget:
        """A share of the time that is left."""
        return Budget(share * max(0.0, self.end - time.monotonic()), self.left_out)

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether about `seconds` are left; what is not begun is noted."""
        if time.monotonic() + seconds < self.end:
            return True
        self.left_out.append(what)
        return False


def measure(loop: Loop, method: Method, repeats: int) -> dict[str, Any]:
    """Seconds of full, drafted and rejected steps of one contender, and how far the memory rose."""
    device = loop._execution_device
    call = {"num_inference_steps": STEPS}
    with method.apply(loop, call, method.values[0]) as setup:
        runs: list[list[float]] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        for count in range(repeats + 1):  # the first one warms up and holds the self-test
            if count > 1 and sum(map(sum, runs[1:])) > ENOUGH:
                break
            if setup.begin:
                setup.begin(0)
            runs.append(loop())
        peak = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
        kept = setup.bytes() if setup.bytes else None
        row: dict[str, Any] = {
            "method": method.name,
            "steps": [statistics.median(s) for s in zip(*runs[1:], strict=True)],
        }
        row |= {"seconds": statistics.median(map(sum, runs[1:])), "peak_bytes": peak, "cache_bytes": kept}
        if setup.session:
            report = setup.session.report()
            letters = report.samples[0].decisions
            row |= {"decisions": letters, "cache_bytes": report.bytes_per_sample * len(report.samples)}
            row |= {"flops": report.flops, "flops_full": report.flops_full, "host_reads": report.host_reads}
            if "runs plainly" in " ".join(report.notes):
                row["notes"] = list(report.notes)
    return row


def split(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a step costs, by kind, and what a draft spends beside the blocks it runs."""
    by = {row["method"]: row for row in rows if "steps" in row}
    full = statistics.median(by["full"]["steps"])
    out: dict[str, Any] = {"full_step": full}
    for key, name in (("draft_step", "speca, unchecked"), ("checked_step", "speca, every draft checked")):
        if name in by:
            row = by[name]
            pairs = zip(row["steps"], row["decisions"], strict=True)
            drafts = [seconds for seconds, letter in pairs if letter == "A"]
            out[key] = statistics.median(drafts) if drafts else None
    rejected = by.get("speca, every draft rejected")
    if rejected:
        pairs = zip(rejected["steps"], rejected["decisions"], strict=True)
        found = [seconds for seconds, letter in pairs if letter == "R"]
        out["rejected_step"] = statistics.median(found) if found else None
        if found and out.get("checked_step"):
            out["rejecting_adds"] = out["rejected_step"] - full
    return out


def subject_rows(
    subject: Subject, device: str, dtype: torch.dtype, repeats: int, budget: Budget
) -> list[dict[str, Any]]:
    """All batches of one model, eager and then compiled."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # in float32 thirteen billion weights would take 52 GB at first
    try:
        with torch.device(device):
            model = subject.build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)
    out, first = [], 0.0
    plan = [*((batch, False) for batch in subject.batches), (1, True)]
    for batch, compiled in plan:
        name = f"{subject.name}, batch {batch}{', compiled' if compiled else ''}"
        if not budget.allows(name, (45 if device == "cuda" else 5) if compiled else 0.4 * first * batch):
            continue
        began = time.monotonic()
        if compiled:
            for block in (b for stack in block_lists(model).values() for b in stack):
                block.compile(
                    backend="inductor" if device == "cuda" else "eager"
                )  # as compile_repeated_blocks does, which DiT does not have
        rows: list[dict[str, Any]] = []
        try:
            loop = Loop(model, subject.inputs(batch))
            rows += [attempt(loop, m, repeats) for m in contenders(compiled) if budget.allows(f"{name}, {m.name}")]
        except torch.OutOfMemoryError:
            rows.append({"method": "inputs", "reason": "out of memory"})
        parts = split(rows) if any(r["method"] == "full" and "steps" in r for r in rows) else {}
        about = dict(model=subject.name, batch=batch, compiled=compiled, parameters=count(model))
        out.append({**about, **parts, "rows": rows})
        print(f"{name}: {', '.join(told(parts, rows))}", flush=True)
        first = first or time.monotonic() - began
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return out


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def attempt(loop: Loop, method: Method, repeats: int) -> dict[str, Any]:
    """One contender, or why it could not run."""
    try:
        with torch.no_grad():
            return measure(loop, method, repeats)
    except Exception as error:  # rivals raise whatever they like; the row says what
        words = (str(error).strip().splitlines() or ["no message"])[0]
        return {"method": method.name, "reason": f"{type(error).__name__}: {words[:300]}"}


def told(parts: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """A line for the terminal."""
    times = [f"{key.replace('_', ' ')} {1000 * value:.2f} ms" for key, value in parts.items() if value]
    full = next((r["seconds"] for r in rows if r["method"] == "full" and "seconds" in r), None)
    runs = [f"{r['method']} {full / r['seconds']:.2f}x" for r in rows if full and "seconds" in r]
    return [*times, *runs[1:]]


def trained(device: str, dtype: torch.dtype, budget: Budget) -> list[dict[str, Any]]:
    """The bundled models: time of a few settings against the full run, in batches of 1, 8 and 32."""
    from speca.bench.measure import played, quality
    from speca.bench.scores import arguments
    from speca.zoo import call_arguments, load, names

    known = methods()
    chosen: list[tuple[str, Any]] = [
        ("none", 0), ("fewer-steps", 13), ("taylor-1", 4), ("taylor-modules", 4), ("speca", 0.01),
        ("speca-budget", 5.0), ("taylorseer-lite", 5), ("cache-dit-taylor", "F1B0 W3 MC4 R0.8"),
    ]  # fmt: skip
    out = []
    for name in names():
        pipe = load(name, dtype=dtype, device=device)
        pipe.set_progress_bar_config(disable=True)
        for batch in (1, 8, 32):
            full: Any = None
            for method, value in chosen:
                if not budget.allows(f"{name}, batch {batch}, {method}"):
                    continue
                seeds = list(range(batch))
                call = arguments(pipe, seeds, 50, call_arguments(name))
                row = dict(model=name, batch=batch, method=method, value=value)
                try:
                    made = played(known[method].apply, pipe, call, value, seeds, batch)
                except Exception as error:  # as above
                    out.append({**row, "reason": f"{type(error).__name__}: {str(error)[:300]}"})
                    continue
                full = full or made
                worth = quality(made.images, full.images)["psnr"]
                out.append({**row, "seconds": made.seconds, "speedup": full.seconds / made.seconds, "psnr": worth})
                print(f"{name}, batch {batch}, {method} {value}: {full.seconds / made.seconds:.2f}x", flush=True)
    return out


def main(
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("docs/results/bench/gpu.json"),
    minutes: Annotated[
        float, typer.Option(help="Time there is; what does not fit is left out and named.", min=0.1)
    ] = 9.0,
    tiny: Annotated[bool, typer.Option(help="Toy sizes, for any machine.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda if there is one.")] = "",
    repeats: Annotated[int, typer.Option(help="Timed runs of each contender.", min=1)] = 3,
) -> None:
    """Measure, print a line for each part, and write the JSON."""
    budget = Budget(60 * minutes - 20)  # writing and leaving takes a moment
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not tiny and device == "cpu":
        raise typer.BadParameter("full sizes need a GPU; --tiny runs anywhere", param_hint="--device")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = []
    for subject, share in zip(subjects(tiny, device, dtype), (0.25, 0.45, 0.65), strict=True):
        if budget.allows(subject.name, 0 if tiny else 20):
            found += subject_rows(subject, device, dtype, repeats, budget.part(share))
            save(out, tiny, device, dtype, found, [], budget)
    bundled = trained(device, dtype, budget)
    save(out, tiny, device, dtype, found, bundled, budget)
    print(f"{out}; {len(budget.left_out)} parts were left out for want of time")


def save(
    out: Path, tiny: bool, device: str, dtype: torch.dtype, found: list[Any], bundled: list[Any], budget: Budget
) -> None:
    """Write what is known so far, so that nothing is lost if the machine is taken away."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    about = dict(hardware=name, device=device, dtype=str(dtype), tiny=tiny, steps=STEPS, period=PERIOD)
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = dict(**about, versions=versions(), models=found, trained=bundled, left_out=budget.left_out)
    out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
