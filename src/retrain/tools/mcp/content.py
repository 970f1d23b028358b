"""What a model reads of a result."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcp.types import CallToolResult, ContentBlock

NO_CONTENT = "(no output)"


def text_of(result: CallToolResult) -> str:
    """Its texts, a line or more each; of what is no text a short mention in brackets. Structured
    content is shown, as JSON, where there is no text: servers give it in both forms."""
    parts = [_show(block) for block in result.content]
    if result.structured_content is not None and not any(_is_text(b) for b in result.content):
        parts.append(json.dumps(result.structured_content, ensure_ascii=False, default=str))
    return "\n".join(parts) or NO_CONTENT


def _is_text(block: ContentBlock) -> bool:
    return block.type == "text" or (block.type == "resource" and hasattr(block.resource, "text"))


def _show(block: ContentBlock) -> str:
    from mcp.types import AudioContent, ImageContent, TextResourceContents

    if block.type == "text":
        return block.text
    if isinstance(block, ImageContent | AudioContent):
        return f"[{block.type}: {block.mime_type}, {len(block.data) * 3 // 4} bytes]"
    if block.type == "resource_link":
        return f"[resource: {block.uri}]"
    if block.type == "resource":
        if isinstance(block.resource, TextResourceContents):
            return block.resource.text
        kind = block.resource.mime_type or "binary"
        return f"[resource: {block.resource.uri}, {kind}]"
    return f"[{getattr(block, 'type', 'unknown content')}]"
