"""Tools: what a model can call, and how one rollout's calls are run."""

from __future__ import annotations

from retrain.tools.base import (
    CallStatus,
    ModelError,
    Tool,
    ToolError,
    ToolOutput,
    ToolResult,
    ToolSession,
    close_tools,
    tool_schema,
)
from retrain.tools.builtin import BUILT_IN, resolve_tools
from retrain.tools.function import ClassTool, FunctionTool, as_tool, tool
from retrain.tools.python import PythonTool
from retrain.tools.runner import ToolRunner

__all__ = [
    "BUILT_IN",
    "CallStatus",
    "ClassTool",
    "FunctionTool",
    "ModelError",
    "PythonTool",
    "Tool",
    "ToolError",
    "ToolOutput",
    "ToolResult",
    "ToolRunner",
    "ToolSession",
    "as_tool",
    "close_tools",
    "resolve_tools",
    "tool",
    "tool_schema",
]
