"""The generic prior: second moments of the outputs of a model that nobody has measured, from its sampler alone.

On the path `x = p x_0 + q n` of data of variance `lambda`, were it Gaussian, the sampler's ODE would lead a sample
along `x = s z` with `s^2 = p^2 lambda + q^2`, where the best guesses are `x_0 = p lambda z / s` and `n = q z / s`.
Images have a spectrum of variances; here it is level between two bounds. They are not Gaussian either: as noise falls,
details are decided, and the guess of the data moves in ways that depend on the sample. That is taken as a Gaussian
process, stationary in log q/p, slow for the most part and with a small fast part:

    x_0 moves by  q / (p + q) g,   n by  -p / (p + q) g,   E g g' = sum_k a_k exp(-(log q/p - log q'/p')^2 / (2 l_k^2)).

What an output is made of, `A n + B x_0`, is read off the sampler, which it has to lead from `p x_0 + q n` to
`p' x_0 + q' n` (`Transition.parts`). What a model
predicts, noise or a velocity, need not be known: it follows from the sampler.
The six numbers were fitted once to two models measured, a flow and a DDIM. On models that took no part it has gained
much and lost much, and is an option (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .prior import NUGGET, Array, Prior
from .transition import Transition

VARIANCES = np.geomspace(0.015, 2.0, 12)
"""Of the data's components, of equal weight; latents have a variance of about 1 in all."""

PROCESS = ((0.4, 2.0), (0.015, 0.25))
"""Variance `a_k` and length `l_k` in log q/p of the parts of `g`."""

LEAST_SIGNAL = 1e-3

SHARE = 0.01
"""Of the generic prior in one that was learnt from single runs (docs/LOG.md)."""


@lru_cache(maxsize=64)
def generic(noise: tuple[float, ...], transitions: tuple[Transition, ...]) -> Prior | None:
    """Return the prior of a run of T steps at the diffusion times `noise`; None where the sampler's path is unknown."""
    p, q = _path(transitions)
    if (q <= 0).any() or (p < 0).any():
        return None
    found = moments(transitions)
    valid = np.isfinite(found).all() and (np.diag(found) > 0).all()  # not where a sampler leaves its path
    return Prior(noise, found) if valid else None


@lru_cache(maxsize=64)
def blended(prior: Prior, transitions: tuple[Transition, ...]) -> Prior:
    """Return a prior learnt from few outputs with a small share of the generic one, scaled to its mean squares: what
    one run happens to show exactly is then not taken for certain. The same where the sampler's path is unknown."""
    other = generic(prior.noise, transitions)
    if other is None:
        return prior
    scale = np.sqrt(np.diag(prior.moments) / np.diag(other.moments))
    mixed = (1 - SHARE) * prior.moments + SHARE * (scale[:, None] * other.moments * scale)
    return Prior(prior.noise, (mixed + mixed.T) / 2, noisy=prior.noisy)


def filled(prior: Prior, noise: tuple[float, ...], transitions: tuple[Transition, ...]) -> Prior:
    """Return the prior of a run of T steps at the diffusion times `noise`, of which only some steps were measured.

    Outputs at the other steps are expected where the generic prior puts them, given those that were measured, and
    scatter about that as it says, `G - W G_S`, times what leaving out one measured step at a time shows. Where the
    sampler's path is unknown, moments are interpolated.

    Args:
        prior: of the steps that were measured, which are among those of the run.
        noise, transitions: (T,) of the run.
    """
    other = generic(noise, transitions)
    if other is None:
        return prior.at(noise)
    steps = [int(np.abs(np.array(noise) - t).argmin()) for t in prior.noise]
    ratio = np.sqrt(np.diag(prior.moments) / np.diag(other.moments)[steps])
    scale = np.interp(np.arange(len(noise)), steps, ratio)
    expected = scale[:, None] * other.moments * scale
    known = expected[np.ix_(steps, steps)] * (1 + NUGGET * np.eye(len(steps)))
    weights = np.linalg.solve(known, expected[steps]).T
    scatter = expected - weights @ expected[steps]
    found = weights @ prior.moments @ weights.T + _scatter(prior.moments, known) * scatter
    return Prior(noise, (found + found.T) / 2, noisy=prior.noisy)


def _scatter(measured: Array, expected: Array) -> float:
    """By how much outputs scatter more than expected about what the others tell: the median over measured steps."""
    ratios = []
    for step in range(1, len(measured) - 1):
        rest = [k for k in range(len(measured)) if k != step]
        weights = np.linalg.solve(expected[np.ix_(rest, rest)], expected[rest, step])
        change = np.insert(-weights, step, 1.0)
        ratios.append(max(float(change @ measured @ change), 1e-12) / max(float(change @ expected @ change), 1e-12))
    return float(np.clip(np.median(ratios), 1e-4, 10.0)) if ratios else 1.0


def moments(
    transitions: Sequence[Transition],
    variances: Array = VARIANCES,
    process: Sequence[tuple[float, float]] = PROCESS,
) -> Array:
    """Return the second moments (T, T) of outputs under the assumptions above."""
    p, q = _path(transitions)
    of_noise, of_data = np.array([t.parts for t in transitions]).T
    s = np.sqrt(p[:, None] ** 2 * variances + q[:, None] ** 2)
    gaussian = (of_noise[:, None] * q[:, None] + of_data[:, None] * p[:, None] * variances) / s
    where = np.log(q / np.maximum(p, LEAST_SIGNAL))
    apart = (where[:, None] - where) ** 2
    moved = (of_data * q - of_noise * p) / (p + q)
    kernel = sum((a * np.exp(-apart / (2 * length**2)) for a, length in process), np.zeros_like(apart))
    found: Array = gaussian @ gaussian.T / len(variances) + moved[:, None] * kernel * moved
    found += found.T.copy()
    return found / 2


def _path(transitions: Sequence[Transition]) -> tuple[Array, Array]:
    p = np.array([t.signal for t in transitions])
    return p, np.array([t.size for t in transitions]) - p
