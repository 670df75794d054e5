"""Measure runs of pipelines: time, quality against the full run, pictures, distances between sets."""
