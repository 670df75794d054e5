"""Types shared by the methods of the bench; this module imports no other module of the bench."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..diffusers.enable import Session
from ..errors import InputError

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


def transformer_of(pipe: Any) -> Any:
    """Return the transformer of a pipeline.

    Raises:
        InputError: it has none, but a U-Net, which a method that patches the blocks of transformers cannot take.
    """
    found = getattr(pipe, "transformer", None)
    if found is None:
        raise InputError(f"{type(pipe).__name__} has no transformer, whose blocks this method patches.")
    return found
