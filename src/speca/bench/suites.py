"""Suites, and the run that fills a file of JSON lines: quality first, then rounds of timing; it can be resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from ..measure import Run, example_call, hardware
from .measure import full_steps, quality, run, run_counted, search
from .methods import Method, chosen

Progress = Callable[[int, int, str], None]
"""Called with (settings done, settings in all, what comes next)."""

TUNING_SEED = 500_000  # tuning seeds count up from here, reporting seeds from 0


@dataclass(frozen=True)
class Suite:
    """How much is run: samples reported on, samples of a timed call, rounds of timing, tuning samples and tries."""

    samples: int
    timed: int
    rounds: int
    tuning: int
    tries: int
    batch: int = 16
    steps: int = 50

    def __post_init__(self) -> None:
        if self.samples > TUNING_SEED:
            raise InputError(f"{self.samples} samples would reach the tuning seeds; use {TUNING_SEED} or fewer.")


SUITES = {
    "quick": Suite(samples=12, timed=2, rounds=1, tuning=4, tries=4),
    "full": Suite(samples=128, timed=8, rounds=7, tuning=16, tries=60, batch=32),
}


def suite(name: str) -> Suite:
    """The suite called `name`; InputError with the nearest name if there is none."""
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}; {nearest(name, SUITES)}")
    return SUITES[name]


def arguments(pipe: Any, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Arguments of a call with one class or prompt a seed, the same for the same seed in every run."""
    return {**example_call(pipe, seeds), "num_inference_steps": steps}


Arguments = Callable[[Any, Sequence[int], int], dict[str, Any]]


class Bench:
    """One model, one suite, one file `results.jsonl` in `out`.

    Rows already in the file are kept. A file of another model or suite is refused: its rows would not be comparable.
    """

    def __init__(
        self,
        pipe: Any,
        model: str,
        plan: Suite,
        out: Path,
        field: Sequence[Method] = (),
        make: Arguments = arguments,
    ) -> None:
        """`field` holds the methods, none to measure against first; without it, all that there are."""
        self.pipe, self.plan, self.make = pipe, plan, make
        self.field = list(field) or chosen([], plan.steps)
        self.file = out / "results.jsonl"
        self.seeds = list(range(plan.samples))
        self.tuning = list(range(TUNING_SEED, TUNING_SEED + plan.tuning))
        about = {"model": model, "suite": dataclasses.asdict(plan), "seeds": self.seeds, "tuning_seeds": self.tuning}
        self.rows: list[dict[str, Any]] = []
        if self.file.is_file():
            self.rows = read(self.file)
            for name, value in about.items():
                if self.rows[0].get(name) != value:
                    raise InputError(f"{self.file} was begun with another {name}; give --out another folder.")
        else:
            out.mkdir(parents=True, exist_ok=True)
            self._write({"kind": "about", **about, "hardware": hardware(pipe), "versions": versions()})

    def run(self, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Do what is missing, and return all rows."""
        settings = [(method, value) for method in self.field for value in method.values]
        total = len(settings) * (1 + self.plan.rounds)
        call, reference = self.make(self.pipe, self.seeds, self.plan.steps), None
        for done, (method, value) in enumerate(settings):
            if progress:
                progress(done, total, f"{method.name} {value}")
            if self._has("quality", method, value):
                continue
            if reference is None:
                reference = run_counted(self.field[0], self.pipe, call, 0, self.seeds, self.plan.batch)
            self._quality(method, value, call, reference)
        for number in range(self.plan.rounds):
            for done, (method, value) in enumerate(settings):
                if progress:
                    progress(len(settings) * (1 + number) + done, total, f"timing {method.name} {value}")
                self._time(method, value, number)
        return self.rows

    def _quality(self, method: Method, value: Any, call: dict[str, Any], reference: tuple[Run, int]) -> None:
        row: dict[str, Any] = {"kind": "quality", "method": method.name, "knob": method.knob, "value": value}
        full, flops_full = reference
        try:
            given = value
            if method.searched:
                tuning = self.make(self.pipe, self.tuning, self.plan.steps)
                given = search(method, self.pipe, tuning, value, self.tuning, self.plan.batch, self.plan.tries)
                row["schedule"] = sorted(given)
            made, flops = run_counted(method, self.pipe, call, given, self.seeds, self.plan.batch)
        except Exception as error:  # rivals raise whatever they like; the row says what
            words = (str(error).strip().splitlines() or ["no message"])[0]
            self._write({**row, "reason": f"{type(error).__name__}: {words[:300]}"})
            return
        row |= {"flops": flops, "flops_full": flops_full, "flops_speedup": flops_full / flops}
        row["full_steps"] = full_steps(made, self.plan.steps, flops, flops_full)
        if made.report:
            row |= {"bytes_per_sample": made.report.bytes_per_sample, "host_reads": made.report.host_reads}
        self._write({**row, **quality(made.images, full.images)})

    def _time(self, method: Method, value: Any, number: int) -> None:
        if self._has("time", method, value, number):
            return
        known = next(
            r for r in self.rows if r["kind"] == "quality" and (r["method"], r["value"]) == (method.name, value)
        )
        if "reason" in known:
            return
        seeds = self.seeds[: self.plan.timed]
        given = frozenset(known["schedule"]) if method.searched else value
        made = run(method, self.pipe, self.make(self.pipe, seeds, self.plan.steps), given, seeds, self.plan.timed)
        row = {"kind": "time", "method": method.name, "value": value, "round": number}
        self._write({**row, "seconds": made.seconds, "seconds_total": made.seconds_total})

    def _has(self, kind: str, method: Method, value: Any, number: int | None = None) -> bool:
        wanted = (kind, method.name, value, number)
        return any((r["kind"], r.get("method"), r.get("value"), r.get("round")) == wanted for r in self.rows)

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a results file, the first of which says what was run; a last line cut short is dropped from it."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        file.write_text("".join(lines), encoding="utf-8")
    if not lines:
        raise InputError(f"{file} is empty; delete it, or give --out another folder.")
    return [json.loads(line) for line in lines]


def versions() -> dict[str, str]:
    """Installed versions of everything that is compared."""
    return {name: _version(name) for name in ("speca-diffusers", "torch", "diffusers", "cache-dit", "torchmetrics")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
