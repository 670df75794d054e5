"""Threads, processes and the end: no cancel or post is lost, whatever happens at the same time, and nothing hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

import speca
import tiny
from engine.mixes import CLOSE, decisions, distance
from engine.test_failures import alone, demand_right, good
from engine.test_waiters import Held, held
from speca.diffusers.accelerator import ATTRIBUTE
from speca.engine import Engine, Event
from speca.engine import turn as turns
from speca.engine.driver import Driver
from speca.engine.loop import Loop
from speca.errors import CancelledError, ConfigError, EngineClosedError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
__all__ = ["held"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def case() -> tiny.Case:
    return tiny.flux()


# ------------------------------------------------------------------------------------------------ races
def test_a_cancel_between_the_inbox_and_the_round_is_kept(case: tiny.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is posted and cancelled when the inbox has been emptied already, and cancels not looked at yet."""
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        real, later = Loop.tick, list[Any]()

        def tick(self: Loop) -> None:
            if not later:
                later.append(engine.post(**good(case, 1)))
                later[0].cancel()
            real(self)

        monkeypatch.setattr(Loop, "tick", tick)
        engine.post(**good(case, 0)).result(timeout=30)
        with pytest.raises(CancelledError, match="was cancelled"):
            later[0].result(timeout=30)
        assert later[0].last.step == 0


def test_a_cancel_before_the_inbox_is_emptied_is_kept(case: tiny.Case, held: Held) -> None:
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        engine.post(**good(case, 0), callback_on_step_end=held)
        assert held.reached.wait(30)
        future = engine.post(**good(case, 1))
        future.cancel()
        held.go.set()
        with pytest.raises(CancelledError, match="was cancelled"):
            future.result(timeout=30)
        assert future.last.step == 0


