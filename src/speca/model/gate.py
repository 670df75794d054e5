"""The iteration gate: what an unmodified model sees when it loops over its own blocks.

While a gated call runs, iterating a block list yields one light stand-in per block. In a full pass a stand-in calls
its block. In a draft it hands its inputs through, except at the *verify block* (the last one called), which is fed the
forecast state. Indexing, `len`, names, parameters and `state_dict` stay those of the list.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


class Mode(enum.Enum):
    """What the stand-ins do during one forward."""

    OFF = "off"  # the list yields its own blocks
    TRACE = "trace"  # call each block and learn which input each output continues
    FULL = "full"  # call each block, keep the verify block's state and outputs
    PASS = "pass"  # hand inputs through; the verify block runs on what reaches it
    CHECKED = "checked"  # hand inputs through; the verify block runs on the forecast state
    UNCHECKED = "unchecked"  # hand inputs through; the forecast outputs replace the verify block's


@dataclass
class Slots:
    """Which argument each output of a block continues, learnt from one real call."""

    is_tuple: bool
    names: tuple[str | None, ...]


@dataclass
class Features:
    """State arguments and outputs of the verify block, in the model's own layout."""

    state: list[Tensor]
    outputs: list[Tensor]


class GatedModuleList(nn.ModuleList):
    """A ModuleList whose iteration and slicing go through the gate while a gated call runs."""

    def __iter__(self) -> Iterator[Any]:
        gate: Gate = self.__dict__["_speca_gate"]
        return iter(self.__dict__["_speca_stand_ins"]) if gate.mode is not Mode.OFF else super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        gate: Gate = self.__dict__["_speca_gate"]
        if isinstance(index, slice) and gate.mode is not Mode.OFF:
            return self.__dict__["_speca_stand_ins"][index]
        return super().__getitem__(index)


