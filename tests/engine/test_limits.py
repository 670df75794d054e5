"""What an engine takes and what it refuses, and what it says of how long things take."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from engine.test_failures import STEPS, alone, demand_right, good
from engine.test_waiters import Held, held
from speca.engine import Engine, Result
from speca.engine.finite import Finite
from speca.engine.future import Future
from speca.engine.pace import Pace
from speca.engine.request import Request
from speca.errors import CancelledError, ConfigError, EngineClosedError, InputError, NonFiniteError, QueueFullError
from speca.reports.report import Report

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
__all__ = ["held"]


@pytest.fixture(scope="module")
def case() -> tiny.Case:
    return tiny.flux()


# ------------------------------------------------------------------------------------------------ the queue
def test_what_can_start_at_once_does_not_count_as_waiting(case: tiny.Case, held: Held) -> None:
    with Engine(case.pipe, tiny.VERIFYING, max_live=3, max_queue=2) as engine:
        futures = [engine.post(**good(case, 0), callback_on_step_end=held)]
        assert held.reached.wait(30)
        futures += [engine.post(**good(case, n)) for n in range(4)]  # two that will start, and two that wait
        with pytest.raises(QueueFullError, match=r"as many as may; try again in 1\.0 s") as refused:
            engine.post(**good(case, 9))
        assert refused.value.retry_after == 1.0, "nothing was measured"
        held.go.set()
        assert all(future.result(timeout=30).error is None for future in futures)


def test_with_a_queue_of_none_what_can_start_is_taken(case: tiny.Case, held: Held) -> None:
    with Engine(case.pipe, tiny.VERIFYING, max_live=1, max_queue=0) as engine:
        for _ in range(2):
            engine.post(**good(case, 0)).result(timeout=30)
        future = engine.post(**good(case, 0), callback_on_step_end=held)
        assert held.reached.wait(30)
        with pytest.raises(QueueFullError) as refused:
            engine.post(**good(case, 1))
        assert 0.05 <= refused.value.retry_after < 30 and refused.value.retry_after != 1.0
        held.go.set()
        future.result(timeout=30)
        assert len(list(engine.generate(good(case, n) for n in range(5)))) == 5, "generate takes what there is room for"


# ------------------------------------------------------------------------------------------------ drain
def test_drain_finishes_what_is_under_way_and_takes_no_more(case: tiny.Case, held: Held) -> None:
    oracle = alone(case)
    with Engine(case.pipe, tiny.VERIFYING, max_live=2) as engine:
        futures = [engine.post(**good(case, n), callback_on_step_end=held) for n in range(4)]
        assert held.reached.wait(30)
        assert engine.drain(timeout=0.01) is False
        with pytest.raises(EngineClosedError, match="takes no more requests"):
            engine.post(**good(case, 0))
        assert engine.alive
        waiting: list[bool] = []
        thread = threading.Thread(target=lambda: waiting.append(engine.drain()))
        thread.start()
        held.go.set()
        thread.join(30)
        assert waiting == [True] and all(future.done() for future in futures)
        for future in futures:
            demand_right(future.result(), oracle)


def test_drain_drives_what_generate_has_begun(case: tiny.Case) -> None:
    with Engine(case.pipe, tiny.VERIFYING, max_live=2) as engine:
        results = engine.generate(good(case, n) for n in range(50))
        next(results)
        assert engine.drain() is True and engine.statistics["live"] == 0
        rest: list[Result] = []
        with pytest.raises(EngineClosedError):
            rest.extend(results)
        assert rest and all(result.error is None for result in rest)


# ------------------------------------------------------------------------------------------------ figures
def test_an_estimate_is_made_of_what_is_outstanding_and_what_was_measured() -> None:
    pace = Pace(steps=20)

    def future(steps: int | None, done: int = 0) -> Future:
        arguments = {} if steps is None else {"num_inference_steps": steps}
        found = Future(0, Request(arguments=arguments, config=None, seed=0))  # type: ignore[arg-type]
        found.reach(done, 0)
        return found

    request = future(10).request
    assert pace.estimate(request, []) == 0.0 and pace.until_room([future(10)]) == 1.0
    for _ in range(400):
        pace.ticked(0.1, 0)  # of drafts
        pace.ticked(0.3, 4)  # a batch of four full steps
    assert pace.seconds == pytest.approx(0.1, rel=0.05) and pace.round == pytest.approx(0.4, rel=0.05)
    assert pace.estimate(request, []) == pytest.approx(4.0, rel=0.05), "alone it takes a round a step"
    ahead = [future(10, 4), future(None), future(30)]
    assert pace.left(ahead) == 6 + 20 + 30
    assert pace.estimate(request, ahead) == pytest.approx(6.6, rel=0.05)
    assert pace.until_room(ahead) == pytest.approx(0.1 * 56 / 3, rel=0.05)
    pace.share = 0.25
    assert pace.left(ahead) == 14


def test_an_engine_measures_and_is_warmed(case: tiny.Case) -> None:
    with Engine(case.pipe, tiny.VERIFYING, max_batch=4) as engine:
        assert engine.estimate(**good(case, 0)) == 0.0
        asked = {**good(case, 0), "num_inference_steps": STEPS + 2}
        result = engine.warm(**asked)
        assert isinstance(result.report, Report) and result.report.steps == STEPS + 2 and result.seed == 0
        assert engine.estimate(**asked) > engine.estimate(**good(case, 0)) > 0
        assert 0 < engine._loop.pace.share <= 1
        engine.post(**good(case, 1)).result(timeout=30)
        assert engine.warm(**good(case, 3)).report.steps == STEPS, "also beside the thread"
        with pytest.raises(RuntimeError):
            engine.warm(**{**good(case, 0), "prompt_embeds": torch.zeros(1, 6, 5)})
        with pytest.raises(InputError, match="takes no argument 'promt'"):
            engine.estimate(promt="a")
    with Engine(case.pipe, mode="one-at-a-time") as engine:
        assert engine.warm(**good(case, 0)).error is None


# ------------------------------------------------------------------------------------------------ what a request says
@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (dict(deadline="5"), "deadline='5' is not valid; it is a number of seconds"),
        (dict(deadline=float("nan")), "deadline=nan"),
        (dict(settings=5), "settings=5 must be a dictionary"),
        (dict(tolerance="low"), "tolerance='low' must be a number"),
        (dict(speedup=[4]), r"speedup=\[4\] must be a number"),
        (dict(num_inference_steps=0), "num_inference_steps=0 is not valid; use a whole number from 1 on"),
        (dict(num_inference_steps="20"), "num_inference_steps='20' is not valid"),
        (dict(num_inference_steps=2.5), r"num_inference_steps=2\.5 is not valid"),
        (dict(height=-16), "height=-16 is not valid"),
        (dict(num_images_per_prompt=True), "num_images_per_prompt=True is not valid"),
        (dict(scheduler="x"), "scheduler='x' is no scheduler of diffusers"),
        (dict(preview="picture"), "preview='picture' is not valid; use True for latents, or a number of images"),
        (dict(priority=None), "priority=None must be a whole number"),
    ],
)
def test_a_wrong_value_is_refused_when_it_is_posted(case: tiny.Case, asked: dict[str, Any], says: str) -> None:
    with Engine(case.pipe) as engine, pytest.raises((InputError, ConfigError), match=says):
        engine.post(**{**good(case, 0), **asked})


def test_whole_numbers_of_numpy_are_whole_numbers(case: tiny.Case) -> None:
    with Engine(case.pipe) as engine:
        asked = {**good(case, 0), "num_inference_steps": np.int64(4)}
        assert engine.post(**asked).result(timeout=30).error is None


def test_seeds_come_from_the_operating_system_and_are_told(case: tiny.Case) -> None:
    asked = {n: v for n, v in good(case, 0).items() if n != "generator_seed"}
    with Engine(case.pipe) as engine:
        drawn = []
        for _ in range(3):
            torch.manual_seed(0)  # as every request does
            drawn.append(engine.post(**asked).result(timeout=30))
        assert len({result.seed for result in drawn}) == 3
        again = engine.post(**asked, generator_seed=drawn[0].seed).result(timeout=30)
        assert torch.allclose(again.output[0], drawn[0].output[0], atol=1e-5)


# ------------------------------------------------------------------------------------------------ what it gives
def with_output(case: tiny.Case, kind: str) -> dict[str, Any]:
    return {**good(case, 0), "output_type": kind}


@pytest.mark.parametrize("kind", ["pil", "np", "latent"])
@pytest.mark.parametrize("mode", ["continuous", "one-at-a-time"])
def test_a_result_that_is_not_finite_is_an_error(kind: str, mode: Any) -> None:
    case = tiny.flux()
    bad = with_output(case, kind)
    bad["prompt_embeds"] = bad["prompt_embeds"] * float("nan")
    with Engine(case.pipe, mode=mode) as engine:
        wrong, right = sorted(engine.generate([bad, with_output(case, kind)]), key=lambda r: r.index)
    assert isinstance(wrong.error, NonFiniteError) and wrong.output is None
    assert "bfloat16 or float32" in str(wrong.error) and right.error is None


def test_an_autoencoder_that_overflows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latents are finite, and the picture would be black."""
    case = tiny.flux()
    real = case.pipe.vae.decode
    monkeypatch.setattr(case.pipe.vae, "decode", lambda *a, **k: (real(*a, **k)[0] * float("inf"),))
    with Engine(case.pipe) as engine, pytest.raises(NonFiniteError, match="decoded picture"):
        engine.post(**with_output(case, "pil")).result(timeout=30)
    assert "postprocess" not in vars(case.pipe.image_processor)


def test_what_counts_as_finite() -> None:
    black = Image.new("RGB", (2, 2))
    for output in (torch.zeros(2), np.zeros(2), [black], ([black], None), {"images": np.zeros(2, np.uint8)}, "text"):
        Finite().demand(output)
    for output in (
        torch.tensor([np.nan]),
        np.array([np.inf]),
        ([np.array([np.nan])],),
        {"images": torch.tensor(np.inf)},
    ):
        with pytest.raises(NonFiniteError, match="the output of this request"):
            Finite().demand(output)


def test_a_deadline_holds_for_a_request_that_drafts_alone(case: tiny.Case) -> None:
    """One-at-a-time has no rounds in which it would be looked at."""
    with Engine(case.pipe, mode="one-at-a-time") as engine:
        (result,) = engine.generate([{**good(case, 0), "deadline": 1e-6}])
    assert isinstance(result.error, CancelledError)
