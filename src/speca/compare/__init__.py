"""Runs of pipelines measured: time, quality against the full run, pictures, distances of sets."""
