"""State discovery and self-test: what must be forecast, and proof on a real call that nothing else is needed.

The first full step of a model is followed, once, by a few cheap passes of the same call:

1. pass: every block hands its inputs through, and the verify block shows which of its arguments change. These are the
   *state* that skipped blocks carry, and only they are forecast.
2. one row alone, in full: the rows of the inputs were found correctly, and whatever the blocks keep on the side now
   belongs to another call.
3. replay: the same call as a draft fed the exact features must give the full output, checked and unchecked.

Anything else means a hidden path around the verify block, and the model is then run plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UnsupportedModelError
from . import rows as rowwise
from .gate import Features, Gate, Mode

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Discovery:
    """What the probe found. FLOPs are per row, counted by PyTorch; None where it cannot count."""

    supported: bool
    reason: str
    verify_block: str = ""
    blocks: tuple[tuple[str, int], ...] = ()
    state: tuple[str, ...] = ()
    main: int = 0  # index, among the verify block's output tensors, of the one that is compared
    self_test: str = "not run"
    flops_full: float | None = None
    flops_checked: float | None = None
    flops_unchecked: float | None = None

    @property
    def depth(self) -> int:
        """Number of gated blocks a full step runs."""
        return sum(n for _, n in self.blocks)


def discover(gate: Gate, forward: Forward, arguments: dict[str, Any], rows: int) -> tuple[Any, Discovery]:
    """Run one call in full, learn from it, and test the draft path on it.

    Returns the full output (to be handed to the caller) and the finding. The features of the call are in
    `gate.features`, ready to be recorded, if the model is supported.
    """
    fresh = _Fresh(arguments, rows)
    gate.called, gate.verify, gate.state, gate.mode = [], None, (), Mode.TRACE
    out = forward(**fresh())
    if gate.verify is None:
        return out, Discovery(False, _no_blocks(gate))
    try:
        finding = _examine(gate, forward, fresh, out)
    except Exception as problem:  # whatever a foreign model raises when it is skipped: run it plainly
        finding = Discovery(False, f"a skipped pass raised {type(problem).__name__}: {problem}")
    if not finding.supported:
        # The probe may have left side effects of other calls behind; the true call restores them.
        gate.mode = Mode.OFF
        out = forward(**fresh())
    return out, finding


class _Fresh:
    """Arguments anew for every pass: tensors as they were, containers copied."""

    def __init__(self, arguments: dict[str, Any], rows: int) -> None:
        self.rows = rows
        self.arguments = {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}

    def __call__(self, rows: Sequence[int] | None = None) -> dict[str, Any]:
        return rowwise.select(self.arguments, range(self.rows) if rows is None else rows, self.rows)

    def other(self) -> dict[str, Any]:
        """A different call of one row: row 0 alone, or with one row the same input scaled."""
        if self.rows > 1:
            return self([0])
        name, value = next(iter(self.arguments.items()))
        scaled = value * 0.9 if isinstance(value, Tensor) else [v * 0.9 for v in value]
        return {**self(), name: scaled}


def _examine(gate: Gate, forward: Forward, fresh: _Fresh, out: Any) -> Discovery:
    verify, reference = gate.verify, gate.features
    assert verify is not None and verify.slots is not None and reference is not None
    given = gate.bound
    flops: dict[str, float] = {}

    gate.mode = Mode.PASS
    flops["checked"] = _counted(lambda: forward(**fresh()))[1] / fresh.rows
    state = tuple(name for name, value in given.items() if _differs(value, gate.bound[name]))
    if not state:
        raise UnsupportedModelError("the verify block's inputs do not depend on the blocks before it.")
    loose = [name for name in state if not isinstance(given[name], Tensor)]
    if loose:
        raise UnsupportedModelError(f"the verify block carries state in arguments that are no tensors: {loose}.")
    gate.state = state
    features = Features([given[name] for name in state], reference.outputs)

    gate.mode = Mode.FULL
    alone, flops["full"] = _counted(lambda: forward(**fresh.other()))
    if fresh.rows > 1 and not _close(_first(alone, 1)[:1], _first(out, fresh.rows)[:1]):
        raise UnsupportedModelError("a row computed alone differs from the same row in its batch.")

    for mode in (Mode.CHECKED, Mode.UNCHECKED):
        gate.mode, gate.forecast = mode, features
        replay, count = _counted(lambda: forward(**fresh()))
        flops[mode.value] = count / fresh.rows
        if not _close(_first(replay, fresh.rows), _first(out, fresh.rows)):
            raise UnsupportedModelError(
                f"replaying a full step as a draft ({mode.value}) does not give its output: the model carries "
                f"something past {verify.name} that skipped blocks would have made."
            )
    gate.features, gate.forecast = features, None
    main = [name for name in verify.slots.names if name is not None]
    return Discovery(
        supported=True,
        reason="",
        verify_block=verify.name,
        blocks=tuple((n, sum(s.name.rpartition(".")[0] == n for s in gate.called)) for n in _names(gate)),
        state=state,
        main=main.index(state[0]) if state[0] in main else 0,
        self_test="passed: a replayed full step equals the full step",
        flops_full=flops["full"] or None,
        flops_checked=flops["checked"] or None,
        flops_unchecked=flops["unchecked"] or None,
    )


def _names(gate: Gate) -> list[str]:
    return list(dict.fromkeys(s.name.rpartition(".")[0] for s in gate.called))


def _no_blocks(gate: Gate) -> str:
    if not gate.lists:
        return f"{type(gate.model).__name__} has no list of blocks"
    return f"no block of {', '.join(gate.lists)} returns what it was given in the same shape"


def _counted(run: Callable[[], Any]) -> tuple[Any, float]:
    with FlopCounterMode(display=False) as counter:
        out = run()
    return out, float(counter.get_total_flops())


def _differs(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return not (isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, (list, tuple)):
        return len(a) != len(b) or any(_differs(x, y) for x, y in zip(a, b, strict=True))
    return False


def _first(out: Any, rows: int) -> Tensor:
    """The first tensor of a model output, rows first; lists with one item per row are stacked."""
    value = next(iter(out.values())) if isinstance(out, dict) else out[0] if isinstance(out, (tuple, list)) else out
    if isinstance(value, (list, tuple)):
        return torch.stack(list(value))
    return torch.as_tensor(value)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal within rounding, as a ratio of norms: another batch size may choose another kernel."""
    tolerance = max(1e-4, 4 * torch.finfo(a.dtype).eps)
    a, b = a.float(), b.float()
    return bool((a - b).norm() <= tolerance * b.norm())
