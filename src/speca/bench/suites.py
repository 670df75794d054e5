"""Suites and their execution: write a file of JSON lines, quality first, then rounds of timing; resumable."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..diffusers.components import denoisers_of
from ..errors import InputError, nearest
from ..reports.measure import Run, hardware, run_once, ticking
from .field import chosen
from .measure import Cost, full_steps, quality, timed, weighed
from .methods import Method
from .oracle import fewest_steps
from .pareto import SPEEDS
from .recording import TuningData
from .rivals import TUNING_SEED
from .scores import NEAR, Judge, arguments

Progress = Callable[[int, int, str], None]
"""Called with (settings done, settings in all, what comes next)."""

AGAIN = 60.0  # seconds after which the full run is timed anew, as a shared machine changes its pace
SHARE, COUNTED, PICTURE = 0.45, 1.35, 0.12
"""For `estimate`: share of a full run per setting, factor for counting FLOPs, seconds of features per picture."""
TARGETS = (30.0, 32.0, 34.0, 36.0, 38.0, 40.0, 44.0)  # PSNR in dB of "oracle-steps"


@dataclass(frozen=True)
class Timing:
    """Calls of `batch` samples, timed in `rounds`; with `near`, only settings near a speed of the tables."""

    batch: int
    rounds: int
    near: bool = False


@dataclass(frozen=True)
class Suite:
    """Size of a benchmark.

    Attributes:
        samples, batch, steps: samples reported on, samples of one call, denoising steps.
        sweep: number of settings of each method, 0 for all.
        timings: timed batch sizes and rounds, in this order.
        tuning, tries: tuning samples, and runs over them in the search for a schedule.
        features: whether to compute distances between sets, near the speeds of the tables.
        signals: samples on which error signals are compared with the true error, 0 for none.
    """

    samples: int
    tuning: int
    tries: int
    sweep: int = 0
    timings: tuple[Timing, ...] = (Timing(2, 1),)
    features: bool = False
    signals: int = 0
    batch: int = 16
    steps: int = 50

    def __post_init__(self) -> None:
        if self.samples > TUNING_SEED:
            raise InputError(f"{self.samples} samples would reach the tuning seeds; use {TUNING_SEED} or fewer.")


SUITES = {
    "quick": Suite(samples=6, tuning=4, tries=3, sweep=4, batch=6, timings=(Timing(2, 2),)),
    "full": Suite(
        samples=32, tuning=8, tries=14, batch=16, features=True, signals=8,
        timings=(Timing(8, 1), Timing(8, 2, near=True), Timing(1, 3, near=True), Timing(32, 1, near=True)),
    ),
}  # fmt: skip


def suite(name: str) -> Suite:
    """Return the suite called `name`; raise InputError with the nearest name if there is none."""
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}; {nearest(name, SUITES)}")
    return SUITES[name]


Arguments = Callable[[Any, Sequence[int], int], dict[str, Any]]


class Bench:
    """Run one suite on one model; rows go to the file `results.jsonl` in `out`.

    Rows already in the file are kept. Raise InputError for a file of another model or suite.
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
        """`field` holds the methods, the baseline "none" first; if empty, all methods are run."""
        self.pipe, self.model, self.plan, self.make = pipe, model, plan, make
        self.field = list(field) or chosen([], plan.steps, plan.sweep)
        self.file = out / "results.jsonl"
        self.seeds = list(range(plan.samples))
        self.tuning = list(range(TUNING_SEED, TUNING_SEED + plan.tuning))
        about = {"model": model, "suite": _plain(plan), "seeds": self.seeds, "tuning_seeds": self.tuning}
        self.rows: list[dict[str, Any]] = []
        if self.file.is_file():
            self.rows = read(self.file)
            for name, value in about.items():
                if self.rows[0].get(name) != value:
                    raise InputError(f"{self.file} was begun with another {name}; give --out another folder.")
        else:
            out.mkdir(parents=True, exist_ok=True)
            self._write({"kind": "about", **about, "hardware": hardware(pipe), "versions": versions(), **shape(pipe)})
        self._data = TuningData(
            pipe, self.call(self.seeds), self.seeds, self.call(self.tuning), self.tuning, plan.batch, plan.tries
        )

    def call(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return call arguments for one sample per seed."""
        return self.make(self.pipe, seeds, self.plan.steps)

    @property
    def settings(self) -> list[tuple[Method, Any]]:
        return [(method, value) for method in self.field for value in method.values]

    def estimate(self) -> float:
        """Estimate the seconds of the suite on this machine from one full run of a few samples; error up to a third."""
        seeds, plan = self.tuning[:4], self.plan
        with ticking(self.pipe, None, 0):
            run_once(self.pipe, {**self.call(seeds), "num_inference_steps": 2}, seeds, None)  # the first call is slow
            began = time.process_time()
            made = run_once(self.pipe, self.call(seeds), seeds, None)
        alone = time.process_time() - began if made.hardware["device"] == "cpu" else made.seconds_total
        sample = alone / len(seeds) / (made.hardware["threads"] if made.hardware["device"] == "cpu" else 1)
        return sample * self.effort() + (PICTURE * self.samples_near() if plan.features else 0.0)

    def effort(self) -> float:
        """Estimate the cost of the suite in full runs of one sample."""
        plan, settings = self.plan, len(self.settings)
        searched = [v for m in self.field for v in m.values if m.name.startswith("searched")]
        near = 2.5 * len(self.field)  # settings near a speed of the tables
        work: float = settings * plan.samples * SHARE * COUNTED + 2 * plan.samples
        work += sum(plan.tuning * (plan.tries + 2) * v / plan.steps * 1.5 for v in searched)
        for timing in plan.timings:
            count = near if timing.near else settings
            work += timing.rounds * timing.batch * (count * SHARE * 1.2 + len(self.field) / 2)
        return work + plan.signals * 12 * 2.5

    def samples_near(self) -> float:
        """Estimate the number of pictures whose features are computed."""
        return self.plan.samples * 2.5 * len(self.field)

    def run(self, progress: Progress | None = None) -> list[dict[str, Any]]:
        """Run missing settings and timings; return all rows."""
        self._progress = progress or (lambda done, total, what: None)
        self._done, self._total = 0, len(self.settings) * (1 + sum(t.rounds for t in self.plan.timings))
        with ticking(self.pipe, None, 0):  # one bar is enough
            self._all_quality()
            for timing in self.plan.timings:
                for number in range(timing.rounds):
                    self._round(timing, number)
            if self.plan.signals and not any(r["kind"] in ("signal", "no signals") for r in self.rows):
                self._signals()
        return self.rows

    def _all_quality(self) -> None:
        missing = [(m, v) for m, v in self.settings if not self._has("quality", m, v)]
        self._done += len(self.settings) - len(missing)
        if not missing:
            return
        full, cost = weighed(self.field[0].apply, self.pipe, self.call(self.seeds), 0, self.seeds, self.plan.batch)
        judge = Judge(self.model, self.pipe, self.seeds, self.plan.features)
        scores = judge.of_full(full.images)
        if len(missing) == len(self.settings):
            self._write({"kind": "full", **scores, "notes": judge.notes})
        for method, value in missing:
            self._next(f"{method.name} {value}")
            self._quality(method, value, full, cost, judge)
        for row in fewest_steps(self.rows, "searched-schedule", TARGETS):
            if not self._has("quality", row["method"], row["value"]):
                self._write(row)

    def _quality(self, method: Method, value: Any, full: Run, full_cost: Cost, judge: Judge) -> None:
        row: dict[str, Any] = {"kind": "quality", "method": method.name, "knob": method.knob, "value": value}
        row |= {"family": method.family, "package": method.package, "steps": self.plan.steps}
        try:
            given = value
            if method.prepare:
                given = row["given"] = method.prepare(self._data, value)
            made, cost = weighed(method.apply, self.pipe, self.call(self.seeds), given, self.seeds, self.plan.batch)
        except Exception as error:  # other packages raise errors of any type; the row keeps the message
            words = (str(error).strip().splitlines() or ["no message"])[0]
            self._write({**row, "reason": f"{type(error).__name__}: {words[:300]}"})
            return
        flops_full = full_cost.flops
        speed = flops_full / cost.flops
        row |= {"flops": cost.flops, "flops_full": flops_full, "flops_speedup": speed, "peak_bytes": cost.peak}
        row["full_steps"] = full_steps(made, self.plan.steps, cost.flops, flops_full)
        row["bytes_per_sample"] = cost.kept
        if made.report:
            row["host_reads"] = made.report.host_reads
        self._write({**row, **quality(made.images, full.images), **judge.of(made.images, speed)})

    def _round(self, timing: Timing, number: int) -> None:
        """Run one round of timing; the full run is timed again every AGAIN seconds."""
        full, taken = None, -AGAIN
        for method, value in self.settings:
            self._next(f"timing {method.name} {value}, batch {timing.batch}")
            known = self._known(method, value)
            if self._has("time", method, value, (timing.batch, number)) or not _timed(known, timing):
                continue
            if full is None or time.monotonic() - taken > AGAIN:
                full, taken = self._play(self.field[0], 0, timing.batch), time.monotonic()
            made = full if method.name == "none" else self._play(method, known.get("given", value), timing.batch)
            (run, spent), (plain, spent_full) = made, full
            self._write(
                {"kind": "time", "method": method.name, "value": value, "round": number, "batch": timing.batch,
                 "seconds": run.seconds, "seconds_total": run.seconds_total, "seconds_full": plain.seconds,
                 "seconds_full_total": plain.seconds_total, "processor": spent, "processor_full": spent_full}
            )  # fmt: skip

    def _play(self, method: Method, given: Any, batch: int) -> tuple[Run, float]:
        seeds = [self.seeds[k % len(self.seeds)] for k in range(batch)]
        return timed(method.apply, self.pipe, self.call(seeds), given, seeds, batch)

    def _signals(self) -> None:
        from .signals import signal_rows

        self._progress(self._total, self._total, "how good is the check?")
        try:
            rows = signal_rows(self.pipe, self.call(self.seeds[: self.plan.signals]), self.seeds[: self.plan.signals])
        except InputError as problem:
            rows = [{"kind": "no signals", "reason": str(problem)}]
        for row in rows:
            self._write(row)

    def _next(self, what: str) -> None:
        self._progress(self._done, self._total, what)
        self._done += 1

    def _known(self, method: Method, value: Any) -> dict[str, Any]:
        return next(
            r for r in self.rows if r["kind"] == "quality" and (r["method"], r["value"]) == (method.name, value)
        )

    def _has(self, kind: str, method: Method | str, value: Any, at: tuple[int, int] = (0, 0)) -> bool:
        name = method if isinstance(method, str) else method.name
        rows = (r for r in self.rows if r["kind"] == kind and (r["method"], r["value"]) == (name, value))
        return any(kind != "time" or (r["batch"], r["round"]) == at for r in rows)

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def _timed(known: dict[str, Any], timing: Timing) -> bool:
    """Return whether a setting is timed; oracles are not, as they cannot be used in practice."""
    if "reason" in known or known["family"] == "oracle":
        return False
    speed = known["flops_speedup"]
    return not timing.near or known["method"] == "none" or any(abs(math.log(speed / s)) < NEAR for s in SPEEDS)


def _plain(plan: Suite) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(plan)))  # type: ignore[no-any-return]


def shape(pipe: Any) -> dict[str, Any]:
    """Return the classes of pipeline, transformer and scheduler, and the numbers of blocks and parameters."""
    model = denoisers_of(pipe)[0]
    from ..verified.gate import block_lists

    return {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "transformer": type(model).__name__,
        "blocks": sum(len(blocks) for blocks in block_lists(model).values()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a results file; remove an incomplete last line from the file. Row 0 describes the run."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        file.write_text("".join(lines), encoding="utf-8")
    if not lines:
        raise InputError(f"{file} is empty; delete it, or give --out another folder.")
    return [json.loads(line) for line in lines]


def versions() -> dict[str, str]:
    """Return the installed versions of the compared packages."""
    return {name: _version(name) for name in ("speca-diffusers", "torch", "diffusers", "cache-dit", "torchmetrics")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
