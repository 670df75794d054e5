"""What is learnt from full runs of a model: its prior, and the fewest full steps that meet a quality."""

from ..denoiser.calibration import Calibration

__all__ = ["Calibration"]
