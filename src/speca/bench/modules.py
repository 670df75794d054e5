"""Forecast every attention and MLP module separately, as the authors' code does, on DiT, FLUX and HunyuanVideo models.

For comparison only: TaylorSeer (arXiv:2503.06923) at even intervals, and SpeCa as its authors released it, with one
check for the whole batch that takes effect one step later. `speca` keeps two tensors; this keeps `order + 1` for every
module. The forward methods of the modules are wrapped and restored on exit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import VerifiedConfig
from ..core.controller import ACCEPTED, FULL, Plan, Record
from ..errors import InputError
from ..verified.errors import elementwise_l1
from ..verified.rules import Rule, rule
from .setup import Apply, Call, Setup, transformer_of

FORECAST, SILENT = "forecast", "silent"
LAYOUTS: dict[str, dict[str, dict[str, str]]] = {
    "DiTTransformer2DModel": {"transformer_blocks": {"attn1": FORECAST, "ff": FORECAST}},
    "FluxTransformer2DModel": {
        "transformer_blocks": {"attn": FORECAST, "ff": FORECAST, "ff_context": FORECAST},
        "single_transformer_blocks": {"attn": SILENT, "proj_mlp": SILENT, "act_mlp": SILENT, "proj_out": FORECAST},
    },
}
"""Modules of each block that are forecast, and modules skipped in a draft, as in the authors' released code."""
LAYOUTS["HunyuanVideoTransformer3DModel"] = LAYOUTS["FluxTransformer2DModel"]
ORDERS = {"DiTTransformer2DModel": 4, "FluxTransformer2DModel": 2, "HunyuanVideoTransformer3DModel": 1}
"""Order of the forecast that the authors use for each model."""


class Differences:
    """The newest full output of one module, its finite differences, and the Taylor forecast from them."""

    def __init__(self, order: int) -> None:
        self.order, self.step = order, -1
        self.terms: list[Tensor] = []

    def push(self, value: Tensor, step: int) -> None:
        """`d_0 = F, d_{i+1} = (d_i - old d_i) / gap`: as in the released code, only the newest gap is used."""
        terms, gap = [value], step - self.step
        for old in self.terms[: self.order]:
            terms.append((terms[-1] - old) / gap)
        self.terms, self.step = terms, step

    def at(self, step: int) -> Tensor:
        ahead = step - self.step
        total: Tensor = self.terms[0]
        for i, term in enumerate(self.terms[1:], 1):
            total = total + term * (ahead**i / math.factorial(i))
        return total

    def bytes(self) -> int:
        return sum(term.numel() * term.element_size() for term in self.terms)


class ModuleCache:
    """All wrapped modules of one transformer, and the mode of the current step."""

    def __init__(self, model: nn.Module, order: int, judge: Rule) -> None:
        self.judge, self.order = judge, order
        self.differences: dict[str, list[Differences]] = {}
        self.shapes: dict[str, list[torch.Size]] = {}
        self.step, self.total, self.drafting = 0, 1, False
        self.record = Record(0, ())
        self.held = 0
        layout = LAYOUTS.get(type(model).__name__)
        if layout is None:
            raise InputError(
                f"no table of the modules of {type(model).__name__}; there is one for {', '.join(LAYOUTS)}."
            )
        self.parts = [
            (f"{stack}.{index}.{name}", block.get_submodule(name), kind)
            for stack, names in layout.items()
            for index, block in enumerate(getattr(model, stack))
            for name, kind in names.items()
        ]
        self.last = getattr(model, list(layout)[-1])[-1]
        self.last_out = next((n for n, m, _ in self.parts if m is getattr(self.last, "proj_out", None)), "")

    def begin(self, total: int) -> None:
        """Begin a run of `total` steps."""
        self.differences, self.shapes, self.step, self.total = {}, {}, 0, total
        self.record = Record(0, (), total=total)

    def forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the wrapped forward of the transformer; each call is one step."""

        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.record.step = self.step
            self.plan = self.judge.plan(self.record)
            self.drafting, self.error = self.plan is not Plan.FULL, None
            out = original(*args, **kwargs)
            self.record.note(ACCEPTED if self.drafting else FULL, self.error)
            self.drafting = False
            self.held = max(self.held, sum(d.bytes() for parts in self.differences.values() for d in parts))
            self.step += 1
            return out

        return run

    def wrap(self, name: str, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the wrapped forward of a module: computed and kept in full steps, forecast or skipped in drafts."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.drafting:
                out = original(*args, **kwargs)
                parts = list(out) if isinstance(out, tuple) else [out]
                if kind == FORECAST:
                    kept = self.differences.setdefault(name, [Differences(self.order) for _ in parts])
                    for differences, part in zip(kept, parts, strict=True):
                        differences.push(part, self.step)
                else:
                    self.shapes[name] = [part.shape for part in parts]
                return out
            if kind == FORECAST:
                parts = [differences.at(self.step) for differences in self.differences[name]]
            else:  # only the forecast module uses this output
                like = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
                parts = [like.new_zeros(()).expand(shape) for shape in self.shapes[name]]
            return tuple(parts) if len(parts) > 1 else parts[0]

        return run

    def verify(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return the wrapped forward of the last block: a checked draft also computes it and keeps only the error."""

        def run(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            if self.drafting and self.plan is Plan.CHECKED:
                kept = {name: [(d.terms, d.step) for d in parts] for name, parts in self.differences.items()}
                self.drafting = False
                real = original(*args, **kwargs)
                given = self.differences[self.last_out][0].terms[0] if self.last_out else None
                self.drafting = True
                for name, known in kept.items():
                    for part, (terms, step) in zip(self.differences[name], known, strict=True):
                        part.terms, part.step = terms, step
                if given is None:  # DiT compares the hidden states, FLUX and HunyuanVideo the branch before its gate
                    forecast, given = out, real
                else:
                    forecast = self.differences[self.last_out][0].at(self.step)
                self.error = float(elementwise_l1(forecast.flatten()[None], given.flatten()[None]))
            return out

        return run

    error: float | None = None
    plan: Plan = Plan.FULL


def per_module(settings: Callable[[Any], VerifiedConfig], order: int | None = None) -> Apply:
    """Run module-wise forecasts under the rule of `settings(value)`; `order` None uses the authors' order."""

    @contextmanager
    def apply(pipe: Any, call: Call, value: Any) -> Iterator[Setup]:
        model = transformer_of(pipe)
        given = ORDERS.get(type(model).__name__, 1) if order is None else order
        cache = ModuleCache(model, given, rule(settings(value)))
        wrapped: list[tuple[nn.Module, Callable[..., Any]]] = [
            (part, cache.wrap(name, kind, part.forward)) for name, part, kind in cache.parts
        ]
        wrapped += [(cache.last, cache.verify(cache.last.forward)), (model, cache.forward(model.forward))]
        before: list[tuple[nn.Module, Any]] = [(part, part.__dict__.get("forward")) for part, _ in wrapped]
        for part, forward in wrapped:
            part.__dict__["forward"] = forward
        try:
            yield Setup(pipe, call, begin=lambda _: cache.begin(call["num_inference_steps"]), bytes=lambda: cache.held)
        finally:
            for part, own in before:
                if own is None:
                    del part.__dict__["forward"]
                else:
                    part.__dict__["forward"] = own

    return apply
