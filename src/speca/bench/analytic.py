"""Denoisers in closed form, drawn from seeds: exact models that nobody has trained or tuned on.

The data is a product of G independent mixtures of K Gaussians in d dimensions each, so D = G d elements. On a path
`x = p x_0 + q noise` the best guess of the data is known exactly: with the means `m_k`, variances `s_k` and
probabilities `w_k` of a mixture,

    E[x_0 | x] = sum_k r_k (m_k + p s_k / (p^2 s_k + q^2) (x - p m_k)),   r_k ~ w_k N(x; p m_k, p^2 s_k + q^2).

Few, narrow and distant modes make a stiff model, whose errors of the first steps decide which mode a sample ends in;
many or broad ones make a smooth one. Mixtures of different scale are decided at different noise levels, as the coarse
and the fine parts of a picture are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ..denoiser.denoiser import Denoiser

Path = Literal["flow", "vp", "edm"]
"""`x = (1 - t) x_0 + t noise` and the velocity; `p^2 + q^2 = 1` and the noise; `x_0 + sigma noise` and the data."""

PATHS: tuple[Path, ...] = ("flow", "vp", "edm")
CLASSES = 4


@dataclass(frozen=True)
class AnalyticModel:
    """One denoiser in closed form.

    Attributes:
        name: says how it was drawn.
        path: what it was "trained" on, which fixes what it predicts.
        means: (G, K, d) of the Gaussians.
        variances: (G, K).
        logits: (CLASSES + 1, G, K) logarithms of the probabilities of the modes: of each class, then of all data.
        guidance: scale of classifier-free guidance; 1 is the conditional model.
    """

    name: str
    path: Path
    means: Tensor
    variances: Tensor
    logits: Tensor
    guidance: float

    @property
    def size(self) -> int:
        """Number of elements D of a sample."""
        return self.means.shape[0] * self.means.shape[2]

    def noise(self, seeds: list[int]) -> Tensor:
        """Return the noise (n, D) of some seeds."""
        return torch.stack([torch.randn(self.size, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def denoised(self, x: Tensor, p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
        """Return the expected data (n, D), with guidance, given noisy samples x (n, D) at levels `p` and `q` (n,) and
        classes `labels` (n,)."""
        parts = x.double().view(len(x), self.means.shape[0], self.means.shape[2])  # (n, G, d)
        p, q = (level.double().view(-1, 1, 1) for level in (p, q))
        spread = p**2 * self.variances + q**2  # (n, G, K)
        along = torch.einsum("ngd,gkd->ngk", parts, self.means)
        apart = parts.square().sum(-1, keepdim=True) - 2 * p * along + p**2 * self.means.square().sum(-1)
        likely = -apart / (2 * spread) - 0.5 * self.means.shape[2] * spread.log()
        gain = p * self.variances / spread

        def guess(logits: Tensor) -> Tensor:
            share = (likely + logits).softmax(-1)
            means = torch.einsum("ngk,gkd->ngd", share * (1 - gain * p), self.means)
            return (means + (share * gain).sum(-1, keepdim=True) * parts).flatten(1)

        found = guess(self.logits[labels])
        if self.guidance != 1:
            free = guess(self.logits[-1:])
            found = free + self.guidance * (found - free)
        return found

    def levels(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return `p` and `q` at a time: of a flow t, of "edm" sigma, of "vp" the ratio q / p as well."""
        if self.path == "flow":
            return 1 - time, time
        if self.path == "edm":
            return torch.ones_like(time), time
        p = (1 + time**2).rsqrt()
        return p, time * p

    def __call__(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Return what the model predicts (n, D) at `time` (n,), see `levels`: velocity, noise, or data."""
        p, q = self.levels(time)
        data = self.denoised(x, p, q, labels)
        if self.path == "edm":
            return data.to(x.dtype)
        noise = (x.double() - p.double().view(-1, 1) * data) / q.double().view(-1, 1)
        return (noise - data if self.path == "flow" else noise).to(x.dtype)


def analytic(seed: int) -> AnalyticModel:
    """Return the model of a seed. Even seeds are for tuning, odd ones for reporting."""
    generator = torch.Generator().manual_seed(7_000_000 + seed)

    def one_of(*values: float) -> float:
        return values[int(torch.randint(len(values), (), generator=generator))]

    path = PATHS[seed // 2 % len(PATHS)]
    groups, width, modes = int(one_of(1, 4, 16, 64)), int(one_of(2, 4, 16, 64)), int(one_of(2, 4, 16, 64))
    decay, narrow, guidance = one_of(0, 0.5, 1), one_of(0.02, 0.1, 0.3, 0.8), one_of(1, 1, 2, 4)
    scale = torch.arange(1, groups + 1, dtype=torch.float64) ** -decay
    scale = scale / scale.square().mean().sqrt()
    means = torch.randn(groups, modes, width, generator=generator, dtype=torch.float64)
    share = (1 - narrow**2) ** 0.5  # so that the data has a variance of about 1
    variances = (narrow * scale).square().view(-1, 1).expand(groups, modes)
    tilt = torch.randn(CLASSES, groups, modes, generator=generator, dtype=torch.float64) * one_of(0, 1, 3)
    logits = torch.cat([tilt, torch.zeros(1, groups, modes, dtype=torch.float64)])
    name = f"analytic-{seed}-{path}-{groups}x{width}-{modes}-{narrow:g}-{decay:g}-{guidance:g}"
    centres = share * scale.view(-1, 1, 1) * means
    return AnalyticModel(name, path, centres, variances.contiguous(), logits.log_softmax(-1), guidance)


def euler(denoise: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """Return the sample that Euler's method for flows leads to: `x' = x + (t' - t) v`."""
    for here, there in pairwise(sigmas):
        x = x + (there - here) * denoise(x, here)
    return x


def edm_euler(denoise: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """Return the sample that Euler's method leads to for `dx / d sigma = (x - D) / sigma` (EDM, arXiv:2206.00364)."""
    for here, there in pairwise(sigmas):
        x = x + (there - here) * (x - denoise(x, here)) / here
    return x


def draw(model: AnalyticModel, seeds: list[int], steps: int, **settings: Any) -> Tensor:
    """Return the samples (n, D) of some seeds, by Euler's method on even times (flow) or on the sigmas of EDM.

    Args:
        model: a flow or an EDM model; those of path "vp" need a scheduler of their own.
        seeds: n seeds; their classes take turns.
        steps: number of steps.
        **settings: of `speca.Denoiser`; without any the model is run at every step.

    Raises:
        ValueError: the model's path is "vp".
    """
    if model.path == "vp":
        raise ValueError(f"{model.name} predicts noise of a variance-preserving path; draw takes flows and EDM models.")
    flow, labels = model.path == "flow", torch.tensor(seeds) % CLASSES
    rho, least, most = 7, 0.002, 80.0  # EDM's
    if flow:
        sigmas = torch.linspace(1, 0, steps + 1)
    else:
        sigmas = torch.cat([torch.linspace(most ** (1 / rho), least ** (1 / rho), steps) ** rho, torch.zeros(1)])

    def function(x: Tensor, sigma: Tensor) -> Tensor:
        return model(x, sigma.reshape(-1).expand(len(x)), labels)

    sampler, denoise = euler if flow else edm_euler, function
    if settings:
        prediction: Any = "velocity" if flow else "denoised"
        denoise = Denoiser(function, sampler=sampler, sigmas=sigmas, prediction=prediction, **settings)
    return sampler(denoise, model.noise(seeds) * sigmas[0], sigmas)
