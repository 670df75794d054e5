"""Which guidance branch of a run a call belongs to."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..denoiser.arguments import version_of

CONDITION_WORDS = ("encoder", "text", "cap", "pooled", "label", "prompt", "image_embeds")
"""Parts of the names of arguments that hold a condition, which tells a branch from the others."""

MAX_BRANCHES = 8
"""Branches of one name and shape that are told apart by their conditions; further ones are told apart by order."""


@dataclass
class _Track:
    """One branch: what its calls share, its name, the last step it was called at, and its conditions."""

    key: object
    name: str
    step: int
    marks: dict[str, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)

    def knows(self, marks: dict[str, Tensor]) -> bool | None:
        """Whether `marks` are the conditions of this branch, as they were when it was last called; None where none of
        its own are left to compare."""
        left = {
            n: (kept, version) for n, (r, version) in self.marks.items() if (kept := r()) is not None and n in marks
        }
        if not left:
            return None
        return all(marks[n] is kept and version_of(kept) == version for n, (kept, version) in left.items())


class Branches:
    """Tells the branches of a run apart: by context and shapes, then by their conditions, then by order in a step.

    Guidance may start or stop in mid-run, so the order of calls alone would mistake one branch for another. A pipeline
    hands over the same condition tensors at every step; where it makes them anew, the order is what is left. Conditions
    that are replaced or overwritten on the way, as callbacks may do, so begin another branch, which has its first step
    in full and what is left of the budget.
    """

    def __init__(self) -> None:
        self._tracks: list[_Track] = []

    def reset(self) -> None:
        """Forget all branches."""
        self._tracks = []

    def name(self, step: int, context: Any, signature: object, arguments: dict[str, Any]) -> str | None:
        """Return the branch of a call: "cond", or "call" where the pipeline sets no context; "call#2" for the next one.

        None if a step has more calls than there can be branches: then the steps are not what they seem.

        Args:
            step: index of the step.
            context: diffusers' `CacheContext`, its name, or None.
            signature: what must be equal in all calls of a branch, such as the shapes of its inputs.
            arguments: the arguments of the call by name.
        """
        base = str(getattr(context, "name", context) or "call")
        marks = _marks(arguments)
        mine = [t for t in self._tracks if t.key == (base, signature)]
        free = [t for t in mine if t.step != step]
        known = [t.knows(marks) for t in free]
        track = next((t for t, k in zip(free, known, strict=True) if k), None)
        if track is None:
            any_will_do = len(mine) >= MAX_BRANCHES
            track = next((t for t, k in zip(free, known, strict=True) if k is None or any_will_do), None)
        if track is None and len(mine) >= MAX_BRANCHES:
            return None
        if track is None:
            same = sum(t.name.partition("#")[0] == base for t in self._tracks)
            track = _Track((base, signature), base + (f"#{same + 1}" if same else ""), step)
            self._tracks.append(track)
        track.step, track.marks = step, {n: (weakref.ref(v), version_of(v)) for n, v in marks.items()}
        return track.name


def _marks(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that hold a call's conditions; of a list with one a row, the first; of a dictionary all."""
    marks: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            marks |= {f"{name}.{key}": found for key, found in _marks(value).items()}
            continue
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, Tensor) and any(word in name for word in CONDITION_WORDS):
            marks[name] = first
    return marks
