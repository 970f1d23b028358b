"""Tasks and traces: from files, datasets and functions."""

from retrain.data.cursor import Cursor, Position
from retrain.data.messages import messages_from_dicts, messages_to_dicts
from retrain.data.order import Succeeded, TaskCursor, TaskSource
from retrain.data.sources import load_tasks
from retrain.data.traces import (
    Trace,
    TraceReader,
    Traces,
    TraceSource,
    TraceStream,
    load_traces,
)

__all__ = [
    "Cursor",
    "Position",
    "Succeeded",
    "TaskCursor",
    "TaskSource",
    "Trace",
    "TraceReader",
    "TraceSource",
    "TraceStream",
    "Traces",
    "load_tasks",
    "load_traces",
    "messages_from_dicts",
    "messages_to_dicts",
]
