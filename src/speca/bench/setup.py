"""What every method of the bench makes of a pipeline: the lowest module of the bench, which imports no other of it."""

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
    """What a setting made of a pipeline and its arguments.

    Attributes:
        session: there where `speca` itself runs.
        begin: called with the index of the first sample before each batch, by methods that treat samples differently.
        bytes: of what is kept between steps, all samples of a batch together; where the method knows them.
    """

    pipe: DiffusionPipeline
    call: Call
    session: Session | None = None
    begin: Callable[[int], None] | None = None
    bytes: Callable[[], int] | None = None


Apply = Callable[[Any, Call, Any], AbstractContextManager[Setup]]
"""From a plain pipeline, the arguments of a call and a value of the knob to the set-up; undone on exit."""
