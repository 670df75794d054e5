"""The linear response of a sampler: what it does with the outputs that it is given, on one schedule.

A sampler is played once on small inputs instead of a model's outputs: the first sample and each output are unit vectors
in channels of their own, so that what it makes of them can be read off as a matrix `W`. Further channels tell whether
the sampler is linear (a random mixture), has a constant part (zeros), or adds noise (where random numbers are ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.prior import Array
from ..core.transition import Transition, advance

SHAPE = (4, 2, 2)
TOLERANCE = 1e-4  # largest unexplained share, as many samplers compute in fp32
RANK = 1e-6  # relative size below which a singular value counts as zero
MEMORY = 4  # most outputs that one is mixed with, itself included: UniPC of order 3, PNDM


@dataclass(frozen=True)
class Response:
    """What a sampler does on one schedule of T calls of the model.

    Attributes:
        transitions: (T,) the linear step after each call; empty if the sampler is not linear, or not known.
        noise: (T,) diffusion time at each call, falling, about 1 at pure noise.
        times: (T,) the time or sigma that the model is given at each call.
        reason: why there are no transitions.
        note: what was assumed, for the report.
    """

    transitions: tuple[Transition, ...] = ()
    noise: tuple[float, ...] = ()
    times: tuple[float, ...] = ()
    reason: str = ""
    note: str = ""


class Probe:
    """The inputs of one trial of a sampler with T outputs: C = T + 4 channels.

    Channel 0 holds the first sample, channels 1 to T one output each, then come a random mixture of all of them, zeros,
    and zeros with noise.
    """

    def __init__(self, outputs: int, dtype: torch.dtype = torch.float64) -> None:
        self.outputs, self.channels = outputs, outputs + 4
        generator = torch.Generator().manual_seed(0)
        self.mixture = torch.randn((1 + outputs, *SHAPE), generator=generator, dtype=torch.float64)
        units = torch.eye(1 + outputs, dtype=torch.float64).view(1 + outputs, 1 + outputs, 1, 1, 1)
        inputs = torch.zeros((1 + outputs, self.channels, *SHAPE), dtype=torch.float64)
        inputs[:, : 1 + outputs] = units
        inputs[:, 1 + outputs] = self.mixture
        self.inputs = inputs.to(dtype)
        """(1 + T, C, ...): the first sample, then the outputs in order."""

    def noise(self) -> ReplacedNoise:
        """Return a context in which random numbers are zero, and one in the last channel."""
        return ReplacedNoise(self.channels)

    def response(self, samples: Sequence[Tensor]) -> tuple[Array, bool] | None:
        """Return `W` (T + 1, 1 + T) and whether the sampler adds noise; None if it is not linear.

        `samples` are T + 1 tensors (C, ...): what was given to the model at each call, and the result.
        """
        played = torch.stack([s.double() for s in samples])
        constant = played[:, -2]
        noisy = bool((played[:, -1] - constant).any())
        played = played - constant.unsqueeze(1)
        found = played[:, : 1 + self.outputs, 0, 0, 0]
        mixed = played[:, 1 + self.outputs]
        left = torch.einsum("ji,ixyz->jxyz", found, self.mixture) - mixed
        if not played.isfinite().all() or not small(left.flatten(1), mixed.flatten(1)):
            return None
        return found.numpy(), noisy


class ReplacedNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every operation that draws random numbers gives zeros, and ones in the last of `channels` entries of the
    first dimension. No random generator is read or changed.

    Raises:
        NotImplementedError: for a random operation whose result cannot be replaced.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.channels = channels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name.endswith("_") and isinstance(args[0], Tensor):
            return self._fill(args[0])
        if name.endswith("_like"):
            return self._fill(torch.empty_like(*args, **_layout(kwargs)))
        size = next((a for a in args if isinstance(a, (list, tuple))), None)
        if size is None:
            raise NotImplementedError(f"random numbers of {name} cannot be replaced")
        whole_numbers = {"dtype": torch.int64} if name.startswith("rand") and name not in ("rand", "randn") else {}
        return self._fill(torch.empty(size, **{**whole_numbers, **_layout(kwargs)}))

    def _fill(self, noise: Tensor) -> Tensor:
        noise.zero_()
        if noise.dim() and noise.shape[0] == self.channels:
            noise[-1] = 1
        return noise


def _layout(options: dict[str, Any]) -> dict[str, Any]:
    return {n: options[n] for n in ("dtype", "device") if options.get(n) is not None}


def small(left: Tensor, of: Tensor) -> bool:
    """Return whether each row of `left` (n, m) is small compared with the same row of `of`."""
    return bool((left.norm(dim=1) <= TOLERANCE * of.norm(dim=1)).all())


def transitions_of(
    response: Array, noisy: bool, signals: Sequence[float], sizes: Sequence[float]
) -> tuple[Transition, ...]:
    """Return the steps of a sampler with the response `W` (T + 1, 1 + T), placed on its path; none if it remembers too
    much.

    Args:
        response: what the first sample and each output contribute to each sample.
        noisy: whether the sampler adds noise.
        signals, sizes: (T,) `p` and `p + q` of the path `x = p x_0 + q noise` at each call.
    """
    for memory in range(1, MEMORY + 1):
        if found := _with_memory(response, memory):
            placed = _on_path(found, response[:memory, 0].tolist(), signals, sizes)
            return tuple(step._replace(noisy=noisy) for step in placed)
    return ()


def _with_memory(response: Array, memory: int) -> tuple[Transition, ...]:
    """The steps of a sampler with this memory; none if it does not explain the `response`."""
    steps = len(response) - 1
    whole = np.concatenate([response, np.zeros((memory, 1 + steps))])  # nothing comes after the end
    found = []
    for step in range(steps):
        past = whole[step : step + memory + 1, : 1 + step]  # (p + 1, inputs so far): of this sample and the next ones
        keep = np.linalg.lstsq(past[:-1].T, past[-1], rcond=RANK)[0]
        left = torch.from_numpy(past[-1] - keep @ past[:-1])
        if not small(left[None], torch.from_numpy(past[-1:])):
            return ()
        effect = whole[step + 1 : step + 1 + memory, 1 + step]
        # Rounded, so that equal samplers have equal transitions and their placements are searched once: threads sum in
        # any order.
        found.append(Transition(tuple(keep.round(9).tolist()), tuple(effect.round(9).tolist())))
    return tuple(found)


def _on_path(
    steps: Sequence[Transition], first: Sequence[float], signals: Sequence[float], sizes: Sequence[float]
) -> tuple[Transition, ...]:
    """The steps with their places on the path `x = p x_0 + q noise`, the parts of outputs there, and their Jacobian.

    The outputs are those that lead a sample along its path: `A noise` takes `q` from one step to the next, `B x_0` does
    the same with `p`; a step whose output is inert has the parts of the step before it. The Jacobian, that of their
    sum, is zero where a sampler, as LCM's, leaves the path.

    Args:
        steps: the transitions.
        first: (p,) what one unit of the first sample contributes to the first p samples.
        signals, sizes: `p` and `p + q` at each step.
    """
    ends = [*signals, 1.0], [*(n - p for n, p in zip(sizes, signals, strict=True)), 0.0]
    states = [[k * end[0] for k in first] for end in ends]
    parts, found = (0.0, 0.0), []
    for i, step in enumerate(steps):
        if not step.inert:
            lacking = [end[i + 1] - advance(state, step)[0] for end, state in zip(ends, states, strict=True)]
            parts = round(lacking[1] / step.effect[0], 5), round(lacking[0] / step.effect[0], 5)
        states = [advance(state, step, part) for state, part in zip(states, reversed(parts), strict=True)]
        jacobian = 0.0 if step.inert else sum(parts) / sizes[i]
        kept = jacobian if jacobian * step.effect[0] < 0 else 0.0
        found.append(step._replace(jacobian=round(kept, 5), size=sizes[i], signal=signals[i], parts=parts))
    return tuple(found)
