"""Conversations from other agents' logs, whatever wrote them."""

from retrain.data.imports.base import Fault, Logged
from retrain.data.imports.read import FORMATS, read_logs

__all__ = ["FORMATS", "Fault", "Logged", "read_logs"]
