"""The fair bench: every method on the same seeds of the same model, at what each really costs."""
