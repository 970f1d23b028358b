"""The run directory, and what a user sees of a run."""
