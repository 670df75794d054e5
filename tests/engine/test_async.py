"""The asynchronous face: futures, events, cancelling, limits, closing."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from engine.test_failures import STEPS, alone, demand_right, good
from speca import zoo
from speca.engine import Engine, Event, Future
from speca.errors import CancelledError, ConfigError, QueueFullError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers


@pytest.fixture(scope="module")
def case() -> tiny.Case:
    return tiny.flux()


def test_futures_events_and_reports(case: tiny.Case) -> None:
    oracle = alone(case)

    async def main() -> None:
        with Engine(case.pipe, tiny.VERIFYING, max_batch=4) as engine:
            futures = [await engine.submit(**good(case, n)) for n in range(6)]
            told = [(e.kind, e.step, e.total) async for e in futures[5].events()]
            for result in await asyncio.gather(*[_result(future) for future in futures]):
                demand_right(result, oracle)
            assert told[-1][0] == "done" and told[0][0] in ("queued", "started", "step")
            steps = [step for kind, step, total in told if kind == "step"]
            assert steps == sorted(set(steps)) and steps[-1] == STEPS and told[-1][2] == STEPS
            assert futures[0].progress == 1.0 and futures[0].done()
            report = futures[0].report
            assert report is not None and len(report.samples[0].decisions) == STEPS
            assert report.seconds < 5 and report.host_reads <= STEPS

    asyncio.run(main())


async def _result(future: Any) -> Any:
    return await future


def test_cancel_and_deadline(case: tiny.Case) -> None:
    async def main() -> None:
        with Engine(case.pipe, tiny.VERIFYING) as engine:
            long = await engine.submit(**{**good(case, 0), "num_inference_steps": 400})
            late = await engine.submit(**{**good(case, 1), "num_inference_steps": 400, "deadline": 0.05})
            async for event in long.events():
                if event.kind == "step" and event.step >= 3:
                    long.cancel()
            with pytest.raises(CancelledError, match="cancelled"):
                await long
            assert long.last.step < 400 and long.outcome.report is not None
            with pytest.raises(CancelledError, match=r"deadline of 0\.05 s"):
                await late
            long.cancel()  # harmless

    asyncio.run(main())


def test_generate_beside_submitted_requests(case: tiny.Case) -> None:
    oracle = alone(case)
    with Engine(case.pipe, tiny.VERIFYING, max_batch=4) as engine:
        future = engine.post(**good(case, 3))
        for result in engine.generate(good(case, n) for n in range(10)):
            demand_right(result, oracle)
        demand_right(future.result(timeout=60), oracle)


def test_a_loop_and_a_thread_do_not_drive_at_once(case: tiny.Case) -> None:
    with Engine(case.pipe, max_live=2) as engine:
        for _ in engine.generate(good(case, n) for n in range(4)):
            with pytest.raises(ConfigError, match="is under way"):
                engine.post(**good(case, 9))
            break
        assert engine.post(**good(case, 9)).result(timeout=60).error is None


def test_a_full_queue_and_a_closed_engine_refuse(case: tiny.Case) -> None:
    engine = Engine(case.pipe, max_live=1, max_queue=2)
    futures: list[Future] = []
    with pytest.raises(QueueFullError, match="as many as may"):
        futures.extend(engine.post(**{**good(case, n), "num_inference_steps": 300}) for n in range(50))
    assert 2 <= len(futures) <= 6
    engine.close()
    assert all(future.done() for future in futures)
    with pytest.raises(CancelledError):
        futures[-1].result()
    with pytest.raises(ConfigError, match="is closed"):
        engine.post(**good(case, 0))
    with Engine(case.pipe, mode="one-at-a-time") as plain, pytest.raises(ConfigError, match="plain loop"):
        plain.post(**good(case, 0))


def test_statistics_and_the_picture(case: tiny.Case, tmp_path: Path) -> None:
    with Engine(case.pipe, tiny.VERIFYING, threshold=0.5, max_batch=4) as engine:
        results = list(engine.generate(good(case, n) for n in range(12)))
        found = engine.statistics
        engine.timeline(tmp_path / "engine.png", "twelve requests")
    steps = "".join(s.decisions for r in results for s in r.report.samples)
    assert (found["full"], found["accepted"], found["rejected"]) == tuple(map(steps.count, "FAR"))
    assert found["done"] == 12 and found["failed"] == 0
    assert 0 < found["lanes"]["full"]["occupancy"] <= 1 and found["lanes"]["full"]["longest"] <= 8 + 12
    first = len({r.index for r in results if "self-test" in "".join(r.report.notes)})
    assert found["lanes"]["full"]["rows"] == steps.count("F") + steps.count("R") - first
    assert found["reads"] <= found["ticks"] and found["planning"] < found["seconds"]
    assert Image.open(tmp_path / "engine.png").width > 800


@pytest.mark.parametrize(
    "scheduler",
    [None, diffusers.DDIMScheduler(clip_sample=False), diffusers.UniPCMultistepScheduler()],
    ids=["flow", "ddim", "unipc"],
)
def test_previews_come_closer_to_the_result_and_change_nothing(scheduler: Any) -> None:
    case = tiny.flux() if scheduler is None else tiny.dit()
    asked = {**case.arguments, **case.conditions([2]), "num_inference_steps": 12, "generator_seed": 2}
    asked |= {"scheduler": scheduler, "settings": dict(threshold=0.0)}
    shown: list[torch.Tensor] = []

    def listen(event: Event) -> None:
        if event.clean is not None:
            shown.append(event.clean)

    with Engine(case.pipe, tiny.VERIFYING, on_event=listen) as engine:
        list(engine.generate([asked]))  # its first step is that of the self-test
        (plain,) = engine.generate([asked])
        assert not shown
        (result,) = engine.generate([{**asked, "preview": True}])
    assert np.array_equal(result.output[0], plain.output[0])
    if isinstance(scheduler, diffusers.UniPCMultistepScheduler):
        assert not shown  # it has none to tell
        return
    assert len(shown) == 12
    final = shown[-1]
    if scheduler is None:
        torch.testing.assert_close(final, result.output[0])  # the last step goes all the way
    gaps = [float((clean - final).norm()) for clean in shown]
    assert gaps[0] > gaps[6] > gaps[10] > 0


def test_python_in_the_guide_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
    first, later = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    monkeypatch.setattr(zoo, "load", lambda name: tiny.dit().pipe)
    said: list[tuple[Any, ...]] = []
    exec(first, {"print": lambda *words: said.append(words)})
    assert sorted(words[0] for words in said) == [0, 1, 2] and {len(words[1]) for words in said} == {50, 28}
    said.clear()
    exec(later, {"print": lambda *words: said.append(words)})
    assert said[-2][0] == "done" and said[-1][1] == 1.0
