"""Calls of text encoders and autoencoders, put together in batches as those of the denoising model are.

A request's copy of the pipeline has shallow copies of these modules, of the same class and with the same weights, whose
entries ask the engine. The modules themselves are left as they are. Whether the rows of a
batch are independent is tested: the first time two calls meet, they are run together and each alone, and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import rows as rowwise
from ..denoiser.outputs import tensors
from ..denoiser.partial import close, finite
from .activations import Peak
from .bounded import Bounded
from .rendezvous import Chance
from .signature import Tokens, signature

ENTRIES = ("forward", "encode", "decode")
"""What pipelines call of a component; whatever else they call runs in place."""


class Yourself:
    """The answer that tells a request to run a call itself, as it draws from the global random generators."""


@dataclass(frozen=True)
class Call:
    """A call of a component other than the denoising model.

    Attributes:
        module, entry: what is called, and by what name.
        arguments: by name, those without one by their place: "0", "1", ...
        rows: the first dimension of its first tensor; 0 where it has none.
    """

    module: nn.Module
    entry: str
    arguments: dict[str, Any]
    rows: int

    @classmethod
    def of(cls, module: nn.Module, entry: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """Return the call for the arguments that a component was given."""
        arguments = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        first = next((v for v in arguments.values() if isinstance(v, Tensor) and v.dim()), None)
        return cls(module, entry, arguments, 0 if first is None else int(first.shape[0]))

    def run(self, arguments: dict[str, Any] | None = None) -> Any:
        """The component's own output, for its own arguments or for others of the same form."""
        given = dict(self.arguments if arguments is None else arguments)
        places = [given.pop(str(place)) for place in range(len(given)) if str(place) in given]
        return getattr(self.module, self.entry)(*places, **given)


@dataclass
class Components:
    """Which calls may be one, and how they are run as one.

    Attributes:
        devices: kinds of devices in use, whose random generators are watched.
        drawing: components that draw from the global random generators, by identity and entry.
        weighing: whether the bytes that a row takes while it runs are measured.
        most: the most bytes measured so far, 0 before.
    """

    tokens: Tokens
    devices: tuple[str, ...] = ("cpu",)
    drawing: set[tuple[int, str]] = field(default_factory=set)
    weighing: bool = False
    most: int = 0
    _weighed: Bounded[Hashable, bool] = field(default_factory=Bounded)
    _together: Bounded[Hashable, bool] = field(default_factory=Bounded)  # of each bucket that was tested

    def bucket(self, call: Call) -> Hashable | None:
        """Return a name that is equal for calls that can be one; None for one that has to run alone."""
        if not call.rows:
            return None
        name = id(call.module), call.entry, signature(call.arguments, call.rows, self.tokens)
        return name if self._together.get(name, True) else None

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """Return what each of the calls of one bucket gives, and `Yourself` for one that must not be run here."""
        before, drew = Chance.here(self.devices), False
        try:
            outs = self._run_weighed(calls) if self.weighing else self._run(calls)
        finally:
            if drew := Chance.here(self.devices) != before:
                before.restore()
                self.drawing.add((id(calls[0].module), calls[0].entry))
        return [Yourself] * len(calls) if drew else outs

    def _run_weighed(self, calls: Sequence[Call]) -> list[Any]:
        """Run them, and measure once what a module takes for inputs of these shapes."""
        first = calls[0]
        shapes = tuple(v.shape[1:] for v in first.arguments.values() if isinstance(v, Tensor))
        if (what := (id(first.module), first.entry, shapes)) in self._weighed:
            return self._run(calls)
        with Peak() as peak:
            outs = [call.run() for call in calls]
        self._weighed[what] = True
        self.most = max(self.most, peak.most // max(call.rows or 1 for call in calls))
        return outs

    def _run(self, calls: Sequence[Call]) -> list[Any]:
        bucket = self.bucket(calls[0])
        if len(calls) == 1 or bucket is None:
            return [call.run() for call in calls]
        if bucket in self._together:
            return self._joined(calls)
        alone = [call.run() for call in calls]
        if (found := self._agree(calls, alone)) is not None:
            self._together[bucket] = found
        return alone

    def _agree(self, calls: Sequence[Call], alone: Sequence[Any]) -> bool | None:
        """Whether calls give together what they give `alone`; None where that does not tell, as with NaN in it or where
        memory did not suffice."""
        if not all(_only_tensors(out) for out in alone):
            return False
        if not all(finite(out) for out in alone):
            return None
        try:
            joined = self._joined(calls)
        except torch.OutOfMemoryError:
            return None
        except Exception:  # of a component that cannot take them together: then it need not
            return False
        return all(close(tensors(one), tensors(other)) for one, other in zip(joined, alone, strict=True))

    def _joined(self, calls: Sequence[Call]) -> list[Any]:
        counts = [call.rows for call in calls]
        return rowwise.split(calls[0].run(rowwise.join([call.arguments for call in calls], counts)), counts)


def adopt(pipe: Any, components: Components, ask: Callable[[Call], Any], leave: Sequence[nn.Module]) -> None:
    """Make the components of a request's copy of a pipeline `ask` for their results, except those to `leave`."""
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module) and not any(module is other for other in leave):
            setattr(pipe, name, _asking(module, components, ask))


def _asking(module: nn.Module, components: Components, ask: Callable[[Call], Any]) -> nn.Module:
    mine, home = copy.copy(module), _home(module)
    for entry in ENTRIES:
        if callable(getattr(module, entry, None)):
            mine.__dict__[entry] = _entry(module, entry, home, components, ask)
    return mine


def _entry(
    module: nn.Module, entry: str, home: object, components: Components, ask: Callable[[Call], Any]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        call = Call.of(module, entry, args, kwargs)
        # A pipeline that casts or moves a component for one call and then back must not be left in between.
        if (id(module), entry) in components.drawing or _home(module) != home:
            return call.run()
        answer = ask(call)
        return call.run() if answer is Yourself else answer

    return run


def _home(module: nn.Module) -> tuple[torch.dtype, torch.device] | None:
    return next(((p.dtype, p.device) for p in module.parameters()), None)


def _only_tensors(out: Any) -> bool:
    """Whether an output is nothing but tensors, so that it can be taken apart by rows: caches and distributions are
    not."""
    if isinstance(out, dict):
        return all(_only_tensors(value) for value in out.values())
    if isinstance(out, (list, tuple)):
        return all(_only_tensors(value) for value in out)
    return out is None or isinstance(out, Tensor)
