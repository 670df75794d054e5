"""Where an engine says what its user should know: a warning, and the log `speca.engine` for processes that keep one."""

from __future__ import annotations

import logging
import warnings

logger = logging.getLogger("speca.engine")


def warn(text: str) -> None:
    """Warn the user, and write it to the log."""
    logger.warning(text)
    warnings.warn(f"speca: {text}", stacklevel=3)
