"""Scores beyond PSNR: agreement with the requested class or prompt, and distances between sets of samples."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..reports.measure import example_call, makes_clips, moving_prompt
from .pareto import SPEEDS

NEAR = math.log(1.15)
"""Features (0.1 s per picture) are computed only for settings within 15 % of a speed of the tables, in log speed."""

GROUPS = (
    "smileys & emotion", "people & body", "animals & nature", "food & drink",
    "travel & places", "activities", "objects", "symbols",
)  # fmt: skip
"""Classes of the classifier of the bundled emoji models, in order of its outputs."""

PROMPTS: tuple[tuple[str, str], ...] = (
    ("grinning face", GROUPS[0]), ("waving hand", GROUPS[1]), ("cat face", GROUPS[2]), ("red apple", GROUPS[3]),
    ("automobile", GROUPS[4]), ("soccer ball", GROUPS[5]), ("key", GROUPS[6]), ("no entry", GROUPS[7]),
    ("crying face", GROUPS[0]), ("thumbs up", GROUPS[1]), ("dog face", GROUPS[2]), ("pizza", GROUPS[3]),
    ("airplane", GROUPS[4]), ("trophy", GROUPS[5]), ("light bulb", GROUPS[6]), ("check mark button", GROUPS[7]),
    ("red heart", GROUPS[0]), ("woman", GROUPS[1]), ("penguin", GROUPS[2]), ("banana", GROUPS[3]),
    ("sailboat", GROUPS[4]), ("basketball", GROUPS[5]), ("open book", GROUPS[6]), ("recycling symbol", GROUPS[7]),
)  # fmt: skip
"""Prompts of the emoji models, with their group in Unicode CLDR."""


def arguments(pipe: Any, seeds: Sequence[int], steps: int, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of a call with one class or prompt per seed, a function of the seed alone.

    `sizes` are further arguments, see `speca.zoo.call_arguments`.
    """
    call = example_call(pipe, seeds)
    if "prompt" in call:
        moving = makes_clips(pipe) or "num_frames" in (sizes or {})
        call = {"prompt": [moving_prompt(seed) if moving else _prompt(seed) for seed in seeds]}
    return {**call, **(sizes or {}), "num_inference_steps": steps}


def _prompt(seed: int) -> str:
    return f"a {PROMPTS[seed % len(PROMPTS)][0]}"


class Judge:
    """Scores the samples of a bundled model; for other models, `notes` says why there are no scores."""

    def __init__(self, model: str, pipe: Any, seeds: Sequence[int], features: bool) -> None:
        from ..zoo import load_classifier, load_reference

        self.notes: list[str] = []
        self._classifier: Any = None
        self._real: Tensor | None = None
        self._full: tuple[Tensor, Tensor] | None = None
        self.features = features
        try:
            self._classifier = load_classifier(model)
        except InputError as problem:
            self.notes.append(f"no agreement: {problem}")
        if features:
            try:
                self._real = load_reference(model)
            except InputError as problem:
                self.notes.append(f"no distance to real pictures: {problem}")
        self.asked = _asked(pipe, seeds)

    def of_full(self, images: Tensor) -> dict[str, Any]:
        """Set the samples of the full run as reference, and return their scores."""
        kinds = self._kinds(images)
        taken = torch.empty(0)
        try:
            taken = self._taken(images) if self.features else taken
        except InputError as problem:
            self.notes.append(f"no distances: {problem}")
            self.features = False
        self._full = (kinds, taken)
        return {**self._agreement(kinds), **self._distances(taken)}

    def of(self, images: Tensor, speed: float) -> dict[str, Any]:
        """Return the agreement and, near the speeds of the tables, the distances of the samples."""
        near = self.features and any(abs(math.log(speed / s)) < NEAR for s in SPEEDS)
        return {**self._agreement(self._kinds(images)), **(self._distances(self._taken(images)) if near else {})}

    def _kinds(self, images: Tensor) -> Tensor:
        if self._classifier is None:
            return torch.empty(0)
        with torch.no_grad():
            return torch.as_tensor(self._classifier(stills(images) * 2 - 1).argmax(1))

    def _agreement(self, kinds: Tensor) -> dict[str, Any]:
        """Return the share of samples classified as requested, and the share classified as their own full run."""
        if not len(kinds) or self._full is None:
            return {}
        out = {"same_class": (kinds == self._full[0]).double().mean().item()}
        if self.asked is not None:
            out["agreement"] = (kinds == torch.tensor(self.asked)).double().mean().item()
        return out

    def _taken(self, images: Tensor) -> Tensor:
        from ..reports.distances import features

        with contextlib.redirect_stdout(io.StringIO()):  # its package prints that it has loaded
            return features(stills(images))

    def _distances(self, taken: Tensor) -> dict[str, Any]:
        """Return KID to real pictures and to full runs, and the feature distance of each sample to its own full run."""
        if not len(taken) or self._full is None:
            return {}
        from ..reports.distances import kid

        full, out = self._full[1], {}
        size = min(50, len(taken))
        if self._real is not None:
            out["kid_real"] = round(kid(self._real, taken, size=size)[0], 5)
        out["kid_full"] = round(kid(full, taken, size=size)[0], 5)
        one, other = (torch.nn.functional.normalize(f, dim=1) for f in (full, taken))
        return {**out, "feature_distance": [round(v, 5) for v in (one - other).norm(dim=1).tolist()]}


def stills(samples: Tensor) -> Tensor:
    """Return pictures (N, C, H, W) of samples (N, H, W, C), or the middle frames of videos (N, frames, H, W, C)."""
    return (samples[:, samples.shape[1] // 2] if samples.ndim == 5 else samples).movedim(-1, 1)


def _asked(pipe: Any, seeds: Sequence[int]) -> list[int] | None:
    call = arguments(pipe, seeds, 1)
    if "class_labels" in call:
        return [int(label) for label in call["class_labels"]]
    return [GROUPS.index(PROMPTS[seed % len(PROMPTS)][1]) for seed in seeds]
