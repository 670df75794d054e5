"""The iteration gate: replace the blocks that an unmodified model gets when it iterates over its block lists.

During a gated call, iterating a block list yields one stand-in per block. In a full pass a stand-in calls its block. In
a draft it returns its inputs, except at the *verify block* (the last one called), which runs on the forecast state.
Indexing, `len`, names, parameters and `state_dict` stay those of the list.
"""

from __future__ import annotations

import enum
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedModelError
from .blocks import onloaded, quick_pass, tensors_of, version_of
from .layouts import Layout, fit


class Mode(enum.Enum):
    """What the stand-ins do during one forward."""

    drafts: bool

    def __init__(self, value: str) -> None:
        self.drafts = value in ("pass", "checked", "unchecked")

    OFF = "off"  # the list yields its own blocks
    TRACE = "trace"  # call each block and find the input that each output updates
    FULL = "full"  # call each block, keep the verify block's state and outputs
    PASS = "pass"  # hand inputs through; the verify block runs on what reaches it
    CHECKED = "checked"  # hand inputs through; the verify block runs on the forecast state
    UNCHECKED = "unchecked"  # hand inputs through; the forecast outputs replace the verify block's


@dataclass
class Slots:
    """The argument that each output of a block updates, found on one full call."""

    is_tuple: bool
    names: tuple[str | None, ...]
    quick: Callable[[Sequence[Any], dict[str, Any]], Any] | None = None  # see `blocks.quick_pass`


@dataclass
class Features:
    """State arguments and outputs of the verify block, in the model's own layout."""

    state: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True)
class Learnt:
    """Structure of the blocks for one kind of call.

    Attributes:
        verify: the verify block.
        state: its arguments that are forecast.
        slots: for each block, the arguments returned when it is skipped.
        layouts: batch dimension of each feature, state first and then outputs.
        ragged: whether a row alone has fewer tokens than in its batch.
    """

    verify: StandIn
    state: tuple[str, ...]
    slots: tuple[tuple[StandIn, Slots | None], ...]
    layouts: tuple[Layout, ...]
    ragged: bool = False


class GatedModuleList(nn.ModuleList):
    """A ModuleList whose iteration and slicing go through the gate while a gated call runs."""

    def __iter__(self) -> Iterator[Any]:
        gate: Gate = self.__dict__["_speca_gate"]
        return iter(self.__dict__["_speca_stand_ins"]) if gate.mode is not Mode.OFF else super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        gate: Gate = self.__dict__["_speca_gate"]
        if not isinstance(index, slice):
            return super().__getitem__(index)
        if gate.mode is not Mode.OFF:
            return self.__dict__["_speca_stand_ins"][index]
        return nn.ModuleList(list(self._modules.values())[index])  # a part of the list has no gate

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle as a plain list."""
        kept = {n: v for n, v in self.__dict__.items() if n not in {"_speca_gate", "_speca_stand_ins"}}
        return nn.ModuleList, (), kept


class StandIn:
    """Replaces one block during iteration. Other attributes are those of the block."""

    def __init__(self, gate: Gate, block: nn.Module, name: str) -> None:
        self.gate, self.block, self.name = gate, block, name
        self.parameters_of = list(inspect.signature(type(block).forward).parameters)[1:]
        self.slots: Slots | None = None
        self.writes = False  # whether the block changes its inputs in place

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "block":
            raise AttributeError(name)
        return getattr(self.block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gate, slots = self.gate, self.slots
        if gate.mode.drafts and slots is not None and slots.quick is not None and self is not gate.verify:
            try:
                return slots.quick(args, kwargs)  # cost of a skipped block: see recipes/skip_overhead.py
            except LookupError:  # arguments by position that were given by name before, or the reverse
                pass
        return gate.run(self, args, kwargs)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name; surplus positional ones as "*0", "*1", ..."""
        names = self.parameters_of
        bound = {names[i] if i < len(names) else f"*{i}": value for i, value in enumerate(args)}
        return {**bound, **kwargs}

    def call_with(self, args: Sequence[Any], kwargs: dict[str, Any], replaced: dict[str, Any]) -> Any:
        """Call the block with some arguments replaced, by position or name as the model passed them."""
        positional, named = list(args), dict(kwargs)
        for name, value in replaced.items():
            if name in named:
                named[name] = value
            else:
                positional[self.parameters_of.index(name)] = value
        return self.block(*positional, **named)

    def learn(self, bound: dict[str, Any], out: Any, given: int) -> None:
        """Find the argument that each output updates: same shape and nearest in value, as blocks are residual.

        `given` is the number of arguments that were positional.
        """
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
        found = passable and any(names)
        is_tuple = not isinstance(out, Tensor)
        self.slots = Slots(is_tuple, tuple(names), quick_pass(is_tuple, names, list(bound)[:given])) if found else None

    def pass_through(self, bound: dict[str, Any]) -> Any:
        """Return the inputs in the structure of the outputs."""
        assert self.slots is not None
        values = tuple(None if name is None else bound[name] for name in self.slots.names)
        return values if self.slots.is_tuple else values[0]


