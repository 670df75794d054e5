"""Recording the outputs of one run, for the second moments from which a prior is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.prior import Array

STEPS = 256
"""Most steps whose outputs are looked at; of longer runs these are spread evenly."""

LEAST = 8
"""Fewest steps of a run that is learnt from; moments of fewer steps cannot be interpolated to other schedules."""

ELEMENTS, IN_ALL = 16_384, 65_536
"""Most elements that are looked at, of one row and of all rows of a call: the same ones at every step."""


class Recorder:
    """Gathers outputs of a run of T steps, some elements of each, on the device where they are."""

    def __init__(self, total: int, guided: bool = True) -> None:
        """`total` is the number of steps T; `guided` says whether outputs that guidance has made are taken."""
        self.total, self._takes_guided = total, guided
        count = min(total, STEPS)
        self.steps = sorted({round(k * (total - 1) / max(1, count - 1)) for k in range(count)})
        self.elements = 0  # of an output of the first step
        self.guided = False
        self._kept: dict[int, list[Tensor]] = {step: [] for step in self.steps}

    def add(self, step: int, output: Tensor, guided: bool = False) -> None:
        """Keep what is needed of the output (B, ...) of a call at `step`; the calls of a step come in the same order
        at every step. Once an output is `guided`, made of those of all branches, only such ones count."""
        if guided and not self._takes_guided:
            return
        if guided and not self.guided:
            self._kept, self.guided = {s: [] for s in self.steps}, True
        if step in self._kept and guided == self.guided:
            flat = output.detach().flatten(1)
            self.elements = self.elements or flat.shape[1]
            count = min(flat.shape[1], ELEMENTS, max(1, IN_ALL // flat.shape[0]))
            if count < flat.shape[1]:
                flat = flat[:, torch.linspace(0, flat.shape[1] - 1, count, device=flat.device).long()]
            self._kept[step].append(flat.float().clone() if flat.dtype is torch.float32 else flat.float())

    def restrict(self, steps: Sequence[int]) -> None:
        """Look at some steps only, the first among them."""
        self.steps = sorted(steps)
        self._kept = {step: self._kept.get(step, []) for step in self.steps}

    @property
    def complete(self) -> bool:
        """Whether the last step has had as many calls as the first."""
        return len(self._kept[self.steps[-1]]) == len(self._kept[self.steps[0]]) > 0

    def moments(self) -> Array | None:
        """Return the second moments (S, S): for each pair of `steps`, the product of their outputs, averaged over
        elements, rows and calls.

        None if steps differ in their calls, as where guidance ends on the way, or if outputs are not finite.
        """
        by_step = [self._kept[step] for step in self.steps]
        if len({tuple(out.shape for out in calls) for calls in by_step}) != 1 or not by_step[0]:
            return None
        found = torch.zeros(len(self.steps), len(self.steps), dtype=torch.float64)
        for call in zip(*by_step, strict=True):
            outputs = torch.stack([out.cpu().double() for out in call], 1)  # (B, S, n)
            found += torch.einsum("bid,bjd->ij", outputs, outputs) / (outputs.shape[0] * outputs.shape[2])
        found = (found + found.T) / (2 * len(by_step[0]))
        valid = bool(found.isfinite().all()) and bool((found.diagonal() > 0).all())
        return found.numpy() if valid else None
