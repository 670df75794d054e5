"""The scheduler alone, on thousands of invented traces: who starts, what runs together, and that everyone ends."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speca.engine.scheduler import PATIENCE, SIZES, Batch, Lane, Scheduler
from speca.errors import ConfigError, InputError

MANY = settings(max_examples=1000, deadline=None)


@dataclass
class Job:
    """What a request is going to want: a lane, a bucket and rows for each of its forwards."""

    arrives: int
    wants: list[tuple[Lane, int]]
    rows: int = 1
    size: int = 0
    priority: int = 0
    cancelled_at: int | None = None
    began: int | None = None
    waits: list[int] = field(default_factory=list)


JOBS = st.lists(
    st.builds(
        Job,
        arrives=st.integers(0, 40),
        wants=st.lists(st.tuples(st.sampled_from(Lane), st.integers(0, 2)), max_size=12),
        rows=st.integers(1, 4),
        size=st.integers(0, 3),
        priority=st.integers(-2, 2),
        cancelled_at=st.one_of(st.none(), st.integers(0, 80)),
    ),
    max_size=25,
)
BYTES = [10, 25, 40, 60]
SETTINGS = st.fixed_dictionaries(
    dict(
        max_batch=st.integers(1, 8), component_batch=st.integers(1, 4), max_wait=st.integers(0, 6),
        max_live=st.integers(1, 12), memory=st.one_of(st.none(), st.just(100)), lockstep=st.booleans(),
    )
)  # fmt: skip


def drive(scheduler: Scheduler, jobs: list[Job], limit: int = 5000) -> list[list[Batch]]:
    """Play a trace as an engine would, and check what must hold at each tick. Returns what ran, tick by tick."""
    history: list[list[Batch]] = []
    todo = {n: deque(job.wants) for n, job in enumerate(jobs)}
    open_, live, submitted = set(todo), set(), set()

    def go_on(n: int) -> None:
        if todo[n]:
            lane, bucket = todo[n].popleft()
            scheduler.post(n, lane, bucket, rows=jobs[n].rows, step=len(jobs[n].wants) - len(todo[n]))
        else:
            scheduler.end(n)
            live.discard(n)
            open_.discard(n)

    for tick in range(limit):
        for n in sorted(open_ - submitted):
            if jobs[n].arrives <= tick:
                scheduler.submit(n, size=jobs[n].size, priority=jobs[n].priority)
                submitted.add(n)
        for n in sorted(open_):
            cancelled_at = jobs[n].cancelled_at
            if cancelled_at is not None and tick >= cancelled_at and n in submitted:
                scheduler.end(n)
                live.discard(n)
                open_.discard(n)
        for n in scheduler.admit():
            assert n in open_ and n not in live
            live.add(n)
            jobs[n].began = tick
            go_on(n)
        over = scheduler.memory is not None and scheduler.bytes > scheduler.memory
        assert not over or scheduler.live == 1, "more was admitted than memory holds"
        assert scheduler.live == len(live) <= scheduler.max_live
        wanted = dict(scheduler.waiting)
        batches = scheduler.plan()
        history.append(batches)
        check(scheduler, wanted, batches)
        for ticket in [t for batch in batches for t in batch.tickets]:
            jobs[ticket.request].waits.append(scheduler.tick - ticket.since - 1)
            scheduler.weigh(ticket.request, BYTES[jobs[ticket.request].size])
            go_on(ticket.request)
        if not open_:
            assert not scheduler.waiting and not scheduler.queue and not scheduler.held and scheduler.live == 0
            return history
    raise AssertionError(f"after {limit} ticks requests {sorted(open_)} have not ended")


def check(scheduler: Scheduler, wanted: dict, batches: list[Batch]) -> None:
    """One bucket and one lane a batch, no more rows than allowed, one full batch, all that runs at once, never idle."""
    ran = [t for batch in batches for t in batch.tickets]
    assert len(ran) == len({t.request for t in ran})
    assert all(wanted[t.request] == t for t in ran)
    for batch in batches:
        assert {t.bucket for t in batch.tickets} == {batch.tickets[0].bucket}
        assert {t.lane for t in batch.tickets} == {batch.lane}
        most = scheduler.component_batch if batch.lane is Lane.COMPONENT else scheduler.max_batch
        assert batch.rows <= most or len(batch.tickets) == 1
    assert sum(batch.lane is Lane.FULL for batch in batches) <= 1
    if not scheduler.lockstep:
        urgent = {n for n, t in wanted.items() if t.lane is not Lane.FULL}
        assert urgent <= {t.request for t in ran}, "what runs at once was left to wait"
    else:
        assert len({t.step for t in ran}) <= 1, "rows of a lock-step batch have drifted apart"
    assert bool(batches) == bool(wanted), "something is wanted and nothing ran"


@MANY
@given(jobs=JOBS, how=SETTINGS)
def test_every_request_ends_and_nothing_is_kept(jobs: list[Job], how: dict) -> None:
    drive(Scheduler(**how), [dataclasses.replace(job, waits=[]) for job in jobs])


@MANY
@given(jobs=JOBS, how=SETTINGS)
def test_nobody_starves(jobs: list[Job], how: dict) -> None:
    """A full forward waits its time, and then at most for those of the others: one batch a tick."""
    jobs = [dataclasses.replace(job, waits=[], cancelled_at=None) for job in jobs]
    scheduler = Scheduler(**{**how, "lockstep": False})
    drive(scheduler, jobs)
    for job in jobs:
        others = sum(len(other.wants) for other in jobs if other is not job)
        assert all(wait <= scheduler.max_wait + others for wait in job.waits)


@pytest.mark.parametrize("priority", [0, 1])
def test_an_endless_stream_of_others_starves_nobody(priority: int) -> None:
    """An odd request among a stream that alone fills every full batch, and has the higher priority."""
    scheduler = Scheduler(max_batch=2, max_wait=2, max_live=8)
    scheduler.submit(0)
    left, ticks, fresh = {0: 5}, 0, 1
    while 0 in left:
        for _ in range(2):
            scheduler.submit(fresh, priority=priority)
            left[fresh] = 3
            fresh += 1
        for n in scheduler.admit():
            scheduler.post(n, Lane.FULL, "even" if n else "odd")
        for ticket in [t for batch in scheduler.plan() for t in batch.tickets]:
            left[ticket.request] -= 1
            if left[ticket.request]:
                scheduler.post(ticket.request, Lane.FULL, "even" if ticket.request else "odd")
            else:
                scheduler.end(ticket.request)
                del left[ticket.request]
        ticks += 1
        assert ticks < 3 * PATIENCE + 20


def test_who_came_first_is_served_first() -> None:
    scheduler = Scheduler(max_batch=2)
    submit(scheduler, 4)
    for n in (3, 2, 1, 0):
        scheduler.post(n, Lane.FULL, "a")
    assert [[t.request for t in batch.tickets] for batch in scheduler.plan()] == [[0, 1]]


@MANY
@given(jobs=JOBS, how=SETTINGS)
def test_the_same_trace_gives_the_same_schedule(jobs: list[Job], how: dict) -> None:
    runs = [drive(Scheduler(**how), [dataclasses.replace(job, waits=[]) for job in jobs]) for _ in range(2)]
    assert runs[0] == runs[1]


def submit(scheduler: Scheduler, count: int, **more: int) -> None:
    for n in range(count):
        scheduler.submit(n, **more)
    scheduler.admit()


def test_full_forwards_gather_while_others_draft() -> None:
    scheduler = Scheduler(max_batch=3, max_wait=10)
    submit(scheduler, 4)
    scheduler.post(0, Lane.FULL, "a")
    scheduler.post(1, Lane.DRAFT, "a")
    scheduler.post(2, Lane.FULL, "a")
    (draft,) = scheduler.plan()
    assert draft.lane is Lane.DRAFT and draft.rows == 1
    scheduler.post(1, Lane.FULL, "a")
    scheduler.post(3, Lane.DRAFT, "a")
    draft, full = scheduler.plan()
    assert [t.request for t in full.tickets] == [0, 1, 2] and draft.lane is Lane.DRAFT


def test_a_full_forward_does_not_wait_for_ever_nor_for_nobody() -> None:
    scheduler = Scheduler(max_batch=3, max_wait=2)
    submit(scheduler, 2)
    scheduler.post(0, Lane.FULL, "a")
    ran = []
    for _ in range(4):
        scheduler.post(1, Lane.DRAFT, "a")
        ran.append(any(batch.lane is Lane.FULL for batch in scheduler.plan()))
    assert ran == [False, False, True, False]
    scheduler.post(0, Lane.FULL, "a")  # nobody drafts: there is nothing to wait for
    assert [batch.lane for batch in scheduler.plan()] == [Lane.FULL]


def test_an_odd_request_at_the_head_blocks_nobody() -> None:
    scheduler = Scheduler(max_batch=2, max_wait=4)
    submit(scheduler, 4)
    scheduler.post(0, Lane.FULL, "odd")
    scheduler.post(1, Lane.FULL, "even")
    scheduler.post(2, Lane.FULL, "even")
    scheduler.post(3, Lane.DRAFT, "even")
    _, full = scheduler.plan()
    assert [t.request for t in full.tickets] == [1, 2]


def test_priority_counts_and_age_counts_more() -> None:
    scheduler = Scheduler(max_batch=1, max_live=1)
    scheduler.submit(0, priority=0)
    scheduler.submit(1, priority=1)
    assert scheduler.admit() == [1]
    scheduler.tick += PATIENCE + 1
    scheduler.submit(2, priority=1)
    scheduler.end(1)
    assert scheduler.admit() == [0]


def test_memory_is_learnt_from_one_request_of_each_size() -> None:
    scheduler = Scheduler(memory=100, max_live=50)
    for n in range(12):
        scheduler.submit(n, size="small" if n % 2 else "large")
    assert scheduler.admit() == [0] and scheduler.bytes == 100
    assert scheduler.admit() == []  # what the first one needs is not known yet
    scheduler.weigh(0, 40)
    assert scheduler.admit() == [2] and scheduler.bytes == 80  # 1 is of another size, to be learnt when none is live
    scheduler.end(0)
    scheduler.end(2)
    assert scheduler.admit() == [1]
    scheduler.weigh(1, 10)
    assert scheduler.admit() == [3, 4, 5, 7, 9, 11] and scheduler.bytes == 100
    scheduler.submit(20, size="huge")
    scheduler.known["huge"] = 101
    with pytest.raises(InputError, match="more than memory=100"):
        scheduler.submit(21, size="huge")


def test_a_large_request_is_not_passed_by_for_ever() -> None:
    scheduler = Scheduler(memory=100, max_live=50, known={"large": 90, "small": 20})
    scheduler.submit(0, size="small")
    scheduler.submit(1, size="large")
    assert scheduler.admit() == [0]
    for n in range(2, 3 * PATIENCE):
        scheduler.submit(n, size="small")
        scheduler.end(next(iter(scheduler.held)))
        started = scheduler.admit()
        if 1 in started:
            assert n <= PATIENCE + 3
            return
        scheduler.plan()
    raise AssertionError("the large request never started")


def test_a_queue_is_full_of_what_cannot_start_now() -> None:
    scheduler = Scheduler(max_queue=2, max_live=3)
    assert [scheduler.is_full(taken) for taken in range(7)] == [False] * 5 + [True] * 2
    submit(scheduler, 3)
    scheduler.admit()
    assert [scheduler.is_full(taken) for taken in range(3, 7)] == [False, False, True, True]
    nobody = Scheduler(max_queue=0, max_live=1)
    assert [nobody.is_full(taken) for taken in range(2)] == [False, True]
    assert not Scheduler(max_live=1).is_full(1000)


def test_a_queue_with_memory_is_full_of_what_does_not_fit() -> None:
    scheduler = Scheduler(max_queue=0, max_live=8, memory=100)
    assert not scheduler.is_full(0) and scheduler.is_full(1), "a size that is not known starts alone"
    scheduler.submit(0, size="small")
    scheduler.admit()
    assert scheduler.is_full(1, "small")
    scheduler.weigh(0, 30)
    assert [scheduler.is_full(taken, "small") for taken in range(1, 5)] == [False, False, True, True]
    assert scheduler.is_full(1, "unknown")


def test_sizes_that_are_remembered_are_bounded() -> None:
    scheduler = Scheduler(max_live=1, memory=100)
    for n in range(2 * SIZES):
        scheduler.submit(n, size=n)
        scheduler.admit()
        scheduler.weigh(n, 10)
        scheduler.end(n)
    assert len(scheduler.known) == SIZES and 2 * SIZES - 1 in scheduler.known


@pytest.mark.parametrize("wrong", [dict(max_batch=0), dict(max_wait=-1), dict(max_live=0), dict(memory=0)])
def test_wrong_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="is out of range"):
        Scheduler(**wrong)
