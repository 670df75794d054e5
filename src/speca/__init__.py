"""speca: fewer evaluations of diffusion models, by forecasts between planned full steps (SpeCa, arXiv:2509.11628).

import speca
speca.enable(pipe)
images = pipe(...).images
print(speca.report(pipe))
"""

from typing import TYPE_CHECKING, Any

from . import zoo
from .calibration.file import Calibration
from .config import PRESETS, SpecaConfig, VerifiedConfig
from .denoiser.denoiser import Denoiser
from .diffusers.enable import disable, enable, enabled, report
from .errors import (
    CancelledError,
    ConfigError,
    EngineClosedError,
    InputError,
    NonFiniteError,
    NotEnabledError,
    QueueFullError,
    SpecaError,
    UnsupportedModelError,
)
from .reports.check import CheckReport, check
from .reports.report import Report, SampleReport

if TYPE_CHECKING:
    from .calibration.calibrate import calibrate
    from .calibration.calibrating import calibrating
    from .engine import Engine

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Calibration",
    "CancelledError",
    "CheckReport",
    "ConfigError",
    "Denoiser",
    "Engine",
    "EngineClosedError",
    "InputError",
    "NonFiniteError",
    "NotEnabledError",
    "QueueFullError",
    "Report",
    "SampleReport",
    "SpecaConfig",
    "SpecaError",
    "UnsupportedModelError",
    "VerifiedConfig",
    "calibrate",
    "calibrating",
    "check",
    "disable",
    "enable",
    "enabled",
    "report",
    "zoo",
]


def __getattr__(name: str) -> Any:
    """Load `calibrate`, `calibrating` and `Engine`, which import much, when they are first asked for."""
    if name == "calibrate":
        from .calibration.calibrate import calibrate

        return calibrate
    if name == "calibrating":
        from .calibration.calibrating import calibrating

        return calibrating
    if name == "Engine":
        from .engine import Engine

        return Engine
    raise AttributeError(f"module 'speca' has no attribute {name!r}")
