"""Messages to text: a tokenizer's own chat template, or a plain format for those without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from retrain.types import Message, MessageType, UserError

ROLES = {
    MessageType.SYSTEM: "system",
    MessageType.MESSAGE: "user",
    MessageType.MODEL: "assistant",
    MessageType.TOOL: "tool",
}

ToolSchema = Mapping[str, Any]
"""`{"type": "function", "function": {"name", "description", "parameters"}}`."""


class Template(Protocol):
    """Turns a conversation into the text that the policy reads.

    `generation` appends what comes before the policy's next words.
    """

    @property
    def supports_tools(self) -> bool: ...

    def text(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], *, generation: bool
    ) -> str: ...


def role_of(message: Message) -> str:
    return message.role or ROLES[message.type]


class PlainTemplate:
    """The format for tokenizers without a chat template (GPT-2).

    Every message is its role's label on a line, its content, and an empty line::

        System:
        You are terse.

        User:
        2 + 3?

        Assistant:
        5<eos>

    The end-of-sequence token ends what the policy says.
    """

    supports_tools: bool = False

    def __init__(self, eos_token: str, bos_token: str = "") -> None:
        self._eos = eos_token
        self._bos = bos_token

    def text(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], *, generation: bool
    ) -> str:
        if tools:
            raise UserError(
                "native tool calls need a tokenizer with a chat template; this one has none",
                "Use environment.tool_format.type: tags or fenced.",
            )
        parts = [self._bos]
        for message in messages:
            end = self._eos if message.type is MessageType.MODEL else ""
            parts.append(f"{self._label(message)}:\n{message.content}{end}\n\n")
        if generation:
            parts.append("Assistant:\n")
        return "".join(parts)

    @staticmethod
    def _label(message: Message) -> str:
        label = role_of(message).capitalize()
        return f"{label} ({message.name})" if message.name else label


class ChatTemplate:
    """The tokenizer's own Jinja template, through `apply_chat_template`.

    Raises:
        UserError: the template refuses the conversation.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def supports_tools(self) -> bool:
        schema = {"type": "function", "function": {"name": "zqtool", "parameters": {}}}
        hello = [Message("x", MessageType.MESSAGE)]
        return "zqtool" in self.text(hello, [schema], generation=True)

    def text(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], *, generation: bool
    ) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                [_to_dict(m) for m in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except Exception as error:
            roles = ", ".join(role_of(m) for m in messages)
            raise UserError(
                f"the tokenizer's chat template refuses this conversation ({roles}): {error}",
                "Change the conversation's roles, or use a tool format that writes into the "
                "assistant's own turn (tags, fenced).",
            ) from error
        return str(rendered)


def _to_dict(message: Message) -> dict[str, Any]:
    """A sampled message is rendered from its own text, never from what was parsed out of it."""
    entry: dict[str, Any] = {"role": role_of(message), "content": message.content}
    if message.name:
        entry["name"] = message.name
    if message.tool_call_id:
        entry["tool_call_id"] = message.tool_call_id
    if message.turn is None:
        if message.reasoning is not None:
            entry["reasoning_content"] = message.reasoning
        if message.tool_calls:
            entry["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for call in message.tool_calls
            ]
    return entry
