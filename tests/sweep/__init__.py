"""Every transformer class of diffusers as a tiny random model; `python -m sweep` writes docs/models.md."""
