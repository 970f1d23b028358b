"""MCP servers as tools: https://modelcontextprotocol.io, through the official SDK."""

from __future__ import annotations

from retrain.tools.mcp.tool import MCPTool, mcp

__all__ = ["MCPTool", "mcp"]
