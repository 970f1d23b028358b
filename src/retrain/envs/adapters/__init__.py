"""Environments of other packages, as they are."""
