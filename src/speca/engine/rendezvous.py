"""Functions that stop where they need something and go on when they are given it, all in one thread.

Each runs in a greenlet of its own: a stack that can be left in the middle of any call, here in the middle of a
pipeline, whose code need not know of it. What a thread carries along besides its stack (whether gradients are
recorded, autocast, the global random generators) is put back at every change.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError

if TYPE_CHECKING:
    from greenlet import greenlet


@dataclass(frozen=True)
class Ambient:
    """What torch keeps for a thread and a pipeline may change: gradients, and autocast on each kind of device."""

    gradients: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def here(cls, devices: tuple[str, ...]) -> Ambient:
        """As it is now."""
        cast = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
        return cls(torch.is_grad_enabled(), cast)

    def restore(self) -> None:
        """Make it so again."""
        torch.set_grad_enabled(self.gradients)
        for device, enabled, dtype in self.autocast:
            if (enabled, dtype) != (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)):
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)


@dataclass(frozen=True, eq=False)
class Chance:
    """Where the global random generators stand. Some pipelines hand no generator to their scheduler, which then draws
    from these: they must not depend on who else is drawing."""

    states: tuple[tuple[str, Tensor], ...]

    @classmethod
    def here(cls, devices: tuple[str, ...]) -> Chance:
        """As they are now."""
        others = tuple((d, torch.get_device_module(d).get_rng_state()) for d in devices if d not in ("cpu", "meta"))
        return cls((("cpu", torch.get_rng_state()), *others))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chance) and all(
            one[0] == two[0] and torch.equal(one[1], two[1]) for one, two in zip(self.states, other.states, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def restore(self) -> None:
        """Put them back."""
        for device, state in self.states:
            if device == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state)


@dataclass(frozen=True)
class Ended:
    """How a function ended: with a value, or with an exception."""

    key: int
    value: Any = None
    error: BaseException | None = None


@dataclass
class Rendezvous:
    """Runs functions until they ask for something, and lets them go on once they are given it.

    Attributes:
        devices: kinds of devices in use, whose autocast is kept apart.
        asked: what each waiting function has asked, and in which surroundings.
        ended: functions that have ended since this list was last emptied.
    """

    devices: tuple[str, ...] = ("cpu",)
    asked: dict[int, tuple[Any, Ambient]] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)
    _running: dict[int, greenlet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._greenlet = demand_greenlet()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, key: int, function: Callable[[], Any]) -> None:
        """Run `function` until it asks for something or ends."""

        def body() -> Ended:
            try:
                return Ended(key, value=function())
            except BaseException as error:  # of whatever kind, it is this function's alone
                return Ended(key, error=_bare(error))

        self._running[key] = self._greenlet.greenlet(body, self._here())
        self._go(key, self._running[key].switch)

    def ask(self, question: Any) -> Any:
        """Called by such a function: stop until `question` is answered. Raises what is thrown in place of an answer."""
        mine, ambient, chance = self._here(), Ambient.here(self.devices), Chance.here(self.devices)
        assert mine.parent is not None, "only a function that was started may ask"
        try:
            return mine.parent.switch((question, ambient))
        finally:
            ambient.restore()
            chance.restore()

    def answer(self, key: int, value: Any) -> None:
        """Let a waiting function go on with `value`, until it asks again or ends."""
        self._go(key, self._running[key].switch, value)

    def throw(self, key: int, error: BaseException) -> None:
        """Let a waiting function go on with an exception."""
        self._go(key, self._running[key].throw, error)

    def forget(self) -> None:
        """End all functions where they are; their results and errors are dropped."""
        for key in list(self._running):
            self.throw(key, self._greenlet.GreenletExit())
        self._running.clear()
        self.asked.clear()
        self.ended.clear()

    def _go(self, key: int, into: Callable[..., Any], *value: Any) -> None:
        self.asked.pop(key, None)
        running = self._running[key]
        running.parent = self._here()
        with _kept(self.devices):
            said = into(*value)
        if isinstance(said, Ended):
            del self._running[key]
            self.ended.append(said)
        else:
            self.asked[key] = said

    def _here(self) -> greenlet:
        current: greenlet = self._greenlet.getcurrent()
        return current


@contextmanager
def _kept(devices: tuple[str, ...]) -> Iterator[None]:
    ambient, chance = Ambient.here(devices), Chance.here(devices)
    try:
        yield
    finally:
        ambient.restore()
        chance.restore()


def demand_greenlet() -> Any:
    """Return the package greenlet.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        import greenlet
    except ImportError as error:
        raise ConfigError(
            "the engine needs greenlet; install it with pip install 'speca-diffusers[engine]'."
        ) from error
    return greenlet


def _bare(error: BaseException) -> BaseException:
    """The exception with its traceback, but without the variables of its frames: they hold a pipeline and latents."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    return error
