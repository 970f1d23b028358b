"""The renderer: what the policy is about to see, as an extension or a fork of what it saw.

The policy's own words are not rendered again while they stand in the sequence: the template is
asked only for what comes before, between and after them. To find those places, the conversation
is rendered with a sentinel at the end of the policy's words. Where the template has changed its
mind about earlier text (it strips reasoning, say), the prompt is an explicit fork.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from retrain.rendering.formats import ToolFormat
from retrain.rendering.templates import ChatTemplate, PlainTemplate, Template, ToolSchema
from retrain.rendering.tokens import Codec
from retrain.types import Message, MessageType, Prompt, Rollout, Source

_SENTINEL = "\ue000\ue001\ue000"


def make_template(tokenizer: Any) -> Template:
    """The tokenizer's chat template, or the plain format when it has none."""
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer)
    bos = tokenizer.bos_token_id
    starts_with_bos = (
        bos is not None
        and bos != tokenizer.eos_token_id
        and tokenizer.encode("", add_special_tokens=True)[:1] == [bos]
    )
    return PlainTemplate(
        str(tokenizer.eos_token), str(tokenizer.bos_token) if starts_with_bos else ""
    )


@dataclass(frozen=True)
class _Located:
    """One turn of the policy inside a rendered conversation."""

    said: str
    after: str


