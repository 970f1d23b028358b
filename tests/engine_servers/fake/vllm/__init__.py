"""Stands in for the real package, for tests; see `engine_servers`."""
