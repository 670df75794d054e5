"""Continuous batching of unmodified pipelines: requests drift apart in steps, and their forwards are run together."""
