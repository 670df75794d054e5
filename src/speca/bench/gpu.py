"""The results of the GPU suite (`recipes/bench_gpu.py`) as a page."""

from __future__ import annotations

import statistics
from typing import Any

NAMES = (
    "speca", "features, unchecked", "module caches (the authors' layout)", "cache-dit", "diffusers TaylorSeer",
)  # fmt: skip
"""Methods of the suite whose runs are compared; the first three also by what they keep."""


def gpu_page(found: dict[str, Any], back: str = "../benchmarks.md") -> str:
    """What steps cost at full size, and what runs cost at the same number of full steps."""
    lines = [
        "# Full-size models on a GPU, random weights", "", f"[All benchmarks]({back}).", "",
        f"{found['hardware']}, {found['dtype']}, {found['steps']} steps with a period of {found['period']}; "
        f"`make bench-gpu`. Random weights: time and memory only. *Draft* is a step that `speca` forecasts; *checked* "
        "and *rejected* are drafts of the paper's method; *features* are its drafts without checks.", "",
        "| model | batch | | full step | draft | checked | rejected | speca | features | module caches | cache-dit "
        "| TaylorSeer of diffusers | kept by speca | by features | by modules |",
        "| --- | ---: | --- |" + " ---: |" * 12,
    ]  # fmt: skip
    for model in found["models"]:
        by = {row["method"]: row for row in model["rows"] if "seconds" in row}
        full = by.get("full", {}).get("seconds")
        ratios = [f"{full / by[n]['seconds']:.2f}x" if full and n in by else "-" for n in NAMES]
        steps = [_ms(model.get(k)) for k in ("full_step", "draft_step", "checked_step", "rejected_step")]
        kept = [_mib(by.get(n, {}).get("cache_bytes")) for n in NAMES[:3]]
        kind = "compiled" if model["compiled"] else "eager"
        lines.append(f"| {model['model']} | {model['batch']} | {kind} | {' | '.join([*steps, *ratios, *kept])} |")
    if found["left_out"]:
        lines += ["", f"Left out for want of time: {', '.join(found['left_out'])}."]
    if found["trained"]:
        lines += ["", "## The bundled models there", "", "| model | batch | setting | time | PSNR median |",
                  "| --- | ---: | --- | ---: | ---: |"]  # fmt: skip
        for row in found["trained"]:
            name = f"| {row['model']} | {row['batch']} | {row['method']} {row['value']} |"
            if "speedup" in row:
                lines.append(f"{name} {row['speedup']:.2f}x | {statistics.median(row['psnr']):.1f} |")
    return "\n".join(lines) + "\n"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f} ms"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"
