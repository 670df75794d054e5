"""Clients that leave and send what is wrong, memory that does not suffice, kills: others are served as ever, nothing is
lost and nothing stays. `make chaos` does more of the same."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
import torch

from serve.chaos.ends import kills, terminated
from serve.chaos.health import polled
from serve.chaos.plan import LOOKS, Client, Look, clients
from serve.chaos.process import GRACE_S, RESTING_TASKS, Keeper, keeping, settings
from serve.chaos.storm import Pictures, alone, storm, trouble_of
from serve.chaos.wrong import DRAW, WRONG
from serve.served import Served, serving
from speca import zoo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    """A server in a process of its own, for all tests of this file; one that ended it starts it again."""
    with keeping(tmp_path_factory.mktemp("chaos")) as found:
        yield found


@pytest.fixture(scope="module")
def expected(keeper: Keeper) -> Pictures:
    """Each picture, drawn by itself."""
    return asyncio.run(alone(keeper.up().port))


def good(looks: Sequence[Look]) -> list[Client]:
    """Clients that all come at once and want pictures of these looks, plain answers and streams in turn."""
    one = dataclasses.replace(clients(1, 1.0, 0)[0], kind="good", n=1, at=0.0)
    return [
        dataclasses.replace(one, number=k, look=look, seed=k % 3, stream=k % 2 == 1) for k, look in enumerate(looks)
    ]


# ------------------------------------------------------------------------------------------------ clients
def test_whatever_is_wrong_is_refused_by_name(keeper: Keeper) -> None:
    """All at once, each with 400, 404, 405, 408 or 413 in OpenAI's form; the server logs none of it as an error."""
    process = keeper.up()
    one = dataclasses.replace(clients(1, 1.0, 0)[0], kind="wrong", at=0.0)
    found = asyncio.run(storm(process.port, [dataclasses.replace(one, wrong=k) for k in range(len(WRONG))], {}))
    assert not found.troubles and sum(found.statuses.values()) == len(WRONG)
    assert not process.errors()


def test_clients_get_what_they_get_alone_whatever_others_do(keeper: Keeper, expected: Pictures) -> None:
    """A third leaves, a fourth sends what is wrong; afterwards the server holds what it held before."""
    process = keeper.up()
    first = asyncio.run(storm(process.port, clients(60, 12.0, seed=1), expected))
    before = process.settled()
    with polled(process.port) as health:
        second = asyncio.run(storm(process.port, clients(140, 12.0, seed=2), expected))
    assert not first.troubles + second.troubles
    assert second.statuses["good 200"] == len(second.waited) == 140 - 140 // 3 - 140 // 4
    assert second.statuses["leaving left"] == 140 // 3 and second.pictures >= len(second.waited)
    assert not process.leaks(before), before
    assert process.settled()["tasks"] <= RESTING_TASKS
    assert not process.errors()
    assert not health.failed and len(health.seconds) > 50 and health.quantile(0.5) < 0.1


# ------------------------------------------------------------------------------------------------ memory
class Room:
    """Puts memory for so many rows into a model, and for none where a row is of a certain class."""

    def __init__(self, model: Any) -> None:
        self.most, self.bad, self.strikes, self.refused = 1000, -1, 0, list[int]()
        real = model.forward

        @functools.wraps(real)
        def forward(*args: Any, **given: Any) -> Any:
            self._demand_room(*args, **given)
            return real(*args, **given)

        model.forward = forward

    def _demand_room(self, *args: Any, **given: Any) -> None:
        rows = len(args[0] if args else given["hidden_states"])
        strikes = rows == 1 and self.strikes > 0
        labels = given.get("class_labels")
        if rows > self.most or strikes or (labels is not None and self.bad in labels.tolist()):
            self.refused.append(rows)
            self.strikes -= strikes
            raise torch.OutOfMemoryError("of this test")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, dict[str, Room]]]:
    """A server in this process, whose memory a test can take away."""
    config = settings(tmp_path_factory.mktemp("narrow"), 0)
    pipes = {model.model: zoo.load(model.model) for model in config.models}
    rooms = {name: Room(pipe.transformer) for name, pipe in pipes.items()}
    with serving(config, pipes) as served:
        yield served, rooms


NARROW = (LOOKS[0], LOOKS[1], LOOKS[6], LOOKS[7])


@pytest.fixture(scope="module")
def pictures(narrow: tuple[Served, dict[str, Room]]) -> Pictures:
    return asyncio.run(alone(_port(narrow[0]), NARROW))


def _port(served: Served) -> int:
    return int(served.url.rpartition(":")[2])


def test_batches_that_memory_does_not_suffice_for_are_halved(
    narrow: tuple[Served, dict[str, Room]], pictures: Pictures
) -> None:
    served, rooms = narrow
    for room in rooms.values():
        room.most, room.refused = 3, []
    found = asyncio.run(storm(_port(served), good(NARROW * 4), pictures))
    for room in rooms.values():
        room.most = 1000
    assert not found.troubles and found.pictures == 16 and found.statuses == {"good 200": 16}
    assert all(room.refused and min(room.refused) > 3 for room in rooms.values())


def test_one_that_memory_does_not_suffice_for_fails_alone(
    narrow: tuple[Served, dict[str, Room]], pictures: Pictures
) -> None:
    """Whether it has company or not; what the client is told names nothing of the inside, and later ones work."""
    served, rooms = narrow
    dit, flux = rooms["fashion-dit"], rooms["emoji-flux"]
    dit.bad, flux.strikes = 9, 1
    asked = {"model": "fashion-dit", "prompt": "9", "seed": 1, "num_inference_steps": 12}

    async def both() -> Any:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
            return await asyncio.gather(
                storm(_port(served), good(NARROW[2:] * 3), pictures), *(http.post(DRAW, json=asked) for _ in range(2))
            )

    found, *failed = asyncio.run(both())
    lonely = httpx.post(f"{served.url}{DRAW}", json=NARROW[0].fields(0), timeout=60)
    for answer in (*failed, lonely):
        assert not trouble_of("memory", answer.status_code, answer.content, (500,), True)
        assert answer.json()["error"]["code"] == "internal_error" and "memory" not in answer.text
    assert not found.troubles and found.statuses == {"good 200": 6}
    dit.bad, before = -1, len(dit.refused)
    assert before and flux.strikes == 0
    later = asyncio.run(storm(_port(served), good(NARROW), pictures))
    assert not later.troubles and later.statuses == {"good 200": 4}
    assert httpx.post(f"{served.url}{DRAW}", json=asked, timeout=60).status_code == 200
    assert not served.server.running.counts and not served.server.running.cancels


# ------------------------------------------------------------------------------------------------ ends
def test_a_kill_with_jobs_of_both_models_pending_loses_none(keeper: Keeper, expected: Pictures) -> None:
    found = kills(keeper, expected, times=1)
    assert not found.troubles


def test_sigterm_under_load_answers_or_cancels_within_the_grace(keeper: Keeper) -> None:
    process = keeper.up()
    found = asyncio.run(terminated(process))
    assert not found.troubles and found.code == 0 and found.refused == 503
    assert set(found.answers) <= {"200", "200 draining", "503 draining"} and sum(found.answers.values()) == 18
    assert min(found.answers["200 draining"], found.answers["503 draining"]) >= 3, found.answers
    assert GRACE_S < found.seconds < GRACE_S + 15
    assert not process.errors()