class Renderer:
    """Messages to tokens and back, for one tokenizer, template and tool format.

    A *block* is one turn of the assistant as the template sees it: a MODEL message, or with an
    inline tool format a run of MODEL messages and the tool results written between them.
    """

    def __init__(
        self, codec: Codec, template: Template, tool_format: ToolFormat | None = None
    ) -> None:
        self.codec = codec
        self.template = template
        self.tool_format = tool_format
        self._inline = tool_format is not None and tool_format.inline
        self._turn_end = self._probe_turn_end()
        first = codec.encode(self._turn_end)[:1]
        if first and codec.decode(first) in codec.special_tokens:
            codec.stop_token_ids |= {first[0]}

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a generation."""
        return self.tool_format.stop if self.tool_format else ()

    def prompt(self, rollout: Rollout, tools: Sequence[ToolSchema] = ()) -> Prompt:
        """The policy's next prompt: all that the ledger does not hold yet, and what the template
        puts before the policy's next words.

        MODEL messages that no engine sampled become context; `enter` makes them targets.
        """
        return self._prompt(rollout.messages, rollout, tools, generation=True)

    def enter(self, rollout: Rollout, tools: Sequence[ToolSchema] = ()) -> None:
        """Bring the ledger up to date, with MODEL messages that no engine sampled as targets."""
        messages = rollout.messages
        entered = _last_entered(rollout)
        for index in rollout.model_messages:
            if entered is not None and index <= entered:
                continue
            prompt = self._prompt(messages[:index], rollout, tools, generation=True)
            target = list(self.codec.encode(self._target(messages, index, tools)))
            if self._block(messages, index)[1] == index + 1:
                target += self._end_token()
            start = len(prompt.token_ids)
            rollout.enter_prompt(
                replace(
                    prompt,
                    token_ids=prompt.token_ids + target,
                    sources=prompt.sources + [int(Source.TARGET)] * len(target),
                    spans=((index, start, start + len(target)),),
                )
            )
        if messages:
            rollout.enter_prompt(self._prompt(messages, rollout, tools, generation=False))

    def message(self, token_ids: Sequence[int], tools: Sequence[ToolSchema] = ()) -> Message:
        """The MODEL message that sampled tokens say, with the calls it makes."""
        text = self.codec.said(token_ids)
        calls = self.tool_format.parse(text, tools) if self.tool_format else ()
        return Message(text, MessageType.MODEL, tool_calls=calls)

    def tool_message(self, text: str, name: str, call_id: str) -> Message:
        """The TOOL message for a result, unable to forge a tag or to end the turn."""
        markers = self.tool_format.markers if self.tool_format else ()
        safe = self.codec.neutralise(text, markers)
        return Message(safe, MessageType.TOOL, name=name, tool_call_id=call_id)

    def _prompt(
        self,
        messages: Sequence[Message],
        rollout: Rollout,
        tools: Sequence[ToolSchema],
        *,
        generation: bool,
    ) -> Prompt:
        entered = _last_entered(rollout)
        if entered is None:
            if rollout.segments:
                raise ValueError("the ledger holds tokens but no MODEL message")
            return _context(None, 0, self.codec.encode(self._text(messages, tools, generation)))
        last = len(rollout.segments) - 1
        length = len(rollout.segments[last])
        start, end = self._block(messages, entered)
        if end == len(messages) and end > entered + 1:
            results = "".join(self._piece(m) for m in messages[entered + 1 :])
            return _context(last, length, self.codec.encode(results))
        located = self._locate(messages, (start, end), tools, generation=generation)
        said = self._entered_text(rollout, start)
        if located is None or said is None or _squash(located.said) != _squash(said):
            return self._fork(messages, rollout, tools, generation=generation)
        after = located.after
        ended_by = rollout.segments[last].token_ids[-1:]
        if ended_by and ended_by[0] in self.codec.stop_token_ids:
            after = after.removeprefix(self.codec.decode(ended_by))
        return _context(last, length, self.codec.encode(after))

    def _fork(
        self,
        messages: Sequence[Message],
        rollout: Rollout,
        tools: Sequence[ToolSchema],
        *,
        generation: bool,
    ) -> Prompt:
        """Branch off after the last turn boundary up to which the new text is unchanged."""
        text = self._text(messages, tools, generation)
        last = len(rollout.segments) - 1
        segment = rollout.segments[last]
        for span in reversed(segment.turns):
            start, _ = self._block(messages, span.message)
            if start != span.message:
                continue
            before = self._text(messages[:start], tools, True)
            if text.startswith(before):
                ids = self.codec.encode(text[len(before) :])
                return _context(last, segment.prefix_len + span.start, ids)
        ids = self.codec.encode(text)
        shared = _common_prefix(rollout.full_token_ids(last), ids)
        return _context(last, shared, ids[shared:])

    def _target(self, messages: Sequence[Message], index: int, tools: Sequence[ToolSchema]) -> str:
        """The text that the policy should have said for an unsampled message, as its template
        writes it (with an empty reasoning block, say)."""
        start, end = self._block(messages, index)
        piece = self._piece(messages[index])
        if index > start:
            return piece
        following = next(
            (i for i in range(end, len(messages)) if messages[i].type is MessageType.MODEL),
            len(messages),
        )
        located = None
        if following > end:
            located = self._locate(messages[:following], (start, end), tools, generation=True)
        reasoning = _squash(messages[index].reasoning or "")
        if located is None or reasoning not in _squash(located.said):
            located = self._locate(messages[:end], (start, end), tools, generation=False)
        if located is None:
            return piece
        whole = "".join(self._piece(m) for m in messages[start:end])
        if end == start + 1:
            return located.said
        if located.said.endswith(whole):
            return located.said[: -len(whole)] + piece
        return piece

    def _locate(
        self,
        messages: Sequence[Message],
        block: tuple[int, int],
        tools: Sequence[ToolSchema],
        *,
        generation: bool,
    ) -> _Located | None:
        """Find a block in the rendered conversation; None when the text before it is no longer
        what the policy was shown, or the template drops it."""
        start, end = block
        before = self._text(messages[:start], tools, True)
        joined = self._join(messages[start:end])
        marked = replace(joined, content=joined.content + _SENTINEL)
        view = [*self._view(messages[:start]), marked, *self._view(messages[end:])]
        text = self.template.text(view, self._schemas(tools), generation=generation)
        at = text.find(_SENTINEL)
        if at < 0 or not text.startswith(before):
            return None
        stop = at + len(_SENTINEL)
        if marked.tool_calls and marked.turn is None:
            stop = text.find(self._turn_end, stop) if self._turn_end else -1
            if stop < 0:
                return None
        return _Located(text[len(before) : stop].replace(_SENTINEL, ""), text[stop:])

    def _entered_text(self, rollout: Rollout, block_start: int) -> str | None:
        """What the ledger holds of the block that begins with a message; None when a fork cut it."""
        segment = rollout.segments[-1]
        for span in segment.turns:
            if span.message == block_start:
                return self.codec.said(segment.token_ids[span.start :])
        return None

    def _text(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], generation: bool
    ) -> str:
        return self.template.text(
            self._view(messages), self._schemas(tools), generation=generation
        )

    def _schemas(self, tools: Sequence[ToolSchema]) -> Sequence[ToolSchema]:
        return () if self.tool_format is None or self._inline else tools

    def _view(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation as the template sees it: one message a block."""
        if not self._inline:
            return list(messages)
        view: list[Message] = []
        index = 0
        while index < len(messages):
            if messages[index].type is MessageType.MODEL:
                start, index = self._block(messages, index)
                view.append(self._join(messages[start:index]))
            else:
                view.append(messages[index])
                index += 1
        return view

    def _join(self, block: Sequence[Message]) -> Message:
        first = block[0]
        if not self._inline:
            return first
        return replace(first, content="".join(self._piece(m) for m in block), tool_calls=())

    def _piece(self, message: Message) -> str:
        """One message's share of an inline block."""
        if message.type is MessageType.TOOL:
            assert self.tool_format is not None
            return self.tool_format.render_result(message.content)
        if not self._inline or message.turn is not None or not message.tool_calls:
            return message.content
        assert self.tool_format is not None
        calls = (self.tool_format.render_call(c) for c in message.tool_calls)
        return message.content + "".join(calls)

    def _block(self, messages: Sequence[Message], index: int) -> tuple[int, int]:
        """[start, end) of the block that MODEL message `index` belongs to."""
        if not self._inline:
            return index, index + 1

        def continues(i: int) -> bool:
            previous, current = messages[i - 1].type, messages[i].type
            if current is MessageType.TOOL:
                return previous in (MessageType.MODEL, MessageType.TOOL)
            return current is MessageType.MODEL and previous is MessageType.TOOL

        start = index
        while start > 0 and continues(start):
            start -= 1
        end = index + 1
        while end < len(messages) and continues(end):
            end += 1
        return start, end

    def _end_token(self) -> list[int]:
        first = self.codec.encode(self._turn_end)[:1]
        return list(first) if first and first[0] in self.codec.stop_token_ids else []

    def _probe_turn_end(self) -> str:
        """What the template writes after an assistant's words."""
        question = Message("x", MessageType.MESSAGE)
        answer = Message(_SENTINEL, MessageType.MODEL)
        text = self.template.text([question, answer], (), generation=False)
        return text.partition(_SENTINEL)[2]


def _last_entered(rollout: Rollout) -> int | None:
    for segment in reversed(rollout.segments):
        if segment.turns:
            return segment.turns[-1].message
    return None


def _context(parent: int | None, prefix_len: int, token_ids: Sequence[int]) -> Prompt:
    return Prompt(parent, prefix_len, list(token_ids), [int(Source.CONTEXT)] * len(token_ids))


def _squash(text: str) -> str:
    return "".join(text.split())


def _common_prefix(a: array[int], b: Sequence[int]) -> int:
    shared = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        shared += 1
    return shared


def prompt_token_ids(rollout: Rollout, prompt: Prompt) -> list[int]:
    """Everything that the engine is given for a prompt, [T]."""
    if prompt.parent is None:
        return prompt.token_ids
    shared = rollout.full_token_ids(prompt.parent)[: prompt.prefix_len]
    return [*shared, *prompt.token_ids]


__all__ = ["Renderer", "make_template", "prompt_token_ids"]
