"""Messages to tokens, tokens to messages."""

from retrain.rendering.formats import FencedFormat, NativeFormat, TagFormat, ToolFormat
from retrain.rendering.ledger import prompt_token_ids
from retrain.rendering.renderer import Renderer, make_template
from retrain.rendering.templates import ChatTemplate, PlainTemplate, Template, ToolSchema
from retrain.rendering.tokens import Codec

__all__ = [
    "ChatTemplate",
    "Codec",
    "FencedFormat",
    "NativeFormat",
    "PlainTemplate",
    "Renderer",
    "TagFormat",
    "Template",
    "ToolFormat",
    "ToolSchema",
    "make_template",
    "prompt_token_ids",
]
