"""State discovery and self-test: find the inputs to forecast, and test on a full call that they suffice.

The first full step of a model is followed, once, by a few cheap passes of the same call:

1. pass: every block returns its inputs. The arguments of the verify block that differ from the full pass are the
   *state*; only they are forecast.
2. one row alone, in full: it must give what it gave in its batch, so the rows of the inputs were found correctly. Its
   features show where rows lie in those of the batch, and whether they are *ragged*: fewer tokens alone than in the
   batch. Other state inside blocks now belongs to another call.
3. replay: the same call as a draft fed the exact features must give the full output, checked and unchecked; where rows
   are ragged, the row alone as well.

If a test fails, data bypasses the verify block, and the model runs without forecasts. A call that is not finite, or for
which memory did not suffice, tells nothing of others: its finding holds for this call alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..denoiser.outputs import take, tensors
from ..denoiser.partial import close, finite
from ..denoiser.rows import select
from ..errors import UnsupportedModelError
from . import layouts
from .gate import Features, Gate, Learnt, Mode
from .rows import weights

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Discovery:
    """Result of the self-test. FLOPs are per row, counted by PyTorch; None where it cannot count."""

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
    ragged: bool = False
    lasting: bool = True  # whether it holds for other calls of its kind
    learnt: Learnt | None = field(default=None, repr=False, compare=False)  # for the gate, at later calls of this kind

    @property
    def depth(self) -> int:
        """Return the number of gated blocks that a full step runs."""
        return sum(n for _, n in self.blocks)


def discover(gate: Gate, forward: Forward, arguments: dict[str, Any], rows: int) -> tuple[Any, Discovery]:
    """Run one call in full, find the state, and test drafts on it.

    Returns the full output (to be handed to the caller) and the finding. The features of the call are in
    `gate.features`, ready to be recorded, if the model is supported.
    """
    fresh = _Fresh(arguments, rows)
    gate.called, gate.verify, gate.state, gate.learnt, gate.mode = [], None, (), None, Mode.TRACE
    whole = hasattr(forward, "_torchdynamo_orig_callable")  # do not compile the tracing pass
    with torch.compiler.set_stance("force_eager") if whole else nullcontext():
        out = forward(**fresh())
    if gate.verify is None:
        return out, Discovery(False, _no_blocks(gate))
    try:
        finding = _examine(gate, forward, fresh, out)
    except UnsupportedModelError as problem:
        finding = Discovery(False, str(problem))
        if not finite(out):
            finding = Discovery(False, "an output that is not finite, which tells nothing of the model", lasting=False)
    except torch.OutOfMemoryError as problem:
        finding = Discovery(False, f"memory did not suffice for the self-test: {problem}", lasting=False)
    except Exception as problem:  # models raise errors of any type if blocks are skipped: run without forecasts
        finding = Discovery(False, f"a skipped pass raised {type(problem).__name__}: {problem}")
    if whole or not finding.supported:
        # The probe may have left side effects of other calls behind, or rounded as eager code; the true call decides.
        gate.mode = Mode.OFF
        out = forward(**fresh())
    return out, finding


class _Fresh:
    """Return new arguments for a pass: the same tensors in copied containers."""

    def __init__(self, arguments: dict[str, Any], rows: int) -> None:
        self.rows = rows
        self.arguments = {n: v.clone() if isinstance(v, Tensor) else v for n, v in arguments.items()}

    def __call__(self, rows: Sequence[int] | None = None) -> dict[str, Any]:
        return select(self.arguments, range(self.rows) if rows is None else rows, self.rows)

    def other(self) -> tuple[dict[str, Any], int | None]:
        """Return a different call of one row, and the index of the row: the row that uses the least of its inputs (the
        last, if equal); with a single row, the scaled input and no index."""
        if self.rows > 1:
            used = weights(self.arguments, self.rows)
            row = min(reversed(range(self.rows)), key=used.__getitem__)
            return self([row]), row
        return scaled(self()), None


def scaled(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return another call: the first floating-point argument is multiplied by 0.9."""
    name, value = next((n, v) for n, v in arguments.items() if _is_floating(v))
    return {**arguments, name: value * 0.9 if isinstance(value, Tensor) else [v * 0.9 for v in value]}


