"""The algorithm as small pure parts: forecast, verify, decide, remember. Torch only, no diffusers."""