class StandIn:
    """Stands for one block while the model iterates. Attributes are the block's own."""

    def __init__(self, gate: Gate, block: nn.Module, name: str) -> None:
        self.gate, self.block, self.name = gate, block, name
        self.parameters_of = list(inspect.signature(type(block).forward).parameters)[1:]
        self.slots: Slots | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "block":
            raise AttributeError(name)
        return getattr(self.block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.gate.run(self, args, kwargs)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name; surplus positional ones as "*0", "*1", ..."""
        names = self.parameters_of
        bound = {names[i] if i < len(names) else f"*{i}": value for i, value in enumerate(args)}
        return {**bound, **kwargs}

    def call_with(self, args: Sequence[Any], kwargs: dict[str, Any], replaced: dict[str, Any]) -> Any:
        """Call the block with some arguments replaced, each where the model had put it."""
        positional, named = list(args), dict(kwargs)
        for name, value in replaced.items():
            if name in named:
                named[name] = value
            else:
                positional[self.parameters_of.index(name)] = value
        return self.block(*positional, **named)

    def learn(self, bound: dict[str, Any], out: Any) -> None:
        """Find the argument each output continues: same shape, and nearest in value as blocks are residual."""
        outputs = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, (tuple, list)) else []
        names: list[str | None] = []
        for o in outputs:
            free = {
                n: v
                for n, v in bound.items()
                if isinstance(o, Tensor) and isinstance(v, Tensor) and v.shape == o.shape and n not in names
                and v.is_floating_point()
            }  # fmt: skip
            names.append(min(free, key=lambda n: float((free[n].float() - o.float()).norm())) if free else None)
        passable = bool(names) and all(n is not None or o is None for n, o in zip(names, outputs, strict=True))
        self.slots = Slots(not isinstance(out, Tensor), tuple(names)) if passable and any(names) else None

    def pass_through(self, bound: dict[str, Any]) -> Any:
        """The inputs in the structure of the outputs."""
        assert self.slots is not None
        values = tuple(None if name is None else bound[name] for name in self.slots.names)
        return values if self.slots.is_tuple else values[0]


@dataclass
class Gate:
    """The gate of one transformer: its lists, the verify block, and what the current pass keeps or substitutes."""

    model: nn.Module
    mode: Mode = Mode.OFF
    lists: dict[str, nn.ModuleList] = field(default_factory=dict)
    stand_ins: dict[str, list[StandIn]] = field(default_factory=dict)
    verify: StandIn | None = None
    state: tuple[str, ...] = ()
    called: list[StandIn] = field(default_factory=list)
    bound: dict[str, Any] = field(default_factory=dict)
    features: Features | None = None
    forecast: Features | None = None

    def attach(self) -> None:
        """Put the gate into every block list of the model. Undone by `detach`; what was learnt of blocks is kept."""
        for name, blocks in block_lists(self.model).items():
            known = self.stand_ins.get(name, [])
            if [s.block for s in known] != list(blocks):
                known = self.stand_ins[name] = [StandIn(self, b, f"{name}.{i}") for i, b in enumerate(blocks)]
            blocks.__dict__["_speca_gate"], blocks.__dict__["_speca_stand_ins"] = self, known
            blocks.__class__ = GatedModuleList
            self.lists[name] = blocks

    def detach(self) -> None:
        """Give every list its class and attributes back."""
        for blocks in self.lists.values():
            blocks.__class__ = nn.ModuleList
            del blocks.__dict__["_speca_gate"], blocks.__dict__["_speca_stand_ins"]
        self.lists.clear()
        self.forget()

    def forget(self) -> None:
        """Drop the tensors of the last pass."""
        self.mode, self.bound, self.features, self.forecast = Mode.OFF, {}, None, None

    def run(self, stand_in: StandIn, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One block's turn in the current pass."""
        if self.mode is Mode.TRACE:
            return self._trace(stand_in, args, kwargs)
        if stand_in is not self.verify:
            if self.mode is Mode.FULL or stand_in.slots is None:
                return stand_in.block(*args, **kwargs)
            return stand_in.pass_through(stand_in.bind(args, kwargs))
        if self.mode is Mode.UNCHECKED:
            return self._substitute(stand_in)
        if self.mode is Mode.CHECKED:
            assert self.forecast is not None
            out = stand_in.call_with(args, kwargs, dict(zip(self.state, self.forecast.state, strict=True)))
        else:
            out = stand_in.block(*args, **kwargs)
        self.bound = stand_in.bind(args, kwargs) if self.mode is Mode.PASS else {}
        state = [] if self.mode is not Mode.FULL else [stand_in.bind(args, kwargs)[name] for name in self.state]
        self.features = Features(state, tensors_of(out))
        return out

    def _trace(self, stand_in: StandIn, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        bound = stand_in.bind(args, kwargs)
        # A block may write into its inputs, so what the last one was given is kept as a copy.
        kept = {n: v.clone() if isinstance(v, Tensor) else v for n, v in bound.items()}
        out = stand_in.block(*args, **kwargs)
        stand_in.learn(kept, out)
        if stand_in.slots is not None:
            self.called.append(stand_in)
            self.verify, self.bound = stand_in, kept
            self.features = Features([], [o.clone() for o in tensors_of(out)])
        return out

    def _substitute(self, stand_in: StandIn) -> Any:
        assert self.forecast is not None and stand_in.slots is not None
        outputs = iter(self.forecast.outputs)
        values = tuple(None if name is None else next(outputs) for name in stand_in.slots.names)
        return values if stand_in.slots.is_tuple else values[0]


LIST_TYPES = (nn.ModuleList, GatedModuleList)
"""Exact types: a subclass may already do something of its own when iterated."""


def tensors_of(out: Any) -> list[Tensor]:
    """The tensors among a block's outputs, in order."""
    return [o for o in ([out] if isinstance(out, Tensor) else out) if isinstance(o, Tensor)]


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of blocks that are direct children of the model, or children of a ModuleDict there.

    Lists deeper down (refiners, feed-forward parts) keep running: they are cheap or part of a block.
    """
    candidates = dict(model.named_children())
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleDict):
            candidates |= {f"{name}.{key}": inner for key, inner in child.named_children()}
    return {n: c for n, c in candidates.items() if isinstance(c, nn.ModuleList) and type(c) in LIST_TYPES and len(c)}


def is_gated(model: nn.Module) -> bool:
    """Whether a gate sits in any block list of the model."""
    return any(isinstance(child, GatedModuleList) for child in model.modules())
