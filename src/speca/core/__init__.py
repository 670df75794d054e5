"""The mathematics on numbers and tensors: forecasts, corrections, priors, placements and decisions. No models."""
