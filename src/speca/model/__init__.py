"""The mechanism: how an unmodified transformer is made to skip its blocks. No per-model code."""
