"""One step of a linear sampler, and how a change of the model's outputs travels through such steps.

A linear sampler computes each sample as a weighted sum of the first sample and of the outputs it was given. With the
weights `W_ij` of output j in the sample at step i, a one-step sampler (flow Euler, DDIM) is `x' = a_i x + b_i v_i`.
Samplers with memory (DPM-Solver++, UniPC, DEIS) also use outputs of `p - 1` earlier steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

Value = TypeVar("Value", float, np.ndarray[Any, np.dtype[np.float64]], Tensor)

INERT = 1e-6
"""An output whose unit changes the next sample by less than this is taken not to change it."""


class Transition(NamedTuple):
    """One step of a linear sampler with memory p (p = 1: only the current output is used).

    A change of earlier outputs is described completely by p numbers: how much it changes this step's sample and, with
    all later outputs unchanged, the p - 1 samples after it. `advance` moves these numbers one step on.

    Attributes:
        keep: (p,) weights of those p samples in the sample after them; for p = 1 `x' = keep * x + effect * output`.
        effect: (p,) change of the next p samples for one unit of this step's output.
        jacobian: change of the output with the sample, `d output = jacobian * dx`; see `core/correction.py`.
        size: `p + q` of the path `x = p x_0 + q noise` at this step; `x / size` lies on the straight path of a flow.
        signal: `p` of that path.
        parts: `(A, B)` where the output is `A noise + B x_0`.
        noisy: whether the sampler adds noise.
    """

    keep: tuple[float, ...]
    effect: tuple[float, ...]
    jacobian: float = 0.0
    size: float = 1.0
    signal: float = 1.0
    parts: tuple[float, float] = (0.0, 0.0)
    noisy: bool = False

    @property
    def inert(self) -> bool:
        """Whether the output hardly changes the next sample, as at the last step of some schedules."""
        return abs(self.effect[0]) < INERT


def advance(change: Sequence[Value], step: Transition, output: Any = 0.0) -> list[Value]:
    """Return the change of the p samples from the next step on.

    Args:
        change: of the p samples from this step on: numbers, arrays or tensors of one shape.
        step: the transition of this step.
        output: change of this step's output.
    """
    last = step.keep[0] * change[0]
    for keep, later in zip(step.keep[1:], change[1:], strict=True):
        last = last + keep * later
    return [c + effect * output for c, effect in zip([*change[1:], last], step.effect, strict=True)]
