"""What is learnt from full runs of a model: its prior, and the fewest full steps that meet a quality."""

from .file import Calibration

__all__ = ["Calibration"]
