"""Where `speca.compare` was, which is `speca.reports` now: the one module that users were told of is found here too."""

from .reports import distances as distance

__all__ = ["distance"]