@dataclass
class Gate:
    """The gate of one transformer: its lists, the verify block, and what the current pass keeps or substitutes."""

    model: nn.Module
    mode: Mode = Mode.OFF
    lists: dict[str, nn.ModuleList] = field(default_factory=dict)
    blocks: dict[str, list[Any]] = field(default_factory=dict)  # of each list, as they were last seen
    stand_ins: dict[str, list[StandIn]] = field(default_factory=dict)
    renewals: int = 0  # number of changes of the blocks; findings of earlier blocks are invalid
    verify: StandIn | None = None
    state: tuple[str, ...] = ()
    learnt: Learnt | None = None
    called: list[StandIn] = field(default_factory=list)
    bound: dict[str, Any] = field(default_factory=dict)
    features: Features | None = None
    forecast: Features | None = None
    lock: Any = field(default_factory=threading.RLock, repr=False)  # held while a forward goes through the gate

    def attach(self) -> None:
        """Put the gate into every block list of the model. Undone by `detach`, which keeps what was found about blocks.

        Raises:
            ConfigError: a list is gated already, for another model that shares it.
        """
        lists = block_lists(self.model)
        demand_free(self.model)
        if self.blocks != (blocks := _blocks_of(lists)):
            self.blocks = blocks
            self.stand_ins = {n: [StandIn(self, b, f"{n}.{i}") for i, b in enumerate(own)] for n, own in blocks.items()}
            self.learnt, self.renewals = None, self.renewals + 1
        for name, gated in lists.items():
            gated.__dict__["_speca_gate"], gated.__dict__["_speca_stand_ins"] = self, self.stand_ins[name]
            gated.__class__ = GatedModuleList
        self.lists = lists

    def refresh(self) -> None:
        """Gate blocks and lists that were replaced, added or removed since `attach`; fast if there are none."""
        lists = block_lists(self.model)
        if lists != self.lists or _blocks_of(lists) != self.blocks:
            self.detach()
            self.attach()

    def detach(self) -> None:
        """Restore the class and attributes of every list."""
        for blocks in self.lists.values():
            blocks.__class__ = nn.ModuleList
            del blocks.__dict__["_speca_gate"], blocks.__dict__["_speca_stand_ins"]
        self.lists.clear()
        self.forget()

    def learn(self, layouts: Sequence[Layout], *, ragged: bool) -> Learnt:
        """Return the structure found in the traced call, to be passed to `arm` at later calls of its kind."""
        assert self.verify is not None
        slots = tuple((s, s.slots) for known in self.stand_ins.values() for s in known)
        self.learnt = Learnt(self.verify, self.state, slots, tuple(layouts), ragged)
        return self.learnt

    def arm(self, learnt: Learnt) -> None:
        """Prepare for calls of the kind `learnt` was learnt from."""
        if learnt is not self.learnt:
            self.learnt, self.verify, self.state = learnt, learnt.verify, learnt.state
            for stand_in, slots in learnt.slots:
                stand_in.slots = slots

    def forget(self) -> None:
        """Drop the tensors of the last pass."""
        self.mode, self.bound, self.features, self.forecast = Mode.OFF, {}, None, None

    def run(self, stand_in: StandIn, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run, skip or replace one block in the current pass."""
        if self.mode is Mode.TRACE:
            return self._trace(stand_in, args, kwargs)
        if stand_in is not self.verify:
            if self.mode is Mode.FULL:
                return stand_in.block(*args, **kwargs)
            if stand_in.slots is None:
                with onloaded(stand_in.block):
                    return stand_in.block(*args, **kwargs)
            return stand_in.pass_through(stand_in.bind(args, kwargs))
        if self.mode is Mode.UNCHECKED:
            return self._substitute(stand_in, stand_in.bind(args, kwargs))
        if self.mode is Mode.CHECKED:
            assert self.forecast is not None
            bound = stand_in.bind(args, kwargs)
            given = {n: self._fitted(f, bound[n]) for n, f in zip(self.state, self.forecast.state, strict=True)}
            with onloaded(stand_in.block):
                out = stand_in.call_with(args, kwargs, given)
            self.features = Features([], tensors_of(out))
            return out
        bound = stand_in.bind(args, kwargs)
        state = [bound[name] for name in self.state] if self.mode is Mode.FULL else []
        if stand_in.writes:
            state = [s.clone() for s in state]
        with onloaded(stand_in.block) if self.mode is Mode.PASS else nullcontext():
            out = stand_in.block(*args, **kwargs)
        self.bound = bound if self.mode is Mode.PASS else {}
        self.features = Features(state, tensors_of(out))
        return out

    def _trace(self, stand_in: StandIn, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        bound = stand_in.bind(args, kwargs)
        # A block may write into its inputs, so the inputs of the last one are copied.
        kept = {n: v.clone() if isinstance(v, Tensor) else v for n, v in bound.items()}
        before = [version_of(v) for v in bound.values()]
        out = stand_in.block(*args, **kwargs)
        stand_in.writes = any(v is None for v in before) or before != [version_of(v) for v in bound.values()]
        stand_in.learn(kept, out, len(args))
        if stand_in.slots is not None:
            self.called.append(stand_in)
            self.verify, self.bound = stand_in, kept
            self.features = Features([], [o.clone() for o in tensors_of(out)])
        return out

    def _substitute(self, stand_in: StandIn, bound: dict[str, Any]) -> Any:
        assert self.forecast is not None and stand_in.slots is not None
        outputs = iter(self.forecast.outputs)
        names = stand_in.slots.names
        values = tuple(None if name is None else self._fitted(next(outputs), bound[name]) for name in names)
        return values if stand_in.slots.is_tuple else values[0]

    def _fitted(self, forecast: Tensor, like: Tensor) -> Tensor:
        """Cut the forecast of a ragged row, which has as many tokens as the longest row of its batch."""
        if forecast.shape == like.shape:
            return forecast
        if self.learnt is None or not self.learnt.ragged:
            raise UnsupportedModelError(
                f"these rows have features of shape {tuple(like.shape)} where {tuple(forecast.shape)} was kept of them."
            )
        return fit(forecast, like.shape)


LIST_TYPES = (nn.ModuleList, GatedModuleList)
"""Exact types: a subclass may already do something of its own when iterated."""


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of blocks that are direct children of the model, or children of a ModuleDict there.

    Lists deeper down (refiners, feed-forward parts) keep running: they are cheap or part of a block.
    """
    candidates = dict(model.named_children())
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleDict):
            candidates |= {f"{name}.{key}": inner for key, inner in child.named_children()}
    return {n: c for n, c in candidates.items() if isinstance(c, nn.ModuleList) and type(c) in LIST_TYPES and len(c)}


def _blocks_of(lists: dict[str, nn.ModuleList]) -> dict[str, list[Any]]:
    return {name: list(blocks._modules.values()) for name, blocks in lists.items()}


def demand_free(model: nn.Module) -> None:
    """Refuse block lists that another accelerated model iterates as well: a list can have one gate.

    Raises:
        ConfigError: with the remedy.
    """
    gates = {name: blocks.__dict__.get("_speca_gate") for name, blocks in block_lists(model).items()}
    shared = [name for name, gate in gates.items() if gate is not None and gate.model is not model]
    if shared:
        raise ConfigError(
            f"{type(model).__name__} shares {', '.join(shared)} with another model that is accelerated, as a copy.copy "
            "does; call speca.disable on that one first, or enable a copy.deepcopy."
        )


def is_gated(model: nn.Module) -> bool:
    """Return whether any block list of the model has a gate."""
    return any(isinstance(child, GatedModuleList) for child in model.modules())
