"""Who starts, and which forwards run together. Pure Python on numbers: no torch, no clock, time is counted in ticks.

A live request wants one forward at a time. A *draft* is cheap and runs in the very next tick, with every other draft
that fits it. A *full* forward is dear, and worth most in a full batch: it waits, for a bounded time, until so many have
gathered. Calls of other *components*, text encoders and autoencoders, run at once like drafts: requests start and end
together often enough. Only forwards of one *bucket* can run together; what is in a bucket's name is for the engine to
say.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from ..errors import ConfigError, InputError

PATIENCE = 32
"""Ticks of waiting that count as much as one level of priority; after as many a waiting request goes first."""

SIZES = 512
"""Most sizes of requests whose memory is remembered."""


class Lane(enum.Enum):
    """How a forward is scheduled."""

    DRAFT = "draft"
    FULL = "full"
    COMPONENT = "component"


@dataclass(frozen=True)
class Ticket:
    """A forward that a request waits for: `rows` rows at its step `step`, wanted since tick `since`.

    The lower its `rank`, the sooner it runs. It is that of the request: who came first is served first and leaves
    first, rather than all together late; and nobody waits for ever, as only a finite number came before.
    """

    request: int
    lane: Lane
    bucket: Hashable
    rows: int
    step: int
    since: int
    rank: tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """Forwards to be run as one."""

    lane: Lane
    tickets: tuple[Ticket, ...]

    @property
    def rows(self) -> int:
        """Rows of all of them."""
        return sum(ticket.rows for ticket in self.tickets)


@dataclass(frozen=True)
class _Queued:
    request: int
    size: Hashable
    priority: int
    since: int

    @property
    def rank(self) -> tuple[int, int]:
        """A priority counts as much as coming `PATIENCE` ticks earlier."""
        return self.since - PATIENCE * self.priority, self.request


@dataclass
class Scheduler:
    """Admits requests and gathers their forwards.

    Attributes:
        max_batch: most rows of one forward; one request of more rows runs alone.
        component_batch: the same of a call of another component than a transformer.
        max_wait: ticks after which a full forward no longer waits for others.
        max_live: most requests that are live at a time.
        max_queue: most requests that wait though they cannot start now, None for no limit.
        memory: most bytes that live requests and one batch may hold together, None for no limit. One request alone may
            hold more.
        forward, component: bytes that a row of a forward, or of a call of another component, takes while it runs, as
            far as that is known.
        lockstep: all live requests start together and stay at one step, as a batch of a plain pipeline does.
        tick: how often `plan` was called.
    """

    max_batch: int = 16
    component_batch: int = 4
    max_wait: int = 8
    max_live: int = 64
    max_queue: int | None = None
    memory: int | None = None
    lockstep: bool = False
    forward: int = 0
    component: int = 0
    tick: int = 0
    waiting: dict[int, Ticket] = field(default_factory=dict)
    queue: dict[int, _Queued] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)  # bytes of each live request
    known: dict[Hashable, int] = field(default_factory=dict)  # bytes of a request of each size
    _live: dict[int, _Queued] = field(default_factory=dict)
    _scout: int | None = None  # the live request whose size is being learnt

    def __post_init__(self) -> None:
        lowest = dict(max_batch=1, component_batch=1, max_wait=0, max_live=1, max_queue=0, memory=1)
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}={value} is out of range; use {low} or more.")

    # ---------------------------------------------------------------------------------------------- requests
    @property
    def live(self) -> int:
        """Requests that have started and not ended."""
        return len(self._live)

    @property
    def bytes(self) -> int:
        """What live requests hold, or are thought to need."""
        return sum(self.held.values())

    def is_full(self, taken: int, size: Hashable = None) -> bool:
        """Whether `max_queue` requests wait that cannot start now, so that one more of this size must not; `taken` have
        come in all, those that are live included."""
        if self.max_queue is None:
            return False
        live = len(self._live)
        return taken - live - self._free(live, size) >= self.max_queue

    def _free(self, live: int, size: Hashable) -> int:
        """How many requests of this size could start now, beside those that are live."""
        slots = 0 if self.lockstep and live else max(0, self.max_live - live)
        if self.memory is None or not slots:
            return slots
        if self._scout is not None or size not in self.known:
            return 0 if live else 1
        running = max(self.forward * self.max_batch, self.component * self.component_batch)
        room = (self.memory - self.bytes - running) // max(1, self.known[size])
        return max(0 if live else 1, min(slots, room))

    def submit(self, request: int, *, size: Hashable = None, priority: int = 0) -> None:
        """Queue a request; those of equal `size` need equal memory.

        Raises:
            InputError: a request of this size is known to need more than all memory.
        """
        need = self.known.get(size, 0) + max(self.forward, self.component)
        if self.memory is not None and need > self.memory:
            raise InputError(
                f"a request of this size takes {need} bytes, more than memory={self.memory}; raise memory."
            )
        self.queue[request] = _Queued(request, size, priority, self.tick)

    def admit(self) -> list[int]:
        """The requests to be started now, in order.

        A size that is not known yet is learnt from one request, which starts when no other is live; and until `weigh`
        tells what it holds, no other one starts. A request that does not fit is passed by, but not for ever.
        """
        if self.lockstep and self._live:
            return []
        started: list[int] = []
        for queued in sorted(self.queue.values(), key=lambda q: q.rank):
            if len(self._live) >= self.max_live or self._scout is not None:
                break
            if not self._fits(queued.size):
                if self.tick - queued.since > PATIENCE:
                    break
                continue
            del self.queue[queued.request]
            self._live[queued.request] = queued
            if self.memory is not None:
                self._hold(queued)
            started.append(queued.request)
        return started

    def _fits(self, size: Hashable) -> bool:
        if self.memory is None or not self._live:
            return True
        running = max(self.forward * self.max_batch, self.component * self.component_batch)
        return size in self.known and self.bytes + self.known[size] + running <= self.memory

    def _hold(self, queued: _Queued) -> None:
        assert self.memory is not None
        if queued.size in self.known:
            self.held[queued.request] = self.known[queued.size]
        else:
            self.held[queued.request], self._scout = self.memory, queued.request

    def weigh(self, request: int, size: int) -> None:
        """Note that a live request holds so many bytes, which is then expected of every request of equal size."""
        if request in self.held:
            queued = self._live[request]
            self.known[queued.size] = max(size, self.known.pop(queued.size, 0))
            if len(self.known) > SIZES:
                del self.known[next(iter(self.known))]  # the one that was longest not met
            self.held[request] = self.known[queued.size]
            self._scout = None if self._scout == request else self._scout

    def end(self, request: int) -> None:
        """A request is done, has failed or was cancelled, wherever it was."""
        for place in (self.queue, self._live, self.waiting, self.held):
            place.pop(request, None)
        self._scout = None if self._scout == request else self._scout

    # ---------------------------------------------------------------------------------------------- forwards
    def post(self, request: int, lane: Lane, bucket: Hashable, *, rows: int = 1, step: int = 0) -> None:
        """A live request wants a forward, and does nothing until it has it."""
        self.waiting[request] = Ticket(request, lane, bucket, rows, step, self.tick, self._live[request].rank)

    def plan(self) -> list[Batch]:
        """What to run in this tick: every draft and component, and at most one batch of full forwards."""
        self.tick += 1
        wanted = sorted(self.waiting.values(), key=lambda t: t.rank)
        if self.lockstep:
            first = min((t.step for t in wanted), default=0)
            wanted = [t for t in wanted if t.step == first]
        urgent = _by_bucket(t for t in wanted if t.lane is not Lane.FULL)
        batches = [batch for bucket in urgent for batch in self._packed(bucket)]
        if not (self.lockstep and batches):  # drafts that fail join the full forwards of their step
            batches += self._full([t for t in wanted if t.lane is Lane.FULL], moving=bool(batches))
        for batch in batches:
            for ticket in batch.tickets:
                del self.waiting[ticket.request]
        return batches

    def _full(self, wanted: list[Ticket], *, moving: bool) -> list[Batch]:
        """A batch of the bucket whose first has the lowest rank, of those that have gathered or waited enough. Where
        nothing else is `moving` none would gain by waiting, and any will do."""
        buckets = _by_bucket(wanted)
        ready = [bucket for bucket in buckets if self._is_ready(bucket)] or ([] if moving else buckets)
        return self._packed(ready[0])[:1] if ready else []

    def _is_ready(self, bucket: list[Ticket]) -> bool:
        oldest = min(ticket.since for ticket in bucket)
        return sum(t.rows for t in bucket) >= self.max_batch or self.tick - oldest > self.max_wait

    def most(self, lane: Lane) -> int:
        """Rows of a batch at most."""
        return self.component_batch if lane is Lane.COMPONENT else self.max_batch

    def _packed(self, bucket: list[Ticket]) -> list[Batch]:
        """The forwards of a bucket in batches, by rank; each goes to the first batch with room for it."""
        packed: list[list[Ticket]] = []
        room: list[int] = []
        for ticket in bucket:
            at = next((i for i, free in enumerate(room) if free >= ticket.rows), len(room))
            if at == len(room):
                packed.append([])
                room.append(self.most(ticket.lane))
            packed[at].append(ticket)
            room[at] -= ticket.rows
        return [Batch(bucket[0].lane, tuple(tickets)) for tickets in packed]


def _by_bucket(tickets: Iterable[Ticket]) -> list[list[Ticket]]:
    """Tickets of each bucket, in the order in which they come."""
    buckets: dict[Hashable, list[Ticket]] = {}
    for ticket in tickets:
        buckets.setdefault((ticket.lane, ticket.bucket), []).append(ticket)
    return list(buckets.values())
