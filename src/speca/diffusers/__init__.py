"""Acceleration of diffusers pipelines and of single modules: enable, disable, and which step and branch a call is."""
