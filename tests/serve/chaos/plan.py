"""Who comes when, and what each client does: drawn from a seed, so that a run can be repeated."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .wrong import WRONG

Kind = Literal["good", "leaving", "wrong"]
Stage = Literal["body", "queued", "running", "stream", "end"]
STAGES: Sequence[Stage] = ("body", "queued", "running", "stream", "end")
"""When clients leave: before their body is complete, at once after it, after a while, after some events of a stream, or
at the last step of a stream, before the picture."""


@dataclass(frozen=True)
class Look:
    """What a picture depends on, but for its seed."""

    model: str
    prompt: str
    steps: int
    more: Mapping[str, Any] = field(default_factory=dict)

    def fields(self, seed: int, n: int = 1) -> dict[str, Any]:
        """The fields of a request."""
        steps = self.steps
        return dict(model=self.model, prompt=self.prompt, num_inference_steps=steps, seed=seed, n=n, **self.more)


LOOKS = (
    Look("emoji-flux", "red apple", 8),
    Look("emoji-flux", "moon", 12, dict(speedup=3)),
    Look("emoji-flux", "frog face", 20, dict(preset="fast")),
    Look("emoji-flux", "red apple", 12, dict(preset="full")),
    Look("emoji-flux", "a boat", 16, dict(preset="faithful", guidance_scale=2.0)),
    Look("fashion-dit", "bag", 8, dict(preset="full")),
    Look("fashion-dit", "coat", 12),
    Look("fashion-dit", "sneaker", 20, dict(speedup=4)),
    Look("fashion-dit", "dress", 16, dict(preset="fast")),
    Look("fashion-dit", "sandal", 12, dict(preset="paper")),
)
SEEDS = 3
"""Seeds of a look are 0, 1 and 2; a request for two pictures begins with 0 or 1."""


@dataclass(frozen=True)
class Client:
    """One client.

    Attributes:
        number: from 0.
        at: seconds after the first one at which it comes.
        kind: whether it wants a picture, leaves, or sends what is wrong.
        look, seed, n, stream: what it asks for.
        stage: when it leaves.
        patience: how long it waits before it leaves in the stage "running", in seconds.
        events: how many events of a stream it reads before it leaves in the stage "stream".
        abrupt: whether it leaves with a reset of the connection.
        wrong: index in `WRONG` of what it sends.
    """

    number: int
    at: float
    kind: Kind
    look: Look
    seed: int
    n: int
    stream: bool
    stage: Stage
    patience: float
    events: int
    abrupt: bool
    wrong: int


def clients(count: int, rate: float, seed: int) -> list[Client]:
    """Return clients that come at `rate` a second, with exponential times between them.

    One in three leaves, and of each kind of what is wrong come about equally many.
    """
    chance, at, found = random.Random(seed), 0.0, list[Client]()
    kinds: list[Kind] = ["leaving"] * (count // 3) + ["wrong"] * (count // 4)
    kinds += ["good"] * (count - len(kinds))
    chance.shuffle(kinds)
    first = chance.randrange(len(WRONG))
    for number, kind in enumerate(kinds):
        n, stage = chance.choice((1, 1, 2)), STAGES[number % len(STAGES)]
        stream = chance.random() < 0.4 if kind == "good" else stage in ("stream", "end")
        found.append(Client(
            number, at, kind, chance.choice(LOOKS), chance.randrange(SEEDS - n + 1), n, stream, stage,
            patience=chance.uniform(0.02, 1.5), events=chance.randint(1, 6), abrupt=chance.random() < 0.5,
            wrong=(first + sum(one.kind == "wrong" for one in found)) % len(WRONG),
        ))  # fmt: skip
        at += chance.expovariate(rate)
    return found
