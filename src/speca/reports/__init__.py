"""What happened: the report of a run, what a short trial finds, time and quality against the full run, pictures."""
