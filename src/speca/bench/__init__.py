"""Benchmark acceleration methods on the same seeds of the same model, with measured FLOPs and time."""
