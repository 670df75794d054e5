"""Reproduce the tables of the paper: write samples in the layouts that the usual scorers read. The weights are needed.

`paper-dit`: DiT-XL/2 on ImageNet 256, 50 DDIM steps, guidance 1.5, 50,000 images, FID and Inception Score.
`paper-flux`: FLUX.1-dev, the 200 prompts of DrawBench, ImageReward and CLIP score.
`paper-hunyuan`: HunyuanVideo on the prompts of VBench, five videos each, named as VBench wants them.

A run can be resumed: existing samples are kept. FLOPs are counted on the first batch of a setting.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, nearest
from ..reports.measure import hardware, run_once, ticking
from .field import chosen
from .measure import counted
from .methods import Method
from .published import PUBLISHED
from .scorers import Scorer, clip_score, fidelity, image_reward, vbench
from .suites import Progress, read, shape, versions

MEASURED = (
    "none", "fewer-steps", "taylor-modules", "released-modules", "speca-paper", "speca", "speca-budget",
    "first-block-cache", "cache-dit-taylor",
)  # fmt: skip


@dataclass(frozen=True)
class Paper:
    """One table of the paper: model, number of samples, arguments of the calls, and scorers."""

    model: str
    pipeline: str
    samples: int
    call: dict[str, Any] = field(repr=False)
    scorers: tuple[Scorer, ...] = field(repr=False)
    prompts: str = ""
    repeats: int = 1
    batch: int = 1
    steps: int = 50


PAPERS: dict[str, Paper] = {
    "paper-dit": Paper(
        "facebook/DiT-XL-2-256", "DiTPipeline", 50_000, dict(guidance_scale=1.5), (fidelity,), batch=32
    ),
    "paper-flux": Paper(
        "black-forest-labs/FLUX.1-dev", "FluxPipeline", 200, dict(height=1024, width=1024, guidance_scale=3.5),
        (image_reward, clip_score), prompts="the 200 prompts of DrawBench (Imagen, arXiv:2205.11487)",
    ),
    "paper-hunyuan": Paper(
        "hunyuanvideo-community/HunyuanVideo", "HunyuanVideoPipeline", 946 * 5,
        dict(height=480, width=640, num_frames=65, guidance_scale=6.0), (vbench,),
        prompts="prompts/all_dimension.txt of the repository Vchitect/VBench", repeats=5,
    ),
}  # fmt: skip


def paper(name: str) -> Paper:
    """Return the suite called `name`; raise InputError with the nearest name if there is none."""
    if name not in PAPERS:
        raise InputError(f"there is no suite {name!r}; {nearest(name, PAPERS)}")
    return PAPERS[name]


def weights(plan: Paper, model: str, load: Callable[[str], Any]) -> Any:
    """Load the pipeline `model`, or that of the paper if `model` is empty.

    Raises:
        InputError: the weights are not found, or the pipeline has another class than the paper's.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        pipe = load(model or plan.model)
    except InputError as problem:
        raise InputError(
            f"{model or plan.model} was not found ({str(problem).rstrip('.')}). It is looked for in {HF_HUB_CACHE}, "
            f"where `hf download {plan.model}` puts it (FLUX.1-dev also asks for `hf auth login`), or name the folder "
            f"of any {plan.pipeline} instead: speca bench FOLDER --suite ..."
        ) from problem
    if type(pipe).__name__ != plan.pipeline:
        raise InputError(f"this suite is about a {plan.pipeline}; {model} is a {type(pipe).__name__}.")
    return pipe


