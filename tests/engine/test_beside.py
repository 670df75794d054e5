"""What takes long and runs no model does not hold up the other requests of an engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import tiny
from engine.mixes import CLOSE, decisions, distance
from speca.denoiser import run
from speca.engine import Engine
from speca.engine.beside import Beside
from speca.errors import CancelledError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
LONG, SHORT = 60, 8


def asked(case: tiny.Case, seed: int, steps: int) -> dict[str, Any]:
    own = dict(num_inference_steps=steps, generator_seed=seed, speedup=3.0, settings=dict(prior="generic"))
    return {**case.arguments, **case.conditions([seed]), **own}


class Slow:
    """A search for full steps that lasts until it is let go, for runs of many steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go, self.threads = threading.Event(), threading.Event(), list[str]()
        real = run.place

        def place(prior: Any, transitions: Any, count: int) -> Any:
            self.threads.append(threading.current_thread().name)
            if len(transitions) > SHORT:
                self.reached.set()
                assert self.go.wait(30)
            return real(prior, transitions, count)

        monkeypatch.setattr(run, "place", place)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    found = Slow(monkeypatch)
    yield found
    found.go.set()


def test_others_go_on_while_full_steps_are_searched(slow: Slow) -> None:
    case = tiny.flux()
    slow.go.set()
    with Engine(case.pipe, mode="one-at-a-time") as engine:
        oracle = list(engine.generate([asked(case, 0, LONG), asked(case, 1, SHORT)]))
    slow.go.clear()
    slow.reached.clear()
    slow.threads.clear()
    with Engine(case.pipe) as engine:
        long = engine.post(**asked(case, 0, LONG))
        assert slow.reached.wait(30)
        for _ in range(3):
            short = engine.post(**asked(case, 1, SHORT)).result(timeout=30)
        assert not long.done() and engine.alive
        slow.go.set()
        found = long.result(timeout=30)
    for one, other in zip((found, short), oracle, strict=True):
        assert decisions(one) == decisions(other) and distance(one, other) < CLOSE
    assert "A" in decisions(found)[0]
    assert slow.threads[0].startswith("speca-engine-search") and set(slow.threads[1:]) == {"speca-engine"}


@pytest.mark.parametrize("how", ["cancel", "deadline", "close"])
def test_a_request_whose_full_steps_are_searched_can_be_given_up(slow: Slow, how: str) -> None:
    case = tiny.flux()
    with Engine(case.pipe) as engine:
        late = dict(deadline=0.3) if how == "deadline" else {}
        future = engine.post(**asked(case, 0, LONG), **late)
        if how != "deadline":
            assert slow.reached.wait(30)
            future.cancel() if how == "cancel" else engine.close()
        with pytest.raises(CancelledError, match="deadline" if how == "deadline" else "was cancelled"):
            future.result(timeout=10)
        assert not slow.go.is_set(), "it did not wait for the search"
        assert not engine._loop.busy and not engine._loop.beside.busy


def test_a_search_that_fails_is_the_error_of_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny.flux()

    def place(*_: Any) -> Any:
        raise ZeroDivisionError("of this search")

    monkeypatch.setattr(run, "place", place)
    with Engine(case.pipe) as engine:
        results = list(engine.generate([asked(case, 0, LONG), {**asked(case, 1, SHORT), "settings": {}}]))
    assert sorted(type(r.error).__name__ for r in results) == ["NoneType", "ZeroDivisionError"]


def test_generate_waits_for_it_without_a_thread_of_its_own(slow: Slow) -> None:
    case = tiny.flux()
    with Engine(case.pipe) as engine:
        ticks: list[int] = []

        def let_go() -> None:
            assert slow.reached.wait(30)
            ticks.append(engine._loop.records.ticks)
            slow.go.set()

        helper = threading.Thread(target=let_go)
        helper.start()
        (result,) = engine.generate([asked(case, 0, LONG)])
        helper.join()
    assert result.error is None and ticks[0] < 20


def test_what_ends_at_once_is_there_at_once() -> None:
    beside, woken = Beside(), threading.Event()
    beside.wake = woken.set
    beside.start(3, lambda: 7, "search")
    assert woken.wait(10) and beside.ready and beside.taken() == [(3, 7, None)] and not beside.busy
    go = threading.Event()
    beside.start(4, go.wait, "search")
    beside.drop(4)
    assert not beside.busy and beside.taken() == []
    go.set()
    beside.close()