def test_a_post_while_the_engine_closes_is_answered_or_refused(
    case: tiny.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has found the engine open, and is held up until the engine is closed."""
    engine = Engine(case.pipe, tiny.VERIFYING)
    engine.post(**good(case, 0)).result(timeout=30)
    passed, closed, outcome = threading.Event(), threading.Event(), list[Any]()
    real = Driver.demand_open

    def demand_open(self: Driver) -> None:
        real(self)
        if threading.current_thread() is late and not passed.is_set():
            passed.set()
            assert closed.wait(30)

    def post() -> None:
        try:
            outcome.append(engine.post(**good(case, 1)).result(timeout=5))
        except Exception as error:
            outcome.append(error)

    late = threading.Thread(target=post)
    monkeypatch.setattr(Driver, "demand_open", demand_open)
    late.start()
    assert passed.wait(30)
    engine.close()
    closed.set()
    late.join()
    assert isinstance(outcome[0], EngineClosedError)


def test_posts_from_many_threads_while_it_closes_all_end(case: tiny.Case) -> None:
    for _ in range(5):
        engine, futures, go = Engine(case.pipe, tiny.VERIFYING), list[Any](), threading.Barrier(5)

        def post(engine: Engine = engine, futures: list[Any] = futures, go: threading.Barrier = go) -> None:
            go.wait()
            try:
                while True:
                    futures.append(engine.post(**good(case, 0)))
            except EngineClosedError:
                pass

        threads = [threading.Thread(target=post) for _ in range(4)]
        for thread in threads:
            thread.start()
        go.wait()
        engine.close()
        for thread in threads:
            thread.join(30)
        assert all(future.done() for future in futures)


# ------------------------------------------------------------------------------------------------ callbacks
@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt()], ids=["SystemExit", "KeyboardInterrupt"])
def test_what_would_end_a_thread_ends_its_own_request_alone(case: tiny.Case, raised: BaseException) -> None:
    def stop(*_: Any) -> Any:
        raise raised

    with Engine(case.pipe, tiny.VERIFYING) as engine:
        futures = [engine.post(**good(case, n)) for n in range(2)]
        victim = engine.post(**good(case, 2), callback_on_step_end=stop)
        futures += [engine.post(**good(case, n)) for n in range(2)]
        with pytest.raises(RuntimeError, match=type(raised).__name__) as caught:
            victim.result(timeout=30)
        assert caught.value.__cause__ is raised
        assert all(future.result(timeout=30).error is None for future in futures) and engine.alive


def test_a_system_exit_in_generate_is_its_request_s_as_well(case: tiny.Case) -> None:
    def stop(*_: Any) -> Any:
        raise SystemExit

    with Engine(case.pipe, tiny.VERIFYING) as engine:
        asked = [good(case, 0), {**good(case, 1), "callback_on_step_end": stop}]
        results = sorted(engine.generate(asked), key=lambda r: r.index)
    assert results[0].error is None and isinstance(results[1].error, RuntimeError)


@pytest.mark.filterwarnings("ignore:speca. a listener")
def test_a_listener_that_exits_gets_no_more_events(case: tiny.Case, caplog: pytest.LogCaptureFixture) -> None:
    def listen(event: Event) -> None:
        raise SystemExit

    with Engine(case.pipe, tiny.VERIFYING, on_event=listen) as engine:
        assert engine.post(**good(case, 0)).result(timeout=30).error is None
    assert any(r.name == "speca.engine" and "listener of request 0" in r.getMessage() for r in caplog.records)


def test_warnings_of_the_thread_are_in_the_log(case: tiny.Case, caplog: pytest.LogCaptureFixture) -> None:
    def complain(*_: Any) -> dict[str, Any]:
        warnings.warn("of this request", stacklevel=1)
        return {}

    with Engine(case.pipe) as engine, warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        future = engine.post(**good(case, 0), callback_on_step_end=complain)
        warnings.warn("of this request, in another thread", stacklevel=1)
        future.result(timeout=30)
    assert {str(one.message) for one in shown} >= {"of this request", "of this request, in another thread"}
    texts = [r.getMessage() for r in caplog.records if r.name == "speca.engine"]
    assert "UserWarning: of this request" in texts and not any("another thread" in text for text in texts)


@pytest.mark.parametrize("threaded", [True, False], ids=["thread", "generate"])
def test_an_engine_may_be_closed_in_a_callback(threaded: bool) -> None:
    case, told = tiny.flux(), list[Exception]()

    def close(*_: Any) -> dict[str, Any]:
        try:
            engine.close()
        except Exception as error:
            told.append(error)
        return {}

    engine = Engine(case.pipe, tiny.VERIFYING)
    asked = {**good(case, 0), "callback_on_step_end": close}
    if threaded:
        futures = [engine.post(**asked), engine.post(**good(case, 1))]
        errors = [future._done.result(timeout=30).error for future in futures]
    else:
        errors = []
        with pytest.raises(EngineClosedError):
            errors.extend(result.error for result in engine.generate([asked] * 300))
    assert not told and errors and all(isinstance(error, CancelledError) for error in errors)
    engine.close()
    assert not engine.alive and ATTRIBUTE not in case.transformer.__dict__


# ------------------------------------------------------------------------------------------------ the end
def test_everything_refuses_after_close(case: tiny.Case) -> None:
    for started in (False, True):
        engine = Engine(case.pipe, tiny.VERIFYING)
        if started:
            engine.post(**good(case, 0)).result(timeout=30)
        engine.close()
        engine.close()
        assert not engine.alive
        for refused in (
            lambda engine=engine: engine.post(**good(case, 0)),
            lambda engine=engine: next(engine.generate([good(case, 0)])),
            lambda engine=engine: engine.warm(**good(case, 0)),
            lambda engine=engine: engine.drain(),
        ):
            with pytest.raises(EngineClosedError, match="is closed; make a new one"):
                refused()
    plain = Engine(case.pipe, mode="one-at-a-time")
    plain.close()
    with pytest.raises(EngineClosedError):
        next(plain.generate([good(case, 0)]))


LEAVE = """
import sys, threading
import tiny
from engine.test_failures import good
from speca.engine import Engine

case, begun = tiny.flux(), threading.Event()
engine = Engine(case.pipe, on_event=lambda event: begun.set() if event.kind == "step" else None)
futures = [engine.post(**{**good(case, n), "num_inference_steps": 400}) for n in range(8)]
assert begun.wait(60)
%s
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("how", "code"), [("", 0), ("sys.exit(3)", 3)], ids=["fall off", "exit"])
def test_a_process_may_be_left_without_close(how: str, code: int) -> None:
    done = python(LEAVE % how)
    assert done.returncode == code, done.stderr[-2000:]
    assert "terminate called" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_child_is_refused(case: tiny.Case) -> None:
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        engine.post(**good(case, 0)).result(timeout=30)
        reading, writing = os.pipe()
        with engine._driver._condition:  # as if another thread were in the middle of a post
            child = os.fork()
            if not child:
                told = f"{engine.alive} "
                try:
                    engine.post(**good(case, 0))
                except EngineClosedError as error:
                    told += str(error)
                engine.close()
                os.write(writing, told.encode())
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert os.read(reading, 1000).decode().startswith("False the engine belongs to another process")
        assert engine.alive and engine.post(**good(case, 0)).result(timeout=30).error is None


