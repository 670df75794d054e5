"""A rough prior, samplers that remember, and placements drawn at random: what tests of the search share."""

from __future__ import annotations

import random

import numpy as np

from speca.core.prior import Prior
from speca.core.transition import Transition

STEPS = 14


def rough() -> Prior:
    t = np.linspace(0, 1, STEPS)
    return Prior(tuple(1 - t), np.exp(-3 * np.abs(t[:, None] - t)) * (1 + t[:, None] * t))


def sampler(memory: int) -> tuple[Transition, ...]:
    """Steps of a sampler that remembers, and whose outputs follow the sample."""
    keep, effect = (0.1, -0.2, 1.1)[3 - memory :], (-0.15, -0.1, 0.05)[:memory]
    return tuple(
        Transition(tuple(k + 0.002 * j for k in keep), tuple(e - 0.002 * j for e in effect), 0.3, 1 + 0.03 * j)
        for j in range(STEPS)
    )


def placements(count: int, number: int = 20) -> np.ndarray:
    chance = random.Random(count)
    return np.array([[0, *sorted(chance.sample(range(1, STEPS), count - 1))] for _ in range(number)])