def _examine(gate: Gate, forward: Forward, fresh: _Fresh, out: Any) -> Discovery:
    verify, reference = gate.verify, gate.features
    assert verify is not None and verify.slots is not None and reference is not None
    given = gate.bound
    flops: dict[str, float] = {}
    compiled = _is_compiled(gate.model, forward)

    gate.mode = Mode.PASS
    flops["checked"] = _counted(lambda: forward(**fresh()), compiled)[1] / fresh.rows
    gate.state = _state(given, gate.bound)
    features = Features([given[name] for name in gate.state], reference.outputs)

    gate.mode = Mode.FULL
    single, row = fresh.other()
    alone, flops["full"] = _counted(lambda: forward(**single), compiled)
    assert gate.features is not None
    learnt = _learn(gate, features, gate.features, fresh.rows)
    if row is not None and not close(tensors(alone), take(out, row, fresh.rows)):
        raise UnsupportedModelError(f"row {row} computed alone differs from the same row in its batch.")
    if learnt.ragged and row is not None:
        gate.mode, gate.forecast = Mode.CHECKED, _row_of(features, learnt, row, fresh.rows)
        _demand(forward(**fresh([row])), alone, verify.name, "row by row")

    for mode in (Mode.CHECKED, Mode.UNCHECKED):
        gate.mode, gate.forecast = mode, features
        replay, count = _counted(lambda: forward(**fresh()), compiled)
        flops[mode.value] = count / fresh.rows
        _demand(replay, out, verify.name, mode.value)
    gate.features, gate.forecast = features, None
    main = [name for name in verify.slots.names if name is not None]
    return Discovery(
        supported=True,
        reason="",
        verify_block=verify.name,
        blocks=tuple((n, sum(s.name.rpartition(".")[0] == n for s in gate.called)) for n in _names(gate)),
        state=gate.state,
        main=main.index(gate.state[0]) if gate.state[0] in main else 0,
        self_test="passed: a replayed full step equals the full step",
        flops_full=flops["full"] or None,
        flops_checked=flops["checked"] or None,
        flops_unchecked=flops["unchecked"] or None,
        ragged=learnt.ragged,
        learnt=learnt,
    )


def _state(full: dict[str, Any], passed: dict[str, Any]) -> tuple[str, ...]:
    """Return the arguments of the verify block that differ between a full pass and one that skips earlier blocks."""
    state = tuple(name for name, value in full.items() if _differs(value, passed[name]))
    if not state:
        raise UnsupportedModelError("the verify block's inputs do not depend on the blocks before it.")
    loose = [name for name in state if not isinstance(full[name], Tensor)]
    if loose:
        raise UnsupportedModelError(f"the verify block carries state in arguments that are no tensors: {loose}.")
    return state


def _learn(gate: Gate, batch: Features, alone: Features, rows: int) -> Learnt:
    """Return the layouts of the features, from those of a batch and those of one of its rows."""
    pairs = list(zip([*batch.state, *batch.outputs], [*alone.state, *alone.outputs], strict=True))
    kinds = [layouts.layout(b, rows, a) for b, a in pairs]
    shapes = [
        (layouts.rows_first(b, rows, kind).shape[1:], layouts.rows_first(a, 1, kind).shape[1:])
        for (b, a), kind in zip(pairs, kinds, strict=True)
    ]
    return gate.learn(kinds, ragged=any(b != a for b, a in shapes))


def _row_of(features: Features, learnt: Learnt, row: int, rows: int) -> Features:
    """Return the features of one row of a batch."""
    cut = [
        layouts.as_given(layouts.rows_first(f, rows, kind)[row : row + 1], kind)
        for f, kind in zip([*features.state, *features.outputs], learnt.layouts, strict=True)
    ]
    return Features(cut[: len(features.state)], cut[len(features.state) :])


def _demand(replay: Any, full: Any, verify: str, how: str) -> None:
    if not close(tensors(replay), tensors(full)):
        raise UnsupportedModelError(
            f"replaying a full step as a draft ({how}) does not give its output: the model carries something past "
            f"{verify} that skipped blocks would have made."
        )


def _names(gate: Gate) -> list[str]:
    return list(dict.fromkeys(s.name.rpartition(".")[0] for s in gate.called))


def _no_blocks(gate: Gate) -> str:
    if not gate.lists:
        return f"{type(gate.model).__name__} has no list of blocks"
    return f"no block of {', '.join(gate.lists)} returns what it was given in the same shape"


def _counted(run: Callable[[], Any], compiled: bool) -> tuple[Any, float]:
    """Return the result of `run` and its FLOPs, 0 if they cannot be counted (flex attention).

    Operations of compiled code cannot be counted. FLOPs are therefore counted in eager mode, and a `compiled` model
    runs once more for its result, as eager code rounds differently.
    """
    try:
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            out = run()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an error of the model is raised again below
        return run(), 0.0
    return run() if compiled else out, float(counter.get_total_flops())


def _is_compiled(model: nn.Module, forward: Forward) -> bool:
    return hasattr(forward, "_torchdynamo_orig_callable") or any(
        getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in model.modules()
    )


def _differs(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return not (isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, (list, tuple)):
        return len(a) != len(b) or any(_differs(x, y) for x, y in zip(a, b, strict=True))
    return False


def _is_floating(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, Tensor) and v.is_floating_point() for v in value)
    return isinstance(value, Tensor) and value.is_floating_point()
