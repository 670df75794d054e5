"""speca: speculative decoding for diffusion transformers (SpeCa, arXiv:2509.11628).

import speca
speca.enable(pipe)
images = pipe(...).images
print(speca.report(pipe))
"""

from . import zoo
from .check import CheckReport, check
from .config import PRESETS, SpecaConfig
from .errors import ConfigError, InputError, NotEnabledError, SpecaError, UnsupportedModelError
from .pipeline import disable, enable, enabled, report
from .report import Report, SampleReport

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CheckReport",
    "ConfigError",
    "InputError",
    "NotEnabledError",
    "Report",
    "SampleReport",
    "SpecaConfig",
    "SpecaError",
    "UnsupportedModelError",
    "check",
    "disable",
    "enable",
    "enabled",
    "report",
    "zoo",
]