# ------------------------------------------------------------------------------------------------ one pipeline
def test_a_second_engine_on_a_pipeline_is_refused(case: tiny.Case) -> None:
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        with pytest.raises(ConfigError, match=r"FluxTransformer2DModel of this FluxPipeline already.*close it first"):
            Engine(case.pipe)
        assert engine.post(**good(case, 0)).result(timeout=30).report is not None, "the first one is as it was"
    with Engine(case.pipe) as other:
        assert other.alive


def test_an_engine_that_nobody_keeps_ends_when_its_requests_have(held: Held) -> None:
    case = tiny.flux()
    future = Engine(case.pipe).post(**good(case, 0), callback_on_step_end=held)
    (thread,) = [t for t in threading.enumerate() if t.name == "speca-engine"]
    assert held.reached.wait(30)
    held.go.set()
    assert future.result(timeout=30).error is None
    thread.join(30)
    assert not thread.is_alive() and ATTRIBUTE not in case.transformer.__dict__
    Engine(case.pipe, mode="one-at-a-time")  # one without a thread is gone at once
    Engine(case.pipe).close()


def test_a_direct_call_beside_a_busy_engine_takes_its_turns(case: tiny.Case) -> None:
    """It ends while the engine is busy all the time, and both give what they give alone."""
    oracle = alone(case)
    given = dict(steps=6)
    with speca.enabled(case.pipe, tiny.VERIFYING):
        plain = case([3], **given)
    done, posted = threading.Event(), list[Any]()

    def refill(event: Event) -> None:
        if event.kind == "started" and not done.is_set():  # one more for each that starts
            posted.append(engine.post(**good(case, event.index)))

    with Engine(case.pipe, tiny.VERIFYING, max_batch=4, max_live=4, on_event=refill) as engine:
        posted.extend(engine.post(**good(case, n)) for n in range(4))
        direct = case([3], **given)
        assert any(not future.done() for future in posted)
        done.set()
        for future in list(posted):
            demand_right(future.result(timeout=30), oracle)
        assert float((direct - plain).abs().max() / plain.abs().max()) < CLOSE


def test_a_direct_call_is_refused_when_its_turn_does_not_come(
    case: tiny.Case, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    with Engine(case.pipe, tiny.VERIFYING) as engine:
        future = engine.post(**good(case, 0), callback_on_step_end=held)
        assert held.reached.wait(30)
        with pytest.raises(ConfigError, match=r"called directly while its engine runs.*post the call to the engine"):
            case([3], steps=6)
        held.go.set()
        result = future.result(timeout=30)
        (again,) = engine.generate([good(case, 0)])
    assert decisions(result)[0][1:] == decisions(again)[0][1:] and distance(result, again) < CLOSE


def test_generate_in_two_threads_at_once_is_refused(case: tiny.Case) -> None:
    with Engine(case.pipe, tiny.VERIFYING, max_live=2) as engine:
        first, errors = engine.generate(good(case, n) for n in range(4)), list[Exception]()
        next(first)

        def other() -> None:
            try:
                list(engine.generate([good(case, 0)]))
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join(30)
        assert isinstance(errors[0], ConfigError) and "another thread" in str(errors[0])
        assert len(list(first)) == 3
