"""Speed and memory at full size on one GPU, in at most nine minutes: no weights needed, and no claim on quality.

    python recipes/bench_gpu.py                    # or `make bench-gpu`
    python recipes/bench_gpu.py --tiny --minutes 2 # the same on any machine, with toy sizes

DiT-XL/2, FLUX.1-dev and HunyuanVideo are built with random weights in bfloat16 straight on the device. For each:
seconds of a full step and of a draft of `speca`, of a checked and of a rejected draft of the paper's method, the memory
that kept outputs take beside the authors' layout, which keeps differences of every module, and runs at the same number
of full steps of `speca`, of forecast features, of the authors' layout, cache-dit and the caches of diffusers; eager and
compiled; in batches of 1, 4 and 16. Random weights say nothing of quality, and adaptive methods would decide on noise,
so every method is put on a fixed period. Last come the bundled models. When time is short what is left is skipped, and
named as such in the JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_models import STEPS, Loop, Subject, subjects

import speca
from speca.bench import rivals
from speca.bench.field import methods
from speca.bench.methods import Method, plain
from speca.bench.modules import per_module
from speca.bench.setup import Setup
from speca.bench.suites import versions
from speca.config import Config
from speca.verified.gate import block_lists

PERIOD = 4
FULL = (0, 1, 5, 9)  # of ten steps
ENOUGH = 12.0  # seconds of timed runs after which a contender is not run again
OUTPUTS = speca.SpecaConfig(schedule=FULL, tolerance=0.0, prior="none")
FEATURES = speca.VerifiedConfig(rule="interval", max_draft=PERIOD - 1, warmup=2, final=0)
CHECKED = speca.VerifiedConfig(threshold=1e9, threshold_decay=1.0, warmup=2, final=0, max_draft=PERIOD - 1)
REJECTED = speca.VerifiedConfig(threshold=1e-30, warmup=2, final=0)


@contextlib.contextmanager
def ours(loop: Any, call: dict[str, Any], config: Config) -> Iterator[Setup]:
    """`speca` on the bare transformer of the loop."""
    with speca.enabled(loop.transformer, config, scheduler=loop.scheduler, calibration=None) as session:
        yield Setup(loop, call, session)


def contenders(compiled: bool) -> list[Method]:
    """Everything on the same period, so on the same number of full steps.

    Wrapped modules are compiled anew for each module, which takes longer than there is time; they stay eager.
    """
    setting = f"F1B0 W2 MC{PERIOD - 1} R0.99"
    cache = rivals.diffusers_cache
    found = [
        Method("full", "-", (0,), plain),
        Method("speca", "-", (OUTPUTS,), ours),
        Method("features, unchecked", "-", (FEATURES,), ours),
        Method("features, every draft checked", "-", (CHECKED,), ours),
        Method("features, every draft rejected", "-", (REJECTED,), ours),
        Method("module caches (the authors' layout)", "-", (0,), per_module(lambda _: FEATURES)),
        Method("diffusers TaylorSeer", "-", (PERIOD,), cache(rivals.taylorseer(False))),
        Method("diffusers TaylorSeer lite", "-", (PERIOD,), cache(rivals.taylorseer(True))),
        Method("cache-dit", "-", (setting,), blocks_of_cache_dit),
    ]
    return [method for method in found if not (compiled and method.name.startswith(("module", "diffusers TaylorSeer")))]


@contextlib.contextmanager
def blocks_of_cache_dit(loop: Any, call: dict[str, Any], setting: str) -> Iterator[Setup]:
    """cache-dit on a bare transformer, as its documents say: with the number of steps given."""
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
    for key, name in (("draft_step", "speca"), ("checked_step", "features, every draft checked")):
        if name in by:
            row = by[name]
            pairs = zip(row["steps"], row["decisions"], strict=True)
            drafts = [seconds for seconds, letter in pairs if letter == "A"]
            out[key] = statistics.median(drafts) if drafts else None
    rejected = by.get("features, every draft rejected")
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
            rows += contend(loop, contenders(compiled), repeats, name, budget)
        except torch.OutOfMemoryError:
            rows.append({"method": "inputs", "reason": "out of memory"})
        parts = split(rows) if any(r["method"] == "full" and "steps" in r for r in rows) else {}
        about = dict(model=subject.name, batch=batch, compiled=compiled, parameters=count(model))
        out.append({**about, **parts, "rows": rows})
        print(f"{name}: {', '.join(line_of(parts, rows))}", flush=True)
        first = first or time.monotonic() - began
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return out


def contend(loop: Loop, methods: list[Method], repeats: int, name: str, budget: Budget) -> list[dict[str, Any]]:
    """Every contender there is time for; none is expected to take longer than twice the full run, warm-up included."""
    rows: list[dict[str, Any]] = []
    for method in methods:
        full = rows[0].get("seconds", 0.0) if rows else 0.0
        if budget.allows(f"{name}, {method.name}", 2 * full):
            rows.append(attempt(loop, method, repeats))
    return rows


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


def line_of(parts: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
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
        expected = 0.0
        for batch in (1, 8, 32):
            full: Any = None
            for method, value in chosen:
                expected = full.seconds_total if full else 6 * expected  # a batch takes at most as often as long
                if not budget.allows(f"{name}, batch {batch}, {method}", expected):
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
