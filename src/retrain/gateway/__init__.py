"""Serves the APIs that agents speak, and keeps what was said, token for token."""
