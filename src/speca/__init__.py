"""speca: speculative decoding for diffusion transformers (SpeCa, arXiv:2509.11628).

import speca
speca.enable(pipe)
images = pipe(...).images
print(speca.report(pipe))
"""

from typing import TYPE_CHECKING, Any

from . import zoo
from .calibration import Calibration
from .check import CheckReport, check
from .config import PRESETS, SpecaConfig
from .errors import (
    CancelledError,
    ConfigError,
    InputError,
    NotEnabledError,
    QueueFullError,
    SpecaError,
    UnsupportedModelError,
)
from .pipeline import disable, enable, enabled, report
from .report import Report, SampleReport

if TYPE_CHECKING:
    from .calibrating import calibrate
    from .engine import Engine

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Calibration",
    "CancelledError",
    "CheckReport",
    "ConfigError",
    "Engine",
    "InputError",
    "NotEnabledError",
    "QueueFullError",
    "Report",
    "SampleReport",
    "SpecaConfig",
    "SpecaError",
    "UnsupportedModelError",
    "calibrate",
    "check",
    "disable",
    "enable",
    "enabled",
    "report",
    "zoo",
]


def __getattr__(name: str) -> Any:
    """What brings much with it is loaded when it is asked for: `calibrate`, which makes pictures, and `Engine`."""
    if name == "calibrate":
        from .calibrating import calibrate

        return calibrate
    if name == "Engine":
        from .engine import Engine

        return Engine
    raise AttributeError(f"module 'speca' has no attribute {name!r}")
