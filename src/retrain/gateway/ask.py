"""What a request asks for and what it is answered, whichever API it came by.

Messages, tools and answers have OpenAI's chat shape here; the modules of `wire` translate.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from retrain.rendering import ToolSchema

Wire = Mapping[str, Any]
"""A message in the OpenAI chat format."""

Finish = Literal["stop", "length", "tool_calls", "content_filter"]

ToolChoice = Literal["auto", "none", "required"] | str
"""A name, with `tool:` before it, asks for that tool."""


class RequestRefused(Exception):
    """A request that is not answered; every API writes it in its own shape.

    Args:
        status: of HTTP, 400 to 599.
        code: OpenAI's, such as `context_length_exceeded`.
        param: the part of the body that is at fault.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param


@dataclass(frozen=True)
class Ask:
    """A request for the next message of a conversation."""

    messages: tuple[Wire, ...]
    """Each has a `role` of system, user, assistant or tool, and `content` that is text or None;
    an assistant's may have `tool_calls`, and `reasoning_content`; a tool's has `tool_call_id`."""
    tools: tuple[ToolSchema, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    n: int = 1
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    logprobs: bool = False
    """Of the answer's own tokens."""
    model: str = ""
    """As the request names it; answers repeat it."""
    stream: bool = False
    retried: bool = False
    """The client says that it has sent the same before, and got no answer."""
    gone: Callable[[], bool] = field(default=lambda: False, compare=False, repr=False)
    """Whether the client has gone away by now."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """What else of OpenAI's chat body says how to sample: temperature, top_p, seed, penalties,
    response_format, top_logprobs, reasoning_effort. An upstream model is given it as it is."""


@dataclass(frozen=True)
class TokenLogprob:
    """One sampled token. Where its bytes are no whole character, `text` has U+FFFD in the place of
    them, as OpenAI's API does."""

    text: str
    bytes: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class Choice:
    message: Wire
    """Of role assistant: `content` (None where it only calls tools), `tool_calls`,
    `reasoning_content` where there is any."""
    finish_reason: Finish
    stopped_by: str | None = None
    """The stop string of the request that ended it, which `content` does not have."""
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Reply:
    choices: tuple[Choice, ...]
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those that were not computed again."""
    not_enforced: tuple[str, ...] = ()
    """Names of the request's settings that the policy does not follow: its own count."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


def text_of(content: Any, place: str = "content") -> str:
    """The text of a message's content, which may be a list of parts.

    Raises:
        RequestRefused: a part is not text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise RequestRefused(f"{place} is neither text nor a list of parts", param=place)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestRefused(
                f"{place} has a part of type {kind!r}; this model reads text only",
                code="unsupported_value",
                param=place,
            )
        texts.append(text)
    return "".join(texts)
