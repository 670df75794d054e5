"""The prior: second moments of a model's outputs along its runs, known before a run begins.

Any forecast or quadrature that is linear in the outputs `v_i` of the steps is judged by their second moments alone,

    C_ij = E <v_i, v_j> / size,

as the mean square of `sum_i c_i v_i` is `c C c`. The best linear estimate of `v_t` from outputs at some nodes S then
has the weights `C_SS^-1 C_St` (Gauss and Markov; in geostatistics, kriging; as a quadrature, Bayesian). A polynomial
guesses that outputs are smooth; this has measured how. The weights serve drafts and the corrector instead of its own.

A `Prior` is measured once for a model and guidance, from outputs alone (`speca.calibrate`). It is a few kilobytes, and
is taken to other numbers of steps along the noise axis, and to other samplers that lead a sample along the same path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import ConfigError

NUGGET = 1e-5
"""Share of its mean square that an output is taken to be off by, as it is computed where drafts have led to."""

DENSER = 10
"""How many times denser than those measured steps may lie; between them moments are interpolated."""

DEPTH = 3
"""Outputs of full steps that a draft is made of; a fourth added nothing measurable."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Prior:
    """Second moments of a model's outputs along T steps.

    Attributes:
        noise: (T,) where the steps stand: diffusion time, falling, about 1 at pure noise.
        moments: (T, T) `C`, per element, symmetric and positive.
        noisy: whether the sampler they were measured with adds noise; outputs are then less alike than without.
        placed: where to compute numbers of full steps, as far as that was found beforehand (`core/placement.py`).

    Raises:
        ConfigError: shapes do not fit, or `moments` is no matrix of second moments.
    """

    noise: tuple[float, ...]
    moments: Array
    placed: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    noisy: bool = False

    def __post_init__(self) -> None:
        steps = len(self.noise)
        whole = self.moments.shape == (steps, steps) and np.isfinite(self.moments).all()
        if not whole or (np.diag(self.moments) <= 0).any() or not np.allclose(self.moments, self.moments.T):
            raise ConfigError(f"this is no prior of {steps} steps; make one with speca.calibrate.")

    def weights(self, nodes: Sequence[int], targets: Sequence[int]) -> Array:
        """Return the best linear weights (targets, nodes) of outputs at steps `nodes` in those at steps `targets`."""
        return _weights(self, tuple(nodes), tuple(targets))

    def rule(self, nodes: Sequence[float], targets: Sequence[float]) -> list[list[float]]:
        """Return `weights` as plain numbers."""
        found: list[list[float]] = self.weights([int(n) for n in nodes], [int(t) for t in targets]).tolist()
        return found

    def innovation(self, nodes: Sequence[int], target: int) -> float:
        """Return the mean square that is expected of the output at step `target` less its forecast from `nodes`."""
        change = np.append(-self.weights(nodes, [target])[0], 1.0)
        steps = [*nodes, target]
        return float(change @ self.moments[np.ix_(steps, steps)] @ change)

    def at(self, noise: Sequence[float]) -> Prior:
        """Return the same prior for a run whose steps stand at `noise`.

        Outputs between two steps are interpolated linearly, so the moments are `W C W^T` with the weights W of that.
        """
        wanted = tuple(noise)
        if len(wanted) == len(self.noise) and np.allclose(wanted, self.noise, atol=1e-4):
            return self
        return _taken(self, wanted)

    def covers(self, noise: Sequence[float]) -> bool:
        """Return whether a run whose steps stand at `noise` can use this prior: its steps lie between those that were
        measured, at most `DENSER` of them between two."""
        rising, wanted = np.array(self.noise[::-1]), np.array(noise)
        slack = float(np.diff(rising).max()) if len(rising) > 1 else 0.0
        if (np.diff(rising) <= 0).any() or wanted.min() < rising[0] - slack or wanted.max() > rising[-1] + slack:
            return False
        between = np.bincount(np.searchsorted(rising, wanted - 1e-6), minlength=1)
        return int(between.max()) <= DENSER

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; of the moments the lower half, row by row, rounded to single precision."""
        half = [[float(f"{v:.9g}") for v in row[: i + 1]] for i, row in enumerate(self.moments.tolist())]
        placed = [list(steps) for steps in self.placed.values()]
        return {"noise": list(self.noise), "moments": half, "placed": placed, "noisy": self.noisy}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Prior:
        """Return the prior that `to_dict` was called on. Raises `ConfigError`, or what malformed values raise."""
        steps = len(values["noise"])
        moments = np.zeros((steps, steps))
        for i, row in enumerate(values["moments"]):
            moments[i, : i + 1] = moments[: i + 1, i] = row
        placed = {len(found): tuple(found) for found in values["placed"]}
        return cls(tuple(values["noise"]), moments, placed, values.get("noisy", False))


@lru_cache(maxsize=1 << 15)  # a search for placements asks for some ten thousand, most of them many times
def _weights(prior: Prior, nodes: tuple[int, ...], targets: tuple[int, ...]) -> Array:
    known = prior.moments[np.ix_(nodes, nodes)].copy()
    known[np.diag_indices(len(nodes))] *= 1 + NUGGET
    found: Array = np.linalg.solve(known, prior.moments[np.ix_(nodes, targets)]).T
    return found


@lru_cache(maxsize=64)  # the same object for the same steps, so that its placements are found once
def _taken(prior: Prior, noise: tuple[float, ...]) -> Prior:
    rising = np.array(prior.noise[::-1])
    units = np.eye(len(rising))[::-1]
    mix = np.stack([np.interp(noise, rising, unit) for unit in units.T], axis=1)
    moments = mix @ prior.moments @ mix.T
    return Prior(noise, (moments + moments.T) / 2, noisy=prior.noisy)
