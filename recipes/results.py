"""Measure every preset on the bundled model and write the table of the README.

    python recipes/results.py                  # about ten minutes on two cores

64 samples on seeds 0 to 63, which tuned nothing. For each preset the same seeds are drawn with and without
acceleration, interleaved. Fewer steps of the same sampler, at about the cost of each preset, stand beside.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from speca.compare import compare, psnr, quantile
from speca.config import PRESETS
from speca.zoo import resolve

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def main(
    model: Annotated[str, typer.Option(help="Bundled name.")] = "fashion-dit",
    samples: Annotated[int, typer.Option(help="Samples, on seeds from 0.", min=2)] = 64,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=8)] = 50,
    repeats: Annotated[int, typer.Option(help="Interleaved pairs of runs; times are medians.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    out: Annotated[Path, typer.Option(help="Raw results.")] = Path("docs/results/fashion-dit.json"),
    readme: Annotated[Path, typer.Option(help="File whose results region is replaced.")] = Path("README.md"),
) -> None:
    """Measure and write."""
    torch.set_num_threads(threads)
    pipe = resolve(model)
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(samples))
    call: dict[str, Any] = dict(class_labels=[s % 10 for s in seeds], num_inference_steps=steps)

    results = []
    for preset in track(list(PRESETS), description="presets"):
        result = compare(pipe, call, seeds, preset, repeats=repeats)
        results.append({**result.to_dict(), "model": model, "command": "python recipes/results.py"})
    full = result.full.images
    fewer = []
    for cost in track([r["flops_speedup"] for r in results], description="fewer steps"):
        count = round(steps / cost)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        images = pipe(**{**call, "num_inference_steps": count}, generator=generators, output_type="np").images
        values = psnr(torch.as_tensor(images), full).tolist()
        fewer.append(dict(steps=count, psnr_median=quantile(values, 0.5), psnr_p5=quantile(values, 0.05)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(presets=results, fewer_steps=fewer), indent=1) + "\n")
    text = readme.read_text()
    readme.write_text(
        re.sub(f"{BEGIN}.*{END}", f"{BEGIN}\n{table(results, fewer, steps)}\n{END}", text, flags=re.DOTALL)
    )


def table(results: list[dict[str, Any]], fewer: list[dict[str, Any]], steps: int) -> str:
    """The README's table in Markdown."""
    machine = results[0]["hardware"]
    about = ", ".join(f"{k} {v}" for k, v in machine.items())
    lines = [
        f"`{results[0]['model']}`, {steps}-step DDIM, guidance 4, {len(results[0]['seeds'])} samples in batches of 16,",
        f"on seeds that tuned nothing; `{results[0]['command']}`; {about}.",
        "",
        "| preset | computed steps, mean (least to most) | FLOPs | transformer time | PSNR median / 5 % "
        "| fewer steps instead |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r, plain in zip(results, fewer, strict=True):
        computed = [s["full"] + s["rejected"] for s in r["samples"]]
        lines.append(
            f"| `{r['preset']}` | {sum(computed) / len(computed):.1f} ({min(computed)} to {max(computed)}) "
            f"| {r['flops_speedup']:.2f}x less | {r['wall_speedup']:.2f}x less "
            f"| {r['psnr_median']:.1f} / {r['psnr_p5']:.1f} dB "
            f"| {plain['steps']} steps: {plain['psnr_median']:.1f} / {plain['psnr_p5']:.1f} dB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
