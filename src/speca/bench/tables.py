"""Markdown tables of a report: at fixed speeds, every setting, what could not run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .pareto import SPEEDS, at_speed, median_interval, needed, paired_difference, reading
from .results import OURS, Rows, curves, families, measured, missing
from .signals import verdicts

ADAPTIVE, PLACED = "speca-unprepared", ("annealed-corrected", "searched-corrected")
"""Method that plans drafts per sample, and methods with searched fixed schedules, all with the correction."""


def table(rows: Rows, speed: float, axis: str) -> list[str]:
    """Return Markdown: every method at one speed, best median first; the difference is paired with `speca`."""
    found, similar = curves(rows, axis), curves(rows, axis, "ssim")
    ours, family = reading(found.get(OURS, []), speed), families(rows)
    lines = []
    for name, points in found.items():
        read = reading(points, speed)
        if read is None:
            continue
        median, low, high = median_interval(read)
        values, versus = read.values, "-"
        if ours is not None and name != OURS:
            mean, least, most = paired_difference(read, ours)
            mark = " *" if least > 0 or most < 0 else ""
            versus = f"{mean:+.2f} [{least:+.2f}, {most:+.2f}]{mark}"
        alike = at_speed(similar.get(name, []), speed)
        shown = f"**{name}**" if name == OURS else f"_{name}_" if family[name] == "oracle" else name
        line = (
            f"| {shown} | {median:.2f} [{low:.2f}, {high:.2f}] | {values.quantile(0.05):.2f} | {values.min():.2f} | "
            f"{_of(alike)} | {versus} |"
        )
        lines.append((median, line))
    head = [
        "| method | PSNR dB, median [95 %] | P5 | worst | SSIM | mean minus speca [95 %] |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    body = [line for _, line in sorted(lines, reverse=True)]
    return [*head, *body] if body else [f"No method's sweep spans {speed:g}x on this axis."]


def _of(values: Tensor | None) -> str:
    return "-" if values is None else f"{values.quantile(0.5):.4f}"


def settings_table(rows: Rows) -> list[str]:
    """Return a table of the measured cost and quality of each setting."""
    lines = [
        "| method | setting | FLOPs | seconds | full steps | PSNR median | P5 | worst | SSIM | rel. L2 | kept a sample "
        "| peak | host reads |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in measured(rows):
        values = torch.tensor(row["psnr"], dtype=torch.float64)
        wall = f"{row['wall_speedup']:.2f}x" if row["wall_speedup"] else "-"
        similar = f"{statistics.median(row['ssim']):.4f}" if row["ssim"] else "-"
        relative = f"{statistics.median(row['relative_l2']):.4f}" if row["relative_l2"] else "-"
        lines.append(
            f"| {row['method']} | {row['knob']} {row['value']} | {row['flops_speedup']:.2f}x | {wall} | "
            f"{spread(row['full_steps'])} | {values.quantile(0.5):.2f} | {values.quantile(0.05):.2f} | "
            f"{values.min():.2f} | {similar} | {relative} | {size(row.get('bytes_per_sample'))} | "
            f"{peak(row.get('peak_bytes'))} | "
            f"{row.get('host_reads', '-')} |"
        )
    return lines


def spread(steps: Sequence[float]) -> str:
    """Format the full steps of the samples: one number, or the mean and a count of samples per number."""
    counts: dict[int, int] = {}
    for value in steps:
        counts[round(value)] = counts.get(round(value), 0) + 1
    if len(counts) == 1:
        return f"{steps[0]:.3g}"
    bars = ", ".join(f"{value}: {count}" for value, count in sorted(counts.items()))
    return (
        f"{sum(steps) / len(steps):.1f} ({bars})"
        if len(counts) <= 9
        else (f"{sum(steps) / len(steps):.1f} ({min(counts)} to {max(counts)})")
    )


def size(count: int | None) -> str:
    """Format bytes in a readable unit."""
    if count is None:
        return "-"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def peak(count: int | None) -> str:
    """Format the rise of memory; it is a lower bound, as reuse of pages freed before is not visible."""
    return "below 1 MiB" if count is not None and count < 2**20 else size(count)


def score_table(rows: Rows) -> list[str]:
    """Return Markdown: agreement and distances of the full run and of settings near the speeds of the tables."""
    full = next((r for r in rows if r["kind"] == "full"), {})
    kinds = {
        "agreement": "asked class", "same_class": "class of own full run", "kid_real": "KID to real",
        "kid_full": "KID to full run", "feature_distance": "feature distance",
    }  # fmt: skip
    scored = [r for r in measured(rows) if any(k in r for k in kinds) and (r["method"] == "none" or near(r))]
    used = [k for k in kinds if any(k in r for r in [*scored, full])]
    if not used:
        return []
    lines = [f"| method | FLOPs | {' | '.join(kinds[k] for k in used)} |", f"| --- | ---: |{' ---: |' * len(used)}"]
    for row in scored:
        cells = [_score(k, row.get(k)) for k in used]
        lines.append(f"| {row['method']} {row['value']} | {row['flops_speedup']:.2f}x | {' | '.join(cells)} |")
    return lines


def near(row: dict[str, Any]) -> bool:
    """Whether a setting is near a speed of the tables."""
    return any(abs(row["flops_speedup"] / speed - 1) < 0.15 for speed in SPEEDS)


def _score(kind: str, value: Any) -> str:
    if value is None:
        return "-"
    if kind in ("agreement", "same_class"):
        return f"{value:.1%}"
    return f"{statistics.median(value) if isinstance(value, list) else value:.4f}"


def batch_table(rows: Rows) -> list[str]:
    """Return Markdown: realised speed-up in time by size of the batch, nearest setting to each speed of the tables."""
    batches = sorted({r["batch"] for r in rows if r["kind"] == "time"})
    if len(batches) < 2:
        return []
    by = {b: {(r["method"], r["value"]): r["wall_all"] for r in measured(rows, b)} for b in batches}
    lines = [
        f"| method | FLOPs | {' | '.join(f'batch {b}' for b in batches)} |",
        f"| --- | ---: |{' ---: |' * len(batches)}",
    ]
    for row in measured(rows):
        key = (row["method"], row["value"])
        found = [by[b].get(key) or [] for b in batches]
        if row["method"] != "none" and near(row) and all(found):
            cells = " | ".join(_range(ratios) for ratios in found)
            lines.append(f"| {row['method']} {row['value']} | {row['flops_speedup']:.2f}x | {cells} |")
    return lines if len(lines) > 2 else []


def _range(ratios: Sequence[float]) -> str:
    middle = f"{statistics.median(ratios):.2f}x"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f} to {max(ratios):.2f})"


def guarantee_table(rows: Rows, targets: Sequence[float] = (30.0, 34.0, 38.0, 42.0)) -> list[str]:
    """Return a table of the largest speed-up at which the 5th percentile of each method reaches a quality."""
    lines = [
        f"| method | {' | '.join(f'P5 at {t:g} dB' for t in targets)} |",
        f"| --- |{' ---: |' * len(targets)}",
    ]
    found = []
    for name, points in curves(rows).items():
        speeds = [needed(points, target, 0.05) for target in targets]
        cells = [f"{speed:.2f}x" if speed else "-" for speed in speeds]
        found.append((sum(s or 0.0 for s in speeds), f"| {name} | {' | '.join(cells)} |"))
    return [*lines, *(line for _, line in sorted(found, reverse=True))]


def adapting(rows: Rows, targets: Sequence[float] = (30.0, 34.0, 38.0, 42.0)) -> list[str]:
    """Return a sentence on the FLOPs of per-sample plans against fixed schedules at the same 5th percentile."""
    found = curves(rows)
    if ADAPTIVE not in found or not any(name in found for name in PLACED):
        return []
    words, more = [], []
    for target in targets:
        own = needed(found[ADAPTIVE], target, 0.05)
        others = [speed for name in PLACED if (speed := needed(found.get(name, []), target, 0.05))]
        if own and others:
            more.append(max(others) / own - 1)
            words.append(f"{more[-1]:+.0%} at {target:g} dB")
    if not words:
        return []
    enough = max(more) <= -0.15
    verdict = "That is worth it" if enough else "That is not the 15 % less that would justify deciding by sample"
    return [
        f"**Is it worth adapting to each sample?** `{ADAPTIVE}` plans each sample's drafts by its own corrections; "
        f"{' and '.join(f'`{n}`' for n in PLACED if n in found)} took full steps that were searched for this model, "
        f"the same for all samples, with the same corrector. For the same 5th percentile adapting spends, in FLOPs, "
        f"{', '.join(words)}. {verdict}; `{OURS}` places full steps for all samples alike."
    ]


def signal_table(rows: Rows) -> list[str]:
    """Return Markdown: rank correlations and areas under the curve of each error signal."""
    found = verdicts(rows)
    if not found:
        why = next((r["reason"] for r in rows if r["kind"] == "no signals"), "")
        return [f"Not measured: {why}"] if why else []
    lines = [
        "| signal | Spearman, true error | among samples | AUC | Spearman, effect | among samples | AUC |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(found, key=lambda r: -r["spearman effect"]):
        cells = [f"{row[f'{k} {t}']:.2f}" for t in ("true error", "effect") for k in ("spearman", "within", "auc")]
        lines.append(f"| {row['signal']} | {' | '.join(cells)} |")
    return lines


def missing_table(rows: Rows) -> list[str]:
    """Return Markdown: what could not run, and why."""
    lines = []
    for (method, why), values in missing(rows).items():
        lines.append(f"| {method} | {', '.join(map(str, values))} | {why.replace('|', '/')} |")
    return ["| method | settings | why |", "| --- | --- | --- |", *lines] if lines else []
