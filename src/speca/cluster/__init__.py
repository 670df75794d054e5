"""Several devices and machines, by Ray. Nothing here is imported unless it is asked for."""
