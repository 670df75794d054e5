"""What an engine has done: counts, waits, how full its batches were, and a picture of all that."""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .future import Result
from .scheduler import Batch, Lane, Scheduler

Kind = Literal["draft", "full", "redone", "component"]
TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds that bound the bins of a lane's `times`."""

KEPT = 100_000
"""Forwards of single requests that are remembered for the picture; older ones are forgotten."""


@dataclass
class LaneCount:
    """What was run of one kind: drafts, full steps, or other components.

    Attributes:
        batches, rows: how many forwards were run, and of how many rows in all.
        seconds: how long they took.
        times: how many of them took so long: at most each of `TIMES`, and longer than all.
        waited: rounds that the requests in them had waited, all together; `longest`: the most that one had waited.
    """

    batches: int = 0
    rows: int = 0
    calls: int = 0
    seconds: float = 0.0
    waited: int = 0
    longest: int = 0
    times: list[int] = field(default_factory=lambda: [0] * (len(TIMES) + 1))

    def to_dict(self, most: int) -> dict[str, Any]:
        """Plain values, with means and the share of the `most` rows of a batch that was used."""
        rows = self.rows / self.batches if self.batches else 0.0
        waited = self.waited / self.calls if self.calls else 0.0
        return {**asdict(self), "rows_a_batch": rows, "occupancy": rows / most, "mean_wait": waited}


@dataclass(frozen=True)
class Forward:
    """One request's part in one batch: when it began and how long it took, in seconds."""

    request: int
    kind: Kind
    began: float
    seconds: float
    rows: int
    batch: int


@dataclass
class Records:
    """Counts since the engine was made, and the last forwards.

    Attributes:
        submitted, done, failed: numbers of requests.
        full, accepted, rejected: steps of finished requests.
        ticks, reads: rounds of the loop, and how often numbers were read from the device.
        seconds, planning: how long all rounds took, and how much of it went into choosing what to run.
        peak_live, peak_bytes: most requests under way at a time, and most bytes that they held.
    """

    lanes: dict[Lane, LaneCount] = field(default_factory=lambda: {lane: LaneCount() for lane in Lane})
    started_count: int = 0
    done: int = 0
    failed: int = 0
    full: int = 0
    accepted: int = 0
    rejected: int = 0
    ticks: int = 0
    reads: int = 0
    seconds: float = 0.0
    planning: float = 0.0
    waited: float = 0.0
    peak_live: int = 0
    peak_bytes: int = 0
    forwards: deque[Forward] = field(default_factory=lambda: deque(maxlen=KEPT))
    _batches: int = 0

    def started(self, waited: float) -> None:
        """Count a request that starts after `waited` seconds in the queue."""
        self.started_count += 1
        self.waited += waited

    def ended(self, result: Result) -> None:
        """Count a request that has ended."""
        self.failed += result.error is not None
        self.done += result.error is None
        for sample in result.report.samples if result.report is not None else ():
            self.full += sample.full
            self.accepted += sample.accepted
            self.rejected += sample.rejected

    def ran(self, batch: Batch, kinds: list[Kind], began: float, seconds: float, tick: int) -> None:
        """Count a batch that was run."""
        lane = self.lanes[batch.lane]
        lane.batches, lane.rows, lane.calls = lane.batches + 1, lane.rows + batch.rows, lane.calls + len(batch.tickets)
        lane.seconds += seconds
        lane.times[bisect.bisect_left(TIMES, seconds)] += 1
        self._batches += 1
        for ticket, kind in zip(batch.tickets, kinds, strict=True):
            waited = tick - ticket.since - 1  # what is wanted in one tick can run in the next one at the soonest
            lane.waited, lane.longest = lane.waited + waited, max(lane.longest, waited)
            self.forwards.append(Forward(ticket.request, kind, began, seconds, ticket.rows, self._batches))

    def ticked(self, scheduler: Scheduler, seconds: float) -> None:
        """Count a round of the loop."""
        self.ticks += 1
        self.seconds += seconds
        self.peak_live = max(self.peak_live, scheduler.live)
        self.peak_bytes = max(self.peak_bytes, scheduler.bytes)

    def to_dict(self, scheduler: Scheduler) -> dict[str, Any]:
        """Plain values."""
        names = ("done", "failed", "full", "accepted", "rejected", "ticks", "reads", "seconds", "planning",
                 "peak_live", "peak_bytes")  # fmt: skip
        waited = self.waited / self.started_count if self.started_count else 0.0
        lanes = {lane.value: count.to_dict(scheduler.most(lane)) for lane, count in self.lanes.items()}
        return {**{name: getattr(self, name) for name in names}, "mean_queue_seconds": waited, "lanes": lanes}


COLOURS: dict[Kind, str] = {"draft": "#8fd0a5", "full": "#1f3b57", "redone": "#d8573c", "component": "#b9a3d6"}
MEANING: dict[Kind, str] = {
    "draft": "draft", "full": "full", "redone": "draft rejected, recomputed",
    "component": "text encoder, autoencoder",
}  # fmt: skip
MOST_ROWS = 96


def plot(records: Records, max_batch: int, path: str | Path, title: str = "") -> None:
    """A picture of the engine (PNG, SVG or PDF): what each request did when, above how full the full batches were."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    requests = sorted({f.request for f in records.forwards})[-MOST_ROWS:]
    shown = set(requests)
    forwards = [f for f in records.forwards if f.request in shown]
    origin = min((f.began for f in forwards), default=0.0)
    place = {request: y for y, request in enumerate(requests)}
    figure = Figure(figsize=(12, max(4.5, 0.105 * len(requests) + 3.0)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[max(2.0, 0.09 * len(requests)), 1.2])
    for request in requests:
        own = [f for f in forwards if f.request == request]
        first, last = own[0].began - origin, own[-1].began + own[-1].seconds - origin
        above.plot([first, last], [place[request]] * 2, color="#d9dde2", linewidth=0.8, zorder=1)
        for kind in ("full", "redone", "component"):
            bars = [(f.began - origin, f.seconds) for f in own if f.kind == kind]
            above.broken_barh(bars, (place[request] - 0.4, 0.8), color=COLOURS[kind], linewidth=0, zorder=2)
    # A draft takes so little time that a bar of it would not be seen.
    drafts = [(f.began + f.seconds / 2 - origin, place[f.request]) for f in forwards if f.kind == "draft"]
    above.scatter(
        *zip(*drafts, strict=True) if drafts else ([], []), s=9, color=COLOURS["draft"], linewidth=0, zorder=3
    )
    above.set(ylim=(len(requests) - 0.3, -0.7), ylabel="request", title=title or "What each request did when")
    handles = [Patch(color=COLOURS[kind], label=MEANING[kind]) for kind in COLOURS]
    above.legend(handles=handles, loc="upper right", fontsize=8, frameon=False)
    batches: dict[int, Forward] = {}
    rows: dict[int, int] = {}
    for f in forwards:
        batches[f.batch], rows[f.batch] = f, rows.get(f.batch, 0) + f.rows
    for number, f in batches.items():
        colour = COLOURS["full" if f.kind == "redone" else f.kind]
        below.bar(f.began - origin, rows[number], f.seconds, align="edge", color=colour, linewidth=0)
    below.axhline(max_batch, color="#9aa3ad", linewidth=0.8, linestyle="--")
    below.text(0, max_batch, " cap", fontsize=8, va="bottom", color="#6b737c")
    below.set(xlabel="seconds", ylabel="rows in a batch", ylim=(0, max_batch * 1.25))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
