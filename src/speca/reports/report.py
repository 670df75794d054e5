"""What a run cost and saved: per-sample trace, totals, JSON, picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..core.controller import ACCEPTED, FULL, REJECTED, Record
from ..errors import NotEnabledError
from .costs import Costs

COST = {ACCEPTED: 0, FULL: 1, REJECTED: 2}
COLOURS = {FULL: "#1f3b57", ACCEPTED: "#8fd0a5", REJECTED: "#d8573c"}
DOT: dict[str, Any] = dict(s=6, color="#1f3b57", linewidth=0, zorder=3)
MEANING = {FULL: "full", ACCEPTED: "draft accepted", REJECTED: "draft rejected, recomputed"}


@dataclass(frozen=True)
class SampleReport:
    """One image: a letter per step (F full, A accepted, R rejected and recomputed), counts, errors of checked drafts.

    Where an image takes several calls a step (cond and uncond), a step counts as the costliest of them.
    """

    index: int
    decisions: str
    errors: tuple[float | None, ...]

    @property
    def full(self) -> int:
        """Steps planned in full."""
        return self.decisions.count(FULL)

    @property
    def accepted(self) -> int:
        """Steps that were forecast."""
        return self.decisions.count(ACCEPTED)

    @property
    def rejected(self) -> int:
        """Steps whose forecast was rejected and which were computed in full."""
        return self.decisions.count(REJECTED)

    @property
    def checked(self) -> tuple[int, ...]:
        """Places in `decisions` of the drafts that the verify block has checked."""
        return tuple(place for place, error in enumerate(self.errors) if error is not None)

    @property
    def worst_error(self) -> float | None:
        """Largest verification error among accepted drafts, None if none was verified."""
        kept = [e for e, d in zip(self.errors, self.decisions, strict=True) if e is not None and d == ACCEPTED]
        return max(kept, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(
            index=self.index, full=self.full, accepted=self.accepted, rejected=self.rejected,
            worst_error=self.worst_error, decisions=self.decisions, checked=list(self.checked),
        )  # fmt: skip

    @classmethod
    def merge(cls, index: int, records: Sequence[Record]) -> SampleReport:
        """Return the report of one sample from its records in all branches, which need not take part in every step."""
        letters: dict[int, list[str]] = {}
        measured: dict[int, list[float]] = {}
        for r in records:
            for step, letter, error in zip(r.steps, r.decisions, r.errors, strict=True):
                letters.setdefault(step, []).append(letter)
                measured.setdefault(step, []).extend([] if error is None else [error])
        steps = sorted(letters)
        decisions = "".join(max(letters[step], key=COST.__getitem__) for step in steps)
        return cls(index, decisions, tuple(max(measured[step], default=None) for step in steps))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the last run of a pipeline, model or denoiser cost and saved.

    Attributes:
        model: class of the model; where a pipeline has several, of all that took part.
        config: the settings used, as plain values.
        steps: calls of the model for one sample and branch: denoising steps, or more where a sampler needs several.
        samples: one report per sample.
        evaluations, evaluations_full: evaluations of the model, in rows of its calls; and those of the same run without
            acceleration. A forecast output costs none.
        flops, flops_full: the same in FLOPs of PyTorch's counter, checks, rejected drafts and the one-time self-test
            included; only counted where drafts are checked, else None.
        seconds: spent in calls of the model; seconds_full: the same without acceleration, estimated from the steps of
            this run in which every row was full. Measure with `speca generate --compare` for a true figure.
        bytes_per_sample: what was kept per sample while running, at most.
        host_reads: times that numbers were read from the device to decide.
        notes: what else the user should know, for instance why a model ran plainly.
    """

    model: str
    config: dict[str, Any]
    steps: int
    samples: tuple[SampleReport, ...]
    evaluations: int
    evaluations_full: int
    flops: float | None
    flops_full: float | None
    seconds: float
    seconds_full: float | None
    bytes_per_sample: int
    host_reads: int
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls, model: str, config: dict[str, Any], records: Sequence[Record], costs: Costs, notes: Sequence[str]
    ) -> Report:
        """Return the report of a run from the records of its samples in all branches, and its costs.

        Raises:
            NotEnabledError: nothing has run yet.
        """
        if not records and not notes:
            raise NotEnabledError("nothing has run yet; call the pipeline first, then ask for the report.")
        of_sample: dict[int, list[Record]] = {}
        for record in records:
            of_sample.setdefault(record.sample, []).append(record)
        samples = tuple(SampleReport.merge(i, of_sample[i]) for i in sorted(of_sample))
        return cls(
            model=model, config=config, steps=max((len(s.decisions) for s in samples), default=0), samples=samples,
            evaluations=costs.evaluations, evaluations_full=costs.evaluations_full,
            flops=costs.flops, flops_full=costs.flops_full, seconds=costs.seconds,
            seconds_full=median(costs.full_rates) * costs.row_calls if costs.full_rates else None,
            bytes_per_sample=costs.peak // max(1, len(samples)), host_reads=costs.host_reads, notes=tuple(notes),
        )  # fmt: skip

    @property
    def flops_speedup(self) -> float:
        """FLOPs of the model without acceleration over those spent; 1.0 where nothing ran.

        Where drafts run nothing of the model, that is the ratio of its evaluations.
        """
        if self.flops and self.flops_full:
            return self.flops_full / self.flops
        return self.evaluations_full / self.evaluations if self.evaluations else 1.0

    @property
    def wall_speedup(self) -> float | None:
        """Estimated seconds without acceleration over seconds spent; None where nothing can be estimated."""
        return self.seconds_full / self.seconds if self.seconds_full and self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `samples` holds one dictionary per image."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["samples"] = [s.to_dict() for s in self.samples]
        values["notes"] = list(self.notes)
        return {**values, "flops_speedup": self.flops_speedup, "wall_speedup_estimate": self.wall_speedup}

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON text, also written to `path` if given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def __str__(self) -> str:
        wall = f"about {self.wall_speedup:.2f}x in time, " if self.wall_speedup else ""
        lines = [
            f"{self.model}: {self.steps} steps, {len(self.samples)} samples",
            f"  {self.flops_speedup:.2f}x fewer FLOPs ({self._spent()}), "
            f"{wall}{self.bytes_per_sample / 2**20:.2f} MiB kept per sample",
            "  sample  full  accepted  rejected  checked  worst error",
        ]
        for s in self.samples:
            worst = "-" if s.worst_error is None else f"{s.worst_error:.4f}"
            counts = f"{s.full:4d}  {s.accepted:8d}  {s.rejected:8d}  {len(s.checked):7d}"
            lines.append(f"  {s.index:6d}  {counts}  {worst:>11}")
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])

    def _spent(self) -> str:
        if self.flops is not None and self.flops_full is not None:
            return f"{self.flops / 1e9:.2f} of {self.flops_full / 1e9:.2f} GFLOPs"
        return f"{self.evaluations} of {self.evaluations_full} evaluations of the model"

    def plot(self, path: str | Path) -> None:
        """Write a picture of which steps of which sample were full, accepted, rejected and checked (PNG, SVG, PDF)."""
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch, Rectangle

        rows = len(self.samples)
        steps = max((len(s.decisions) for s in self.samples), default=1)
        figure = Figure(figsize=(max(7.0, 0.17 * steps + 3), max(2.4, 0.26 * rows + 1.7)), layout="constrained")
        axes = figure.subplots()
        for y, sample in enumerate(self.samples):
            for x, letter in enumerate(sample.decisions):
                axes.add_patch(Rectangle((x + 0.04, y - 0.42), 0.92, 0.84, color=COLOURS[letter], linewidth=0))
            axes.scatter([x + 0.5 for x in sample.checked], [y] * len(sample.checked), **DOT)
            axes.text(steps + 0.4, y, f"{sample.full + sample.rejected}", va="center", fontsize=8)
        axes.set(
            xlim=(0, steps + 2.5), ylim=(rows - 0.4, -0.8), xlabel="denoising step", ylabel="sample",
            yticks=range(rows), yticklabels=[str(s.index) for s in self.samples],
        )  # fmt: skip
        axes.text(steps + 0.4, -0.75, "computed", fontsize=7, va="bottom", ha="center")
        axes.set_title(f"{self.model}: {self.flops_speedup:.2f}x fewer FLOPs over {self.steps} steps", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        handles: list[Any] = [Patch(color=COLOURS[k], label=MEANING[k]) for k in (FULL, ACCEPTED, REJECTED)]
        if any(s.checked for s in self.samples):
            handles.append(Line2D([], [], marker="o", linestyle="", color="#1f3b57", markersize=3, label="checked"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        figure.savefig(path, dpi=130)
