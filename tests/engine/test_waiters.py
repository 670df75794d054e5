"""Those who wait for a request may leave, and an engine's thread may die: nobody else suffers or waits for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import tiny
from engine.test_failures import alone, demand_right, good
from speca.engine import Engine, Event, Future
from speca.engine.future import KEPT
from speca.engine.loop import Loop
from speca.errors import CancelledError, ConfigError, EngineClosedError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
OTHERS = 3


@pytest.fixture(scope="module")
def case() -> tiny.Case:
    return tiny.flux()


class Held:
    """A callback of a pipeline that lets the engine wait in the middle of a request, until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.reached.set()
        assert self.go.wait(30)
        return kwargs


@pytest.fixture
def held() -> Iterator[Held]:
    found = Held()
    yield found
    found.go.set()


async def wait_for(future: Future, held: Held) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(_awaited(future), 0.01)


async def cancel_the_task(future: Future, held: Held) -> None:
    task = asyncio.ensure_future(_awaited(future))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def forget_the_task(future: Future, held: Held) -> None:
    asyncio.get_running_loop().victim = asyncio.ensure_future(_awaited(future))  # type: ignore[attr-defined]
    await asyncio.sleep(0)


async def _awaited(future: Future) -> Any:
    return await future


@pytest.mark.parametrize("leave", [wait_for, cancel_the_task, forget_the_task])
def test_a_waiter_that_leaves_cancels_its_own_request_alone(case: tiny.Case, held: Held, leave: Any) -> None:
    """Two of them, as the first fault hid the second; the event loop ends with a task that still waits."""
    oracle = alone(case)
    with Engine(case.pipe, tiny.VERIFYING, max_batch=8) as engine:
        victims = [engine.post(**good(case, n), callback_on_step_end=held) for n in range(2)]
        others = [engine.post(**good(case, n)) for n in range(OTHERS)]
        assert held.reached.wait(30)

        async def main() -> None:
            for victim in victims:
                await leave(victim, held)

        asyncio.run(main())
        held.go.set()
        for other in others:
            demand_right(other.result(timeout=30), oracle)
        for victim in victims:
            with pytest.raises(CancelledError, match="was cancelled"):
                victim.result(timeout=30)
        demand_right(engine.post(**good(case, 5)).result(timeout=30), oracle)
        assert engine.alive and engine.statistics["done"] == OTHERS + 1


def test_a_shielded_wait_leaves_the_request(case: tiny.Case, held: Held) -> None:
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        future = engine.post(**good(case, 0), callback_on_step_end=held)

        async def main() -> None:
            waiting = asyncio.ensure_future(_awaited(future))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(waiting), 0.01)
            held.go.set()
            assert (await waiting).error is None

        asyncio.run(main())


def test_a_future_ends_once(case: tiny.Case) -> None:
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        future = engine.post(**good(case, 0))
        first = future.result(timeout=30)
    assert future.finish(error=ValueError()) is first and future.result() is first


def test_a_consumer_that_leaves_takes_its_listener_along(case: tiny.Case, held: Held) -> None:
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        future = engine.post(**good(case, 0), callback_on_step_end=held)

        async def main() -> None:
            for _ in range(5):
                async for _ in future.events():
                    assert future.heard
                    break
            gc.collect()
            await asyncio.sleep(0.01)  # the event loop closes what was left
            assert not future.heard

        asyncio.run(main())
        held.go.set()
        assert future.result(timeout=30).error is None, "nobody listens, and yet it is made"


def test_a_slow_consumer_gets_the_last_events_and_the_end() -> None:
    async def main() -> list[Event]:
        future = Future(0, None)  # type: ignore[arg-type]
        events = future.events()
        told = [await anext(events)]
        for step in range(1, 10 * KEPT):
            future.tell("step", step, 10 * KEPT)
        future.tell("done")  # type: ignore[arg-type]
        return told + [event async for event in events]

    told = asyncio.run(main())
    assert [e.kind for e in told] == ["queued", *["step"] * (KEPT - 1), "done"]
    assert [e.step for e in told[1:-1]] == list(range(10 * KEPT - KEPT + 1, 10 * KEPT))


def test_events_of_an_event_loop_that_has_ended_hurt_nobody(case: tiny.Case, held: Held) -> None:
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        future = engine.post(**good(case, 0), callback_on_step_end=held)
        kept: list[Any] = []

        async def main() -> None:
            kept.append(future.events())
            await anext(kept[0])

        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        held.go.set()
        assert future.result(timeout=30).error is None and not future.heard


def test_a_thread_that_dies_tells_everybody(
    case: tiny.Case, held: Held, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(case.pipe, tiny.VERIFYING, max_live=1)
    assert engine.alive
    futures = [engine.post(**good(case, n), callback_on_step_end=held) for n in range(4)]
    assert held.reached.wait(30)

    def fail(*_: Any) -> None:
        raise MemoryError("of this test")

    monkeypatch.setattr(Loop, "abandon", fail)
    monkeypatch.setattr(type(engine._loop.scheduler), "plan", fail)
    held.go.set()
    for future in futures:
        with pytest.raises(EngineClosedError, match=r"has ended with MemoryError\('of this test'\); make a new engine"):
            future.result(timeout=30)
    assert not engine.alive
    with pytest.raises(ConfigError, match="of this test"):
        engine.post(**good(case, 0))
    with pytest.raises(ConfigError, match="of this test"):
        asyncio.run(engine.submit(**good(case, 0)))
    with pytest.raises(ConfigError, match="of this test"):
        next(engine.generate([good(case, 0)]))
    engine.close()
    monkeypatch.undo()
    assert any(r.name == "speca.engine" and r.levelname == "CRITICAL" for r in caplog.records)
    with Engine(case.pipe, tiny.VERIFYING) as other:
        assert other.post(**good(case, 0)).result(timeout=30).error is None
