"""The path `x = p x_0 + q noise` along which a sampler leads a sample, where nothing but its times tells of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def path_of_times(times: Sequence[float]) -> tuple[list[float], list[float], str]:
    """Return `p` and `p + q` at each call, and in words what the path was taken to be.

    Times that do not exceed 1 are those of a flow, `x = (1 - t) x_0 + t noise`, or, where they rise, `x = t x_0 +
    (1 - t) noise`. Larger ones are standard deviations of noise, `x = x_0 + sigma noise`.
    """
    if not times or max(times) > 1 + 1e-6 or min(times) < -1e-6:
        return [1.0] * len(times), [1.0 + abs(t) for t in times], "x = x_0 + sigma noise"
    if times[-1] > times[0]:
        return list(times), [1.0] * len(times), "x = t x_0 + (1 - t) noise"
    return [1.0 - t for t in times], [1.0] * len(times), "x = (1 - t) x_0 + t noise"


def path_of_scheduler(scheduler: Any, count: int) -> tuple[list[float], list[float], str]:
    """Return the same for a scheduler that has no method to add noise: from its `alphas_cumprod`, `sigmas` or times."""
    steps = torch.as_tensor(scheduler.timesteps)[:count]
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is not None and not steps.is_floating_point() and int(steps.max()) < len(kept):
        alphas = torch.as_tensor(kept, dtype=torch.float64)[steps.long()]
        p, q = alphas.sqrt(), (1 - alphas).sqrt()
        return p.tolist(), (p + q).tolist(), "x = sqrt(alpha) x_0 + sqrt(1 - alpha) noise"
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= count:
        return path_of_times(torch.as_tensor(sigmas, dtype=torch.float64)[:count].tolist())
    return path_of_times(noise_axis(scheduler)[:count])


def noise_axis(scheduler: Any) -> list[float]:
    """Return diffusion time at each of a scheduler's timesteps: falling, about 1 at pure noise."""
    times = [float(t) for t in torch.as_tensor(scheduler.timesteps).tolist()]
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if trained is None:
        trained = 1000 if times and max(times) > 1 else 1
    times = [t / float(trained) for t in times]
    return [1.0 - t for t in times] if len(times) > 1 and times[-1] > times[0] else times


def fits(parts: Sequence[tuple[float, float]], signals: Sequence[float], sizes: Sequence[float]) -> bool:
    """Return whether outputs look like what models predict on this path: noise, data, their difference, or the
    velocity `p noise - q x_0`. Only then was the path guessed well.

    `parts` are the `(A, B)` of outputs `A noise + B x_0` at each step, see `Transition`.
    """
    if len(parts) < 2:
        return True
    found = torch.tensor(parts[:-1], dtype=torch.float64)  # the last step may end anywhere
    constant = bool((found - found.median(0).values).abs().max() < 0.05)
    p = torch.tensor(signals[:-1], dtype=torch.float64)
    q = torch.tensor(sizes[:-1], dtype=torch.float64) - p
    velocity = torch.stack([p, -q], 1)
    return constant or bool((found - velocity).abs().max() < 0.05)