class PaperRun:
    """Run one suite on one pipeline; samples go to `out/samples`, rows to `out/results.jsonl`."""

    def __init__(
        self,
        pipe: Any,
        name: str,
        out: Path,
        *,
        names: Sequence[str] = (),
        prompts: Path | None = None,
        reference: Path | None = None,
        samples: int | None = None,
        sizes: dict[str, Any] | None = None,
        sweep: int = 3,
    ) -> None:
        """`prompts`: file, one prompt per line; `reference`: folder of real images; `sizes`: extra call arguments."""
        self.plan, self.pipe, self.name, self.out, self.reference = paper(name), pipe, name, out, reference
        self.prompts = self._prompts(prompts)
        count = min(self.plan.samples, len(self.prompts) * self.plan.repeats) if self.prompts else self.plan.samples
        self.samples = min(samples, count) if samples else count
        self.call = {**self.plan.call, **(sizes or {}), "num_inference_steps": self.plan.steps}
        if sizes and "num_inference_steps" in sizes:
            self.call["num_inference_steps"] = sizes["num_inference_steps"]
        self.field = chosen(list(names or MEASURED), self.call["num_inference_steps"], sweep)
        self.file = out / "results.jsonl"
        about = {"suite": name, "samples": self.samples, "call": {k: str(v) for k, v in self.call.items()}}
        out.mkdir(parents=True, exist_ok=True)
        self.rows = read(self.file) if self.file.is_file() else []
        if not self.rows:
            self._write({"kind": "about", **about, "hardware": hardware(pipe), "versions": versions(), **shape(pipe)})
        for key, value in about.items():
            if self.rows[0].get(key) != value:
                raise InputError(f"{self.file} was begun with another {key}; give --out another folder.")

    def run(self, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Make the samples of every setting and score them; returns all rows."""
        settings = [(method, value) for method in self.field for value in method.values]
        flops_full: float | None = None
        for done, (method, value) in enumerate(settings):
            known = next((r for r in self.rows if (r.get("method"), r.get("value")) == (method.name, value)), None)
            if known is None:
                if progress:
                    progress(done, len(settings), f"{method.name} {value}")
                known = self._setting(method, value, flops_full)
                self._write(known)
            if method.name == "none":
                flops_full = known.get("flops")
        return self.rows

    def _setting(self, method: Method, value: Any, flops_full: float | None) -> dict[str, Any]:
        row: dict[str, Any] = {"kind": "quality", "method": method.name, "knob": method.knob, "value": value}
        folder = self.out / "samples" / re.sub(r"[^\w.]+", "-", f"{method.name}-{value}")
        if method.prepare:
            return {**row, "reason": "a schedule is searched on tuning samples, and the paper's suites have none"}
        try:
            seconds, made, flops = self._make(method, value, folder)
        except Exception as error:  # other packages raise errors of any type; the row keeps the message
            return {**row, "reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
        row |= {"seconds": seconds, "made": made, "flops": flops, "folder": folder.name}
        if flops:
            row["flops_speedup"] = 1.0 if method.name == "none" else (flops_full or flops) / flops
        return {**row, **self._scored(folder)}

    def _scored(self, folder: Path) -> dict[str, Any]:
        scores: dict[str, float] = {}
        unscored: list[str] = []
        for scorer in self.plan.scorers:
            try:
                scores |= scorer(folder, self._captions(), self.reference)
            except InputError as problem:  # noqa: PERF203, one scorer may be missing where another is installed
                unscored.append(str(problem))
        return {"scores": scores, "unscored": unscored}

    def _make(self, method: Method, value: Any, folder: Path) -> tuple[float, int, float | None]:
        """Make the missing samples; return their seconds, their number, and the FLOPs per sample of the first batch."""
        folder.mkdir(parents=True, exist_ok=True)
        missing = [k for k in range(self.samples) if not self._place(folder, k)]
        parts = [missing[k : k + self.plan.batch] for k in range(0, len(missing), self.plan.batch)]
        seconds, flops = 0.0, None
        for number, part in enumerate(parts):
            began = time.perf_counter()
            with method.apply(self.pipe, self._call(part), value) as setup, ticking(setup.pipe, None, 0):
                if setup.begin:
                    setup.begin(part[0])
                if number == 0:
                    with counted(setup.pipe) as flops_of:
                        made = run_once(setup.pipe, setup.call, part, setup.session)
                    flops = flops_of.total / len(part)
                else:
                    made = run_once(setup.pipe, setup.call, part, setup.session)
                    seconds += time.perf_counter() - began
            for k, sample in zip(part, made.images, strict=True):
                save(sample, folder / self._stem(k))
        counted_samples = sum(len(part) for part in parts[1:])
        return seconds / counted_samples if counted_samples else 0.0, len(missing), flops

    def _call(self, part: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of the pipeline for some samples; sample k has seed k."""
        if not self.prompts:
            classes = self.pipe.transformer.config.num_embeds_ada_norm
            return {**self.call, "class_labels": [k % classes for k in part]}
        return {**self.call, "prompt": [self.prompts[k // self.plan.repeats] for k in part]}

    def _stem(self, k: int) -> str:
        """Return the file name of sample k: prompt and repetition for VBench, else the number of the sample."""
        if self.plan.repeats > 1:
            return f"{self.prompts[k // self.plan.repeats][:180]}-{k % self.plan.repeats}"
        return f"{k:06d}"

    def _place(self, folder: Path, k: int) -> Path | None:
        stem = self._stem(k)
        return next((p for p in (folder / f"{stem}{kind}" for kind in SUFFIXES) if p.is_file()), None)

    def _captions(self) -> list[str]:
        return [self.prompts[k // self.plan.repeats] for k in range(self.samples)] if self.prompts else []

    def _prompts(self, file: Path | None) -> list[str]:
        if not self.plan.prompts:
            return []
        if file is None or not file.is_file():
            given = f"{file} is no file" if file else "none was given"
            raise InputError(f"{self.name} needs --prompts FILE, one a line ({given}): {self.plan.prompts}.")
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row, allow_nan=False) + "\n")


# ------------------------------------------------------------------------------------------------ files
SUFFIXES = (".png", ".mp4", ".gif")


def save(sample: Tensor, stem: Path) -> Path:
    """Write an image (H, W, C) as PNG, a video (frames, H, W, C) as MP4 if a writer is installed, else as GIF."""
    from PIL import Image

    pixels = (sample.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    if pixels.ndim == 3:
        path = Path(f"{stem}.png")
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)
        return path
    try:
        import imageio

        path = Path(f"{stem}.mp4")
        imageio.mimwrite(path, list(pixels), fps=24)
    except (ImportError, ValueError):  # imageio is absent, or has no ffmpeg
        path = Path(f"{stem}.gif")
        frames = [Image.fromarray(frame) for frame in pixels]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=42, loop=0)
    return path


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown with the figures measured here and, below them, published figures with their sources."""
    plan, settings = paper(name), [r for r in rows if r["kind"] == "quality"]
    published = PUBLISHED[name]
    kinds = list(dict.fromkeys(k for r in settings for k in r.get("scores", {})))
    others = list(dict.fromkeys(k for row in published for k in row.figures))
    lines = [
        f"# {name}", "", f"{rows[0]['samples']} of {plan.samples} samples, {rows[0]['pipeline']} with "
        f"{rows[0]['parameters'] / 1e6:.0f} M parameters.", "",
        f"| measured here | made | FLOPs | s a sample | {' | '.join(kinds)}{' | ' if kinds else ''}remarks |",
        f"| --- | ---: | ---: | ---: |{' ---: |' * len(kinds)} --- |",
    ]  # fmt: skip
    for row in settings:
        remarks = row.get("reason", "; ".join(row.get("unscored", []))).replace("|", "/")
        scores = row.get("scores", {})
        cells = [f"{scores[k]:.3f}" if k in scores else "-" for k in kinds]
        speed = f"{row['flops_speedup']:.2f}x" if "flops_speedup" in row else "-"
        took = f"{row['seconds']:.2f}" if row.get("seconds") else "-"
        cells = [f"{row['method']} {row['value']}", str(row.get("made", "-")), speed, took, *cells, remarks]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| published | FLOPs | time | {' | '.join(others)} | source |"]
    lines.append(f"| --- | ---: | ---: |{' ---: |' * len(others)} --- |")
    for entry in published:
        cells = [f"{entry.figures[k]:g}" if k in entry.figures else "-" for k in others]
        speed, took = (f"{v:.2f}x" if v else "-" for v in (entry.speed, entry.latency))
        lines.append(f"| {' | '.join([entry.method, speed, took, *cells, entry.source])} |")
    return "\n".join(lines) + "\n"
