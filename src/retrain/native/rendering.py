"""A renderer from a model and its tokenizer alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from retrain.rendering import Codec, NativeFormat, Renderer, TagFormat, ToolFormat, make_template
from retrain.types import TagConfig, UserError


def make_renderer(
    model: nn.Module, tokenizer: Any, tag_config: TagConfig | None, *, has_tools: bool
) -> Renderer:
    """The tokenizer's chat template, or the plain format where it has none.

    Tool calls are written between the tags of `tag_config`; without one, and with tools, as the
    chat template itself writes them.

    Raises:
        UserError: a tokenizer without an end-of-sequence token, or tools without tags where the
            chat template takes none.
    """
    template = make_template(tokenizer)
    tool_format: ToolFormat | None = None
    if tag_config is not None:
        tool_format = TagFormat(tag_config)
    elif has_tools and not template.supports_tools:
        raise UserError(
            "the tokenizer has no chat template that takes tools",
            "Pass tag_config=TagConfig(...): calls are then written between tags.",
        )
    elif has_tools:
        tool_format = NativeFormat(template)
    generation = getattr(model, "generation_config", None)
    stop = None if generation is None else generation.eos_token_id
    stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    return Renderer(Codec(tokenizer, stops), template, tool_format)
