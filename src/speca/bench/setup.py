"""Types shared by the methods of the bench; this module imports no other module of the bench."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..diffusers.enable import Session

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Call = dict[str, Any]


@dataclass
class Setup:
    """A pipeline with one setting of a method applied, and the arguments of its calls.

    Attributes:
        session: the session of `speca`, None for other methods.
        begin: called before each batch with the index of its first sample; None unless settings differ by sample.
        bytes: returns the bytes kept between steps for a whole batch; None if the method does not report them.
    """

    pipe: DiffusionPipeline
    call: Call
    session: Session | None = None
    begin: Callable[[int], None] | None = None
    bytes: Callable[[], int] | None = None


Apply = Callable[[Any, Call, Any], AbstractContextManager[Setup]]
"""Context manager that applies a value of the knob to a pipeline and call arguments, and undoes it on exit."""
