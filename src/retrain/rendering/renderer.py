"""The renderer: what the policy is about to see, as an extension or a fork of what it saw.

The policy's own words are not rendered again while they stand in the sequence: the template is
asked only for what comes before, between and after them. To find those places, the conversation
is rendered with a sentinel at the end of the policy's words. Where the template has changed its
mind about earlier text (it strips reasoning, say), the prompt is an explicit fork.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from retrain.rendering.formats import ToolFormat
from retrain.rendering.ledger import (
    Ledger,
    common_prefix,
    contains_words,
    context,
    last_entered,
    same_words,
)
from retrain.rendering.openings import Openings
from retrain.rendering.targets import THINK, share, thought
from retrain.rendering.templates import ChatTemplate, PlainTemplate, Template, ToolSchema
from retrain.rendering.tokens import Codec
from retrain.types import Message, MessageType, Prompt, Rollout, Source

_SENTINELS = ("\ue000\ue001\ue000", "\ue002\ue003\ue002", "\ue004\ue005\ue004")
"""Texts that mark a place; the first one that the conversation itself does not hold is used."""


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
    """A rendered conversation, divided where a message of the policy ends."""

    until: str
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
        self._openings = Openings()
        self._turn_end = self._probe_turn_end()
        first = codec.encode_after(self._turn_end)[:1]
        if first and codec.decode(first) in codec.special_tokens:
            codec.stop_token_ids |= {first[0]}

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a generation."""
        return self.tool_format.stop if self.tool_format else ()

    @property
    def end_token(self) -> list[int]:
        """The token by which the template ends the policy's turn; empty where it is none."""
        first = self.codec.encode_after(self._turn_end)[:1]
        return list(first) if first and first[0] in self.codec.stop_token_ids else []

    def prompt(self, rollout: Rollout, tools: Sequence[ToolSchema] = ()) -> Prompt:
        """The policy's next prompt: all that the ledger does not hold yet, and what the template
        puts before the policy's next words.

        MODEL messages that no engine sampled become context; `enter` makes them targets.
        """
        return self._prompt(rollout.messages, rollout, tools, generation=True)

    def enter(
        self, rollout: Rollout, tools: Sequence[ToolSchema] = (), *, close: bool = True
    ) -> None:
        """Bring the ledger up to date, with MODEL messages that no engine sampled as targets.

        `close` also enters what comes after the last of them, which nothing trains on.
        """
        messages = rollout.messages
        entered = last_entered(rollout)
        for index in rollout.model_messages:
            if entered is not None and index <= entered:
                continue
            prompt = self._prompt(messages[:index], rollout, tools, generation=True)
            target = list(self.codec.encode_after(self._target(messages, index, tools)))
            if self._block(messages, index)[1] == index + 1:
                target += self.end_token
            start = len(prompt.token_ids)
            rollout.enter_prompt(
                replace(
                    prompt,
                    token_ids=prompt.token_ids + target,
                    sources=prompt.sources + [int(Source.TARGET)] * len(target),
                    spans=((index, start, start + len(target)),),
                )
            )
        if close and messages:
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
        if not rollout.segments:
            ids = self._openings.get(
                messages,
                tools,
                generation,
                lambda: self.codec.encode(self._text(messages, tools, generation)),
            )
            return context(None, 0, ids)
        ledger = Ledger.of(rollout, self.codec)
        extension = self._extension(messages, ledger, tools, generation)
        if extension is None:
            return self._fork(messages, rollout, ledger, tools, generation)
        length, text = extension
        return context(len(rollout.segments) - 1, length, self.codec.encode_after(text))

    def _extension(
        self,
        messages: Sequence[Message],
        ledger: Ledger,
        tools: Sequence[ToolSchema],
        generation: bool,
    ) -> tuple[int, str] | None:
        """How many tokens of the ledger stand, and the text that follows them; None when the
        conversation now reads differently from what the policy was shown."""
        last = ledger.last
        if last is None:
            after = self._text(messages, tools, generation)
            end = 0
        else:
            located = self._locate(messages, last.message, tools, generation)
            shown = ledger.text_before(last, self.codec) + ledger.said(last, self.codec)
            if located is None or not same_words(located.until, shown):
                return None
            after, end = located.after, last.end
        if end > 0 and ledger.token_ids[end - 1] in self.codec.stop_token_ids:
            ended_by = self.codec.decode(ledger.token_ids[end - 1 : end])
            if after and not after.startswith(ended_by):
                return end - 1, after
            after = after.removeprefix(ended_by)
        written = self.codec.decode(ledger.token_ids[end:])
        if not after.startswith(written):
            return None
        return len(ledger.token_ids), after[len(written) :]

    def _fork(
        self,
        messages: Sequence[Message],
        rollout: Rollout,
        ledger: Ledger,
        tools: Sequence[ToolSchema],
        generation: bool,
    ) -> Prompt:
        """Branch off at the last turn up to which the policy was shown the same; without one,
        at the first token that differs."""
        text = self._text(messages, tools, generation)
        segment = len(rollout.segments) - 1
        for standing in reversed(ledger.standing):
            if self._block(messages, standing.message)[0] != standing.message:
                continue
            before = self._text(messages[: standing.message], tools, True)
            if text.startswith(before) and same_words(
                before, ledger.text_before(standing, self.codec)
            ):
                ids = self.codec.encode_after(text[len(before) :])
                return context(segment, standing.start, ids)
        ids = self.codec.encode(text)
        shared = common_prefix(ledger.token_ids, ids)
        return context(segment, shared, ids[shared:])

    def _target(self, messages: Sequence[Message], index: int, tools: Sequence[ToolSchema]) -> str:
        """The text that the policy should have said for an unsampled message, as its template
        writes it (with an empty reasoning block, say).

        Reasoning that the template leaves out is written as `<think>...</think>` before the
        words; the next prompt, which lacks it, is then a fork.
        """
        start, end = self._block(messages, index)
        pieces = [self._piece(m, tools) for m in messages[start:end]]
        before = self._text(messages[:start], tools, True)
        said = self._written(messages, (start, end), before, tools)
        if said is None:
            said = "".join(pieces)
        words = share(said, pieces, index - start)
        reasoning = (messages[index].reasoning or "").strip()
        if index == start and before.rstrip().endswith(THINK):
            return words if "</think>" in words else f"{reasoning}\n</think>\n\n{words}"
        if reasoning and not self._writes_reasoning(messages[:end], start, index, tools):
            return thought(reasoning) + words
        return words

    def _writes_reasoning(
        self, messages: Sequence[Message], start: int, index: int, tools: Sequence[ToolSchema]
    ) -> bool:
        """Whether the template shows a message's reasoning; of a block, at most the first's."""
        if index > start:
            return False
        without = [*messages[:index], replace(messages[index], reasoning=None)]
        without += messages[index + 1 :]
        text = self._text(messages, tools, False)
        return text != self._text(without, tools, False) and contains_words(
            text, messages[index].reasoning or ""
        )

    def _written(
        self,
        messages: Sequence[Message],
        block: tuple[int, int],
        before: str,
        tools: Sequence[ToolSchema],
    ) -> str | None:
        """A block's words as the template writes them: as the conversation goes on, unless that
        loses its reasoning; None when the template rewrites the text before it."""
        start, end = block
        text = self._text(messages[:end], tools, False)
        if not text.startswith(before) or not text.endswith(self._turn_end):
            return None
        said = text[len(before) : len(text) - len(self._turn_end)]
        models = (i for i in range(end, len(messages)) if messages[i].type is MessageType.MODEL)
        following = next(models, len(messages))
        if following == end or messages[start].reasoning:
            return said
        text = self._text(messages[:following], tools, True)
        if text.startswith(before + said):
            return said
        located = self._locate(messages[:following], end - 1, tools, generation=True)
        if located is None or not text.endswith(located.after) or not text.startswith(before):
            return said
        return text[len(before) : len(text) - len(located.after)]

    def _locate(
        self,
        messages: Sequence[Message],
        index: int,
        tools: Sequence[ToolSchema],
        generation: bool,
    ) -> _Located | None:
        """Find the end of a message's words in the rendered conversation; None when the template
        drops them or writes them twice."""
        start, end = self._block(messages, index)
        until = "".join(self._piece(m, tools) for m in messages[start : index + 1])
        after = "".join(self._piece(m, tools) for m in messages[index + 1 : end])
        if generation and self._open_block(messages) == start:
            return _Located(self._text(messages[:start], tools, True) + until, after)
        joined = self._join(messages[start:end], tools)
        for sentinel in _SENTINELS:
            marked = replace(joined, content=until + sentinel + after)
            view = [
                *self._view(messages[:start], tools),
                marked,
                *self._view(messages[end:], tools),
            ]
            text = self.template.text(view, self._schemas(tools), generation=generation)
            if text.count(sentinel) == 1:
                break
        else:
            return None
        at = text.index(sentinel)
        text = text.replace(sentinel, "")
        if marked.tool_calls and marked.turn is None:
            at = text.find(self._turn_end, at) if self._turn_end else -1
            if at < 0:
                return None
        return _Located(text[:at], text[at:])

    def _text(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], generation: bool
    ) -> str:
        start = self._open_block(messages) if generation else None
        if start is not None:
            block = "".join(self._piece(m, tools) for m in messages[start:])
            return self._text(messages[:start], tools, True) + block
        return self.template.text(
            self._view(messages, tools), self._schemas(tools), generation=generation
        )

    def _schemas(self, tools: Sequence[ToolSchema]) -> Sequence[ToolSchema]:
        return () if self.tool_format is None or self._inline else tools

    def _view(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[Message]:
        """The conversation as the template sees it: one message a block."""
        if not self._inline:
            return list(messages)
        view: list[Message] = []
        index = 0
        while index < len(messages):
            if messages[index].type is MessageType.MODEL:
                start, index = self._block(messages, index)
                view.append(self._join(messages[start:index], tools))
            else:
                view.append(messages[index])
                index += 1
        return view

    def _join(self, block: Sequence[Message], tools: Sequence[ToolSchema]) -> Message:
        first = block[0]
        if not self._inline:
            return first
        return replace(first, content="".join(self._piece(m, tools) for m in block), tool_calls=())

    def _piece(self, message: Message, tools: Sequence[ToolSchema]) -> str:
        """One message's share of an inline block."""
        if message.type is MessageType.TOOL:
            assert self.tool_format is not None
            return self.tool_format.render_result(message.content)
        if not self._inline or message.turn is not None or not message.tool_calls:
            return message.content
        assert self.tool_format is not None
        calls = (self.tool_format.render_call(c, tools) for c in message.tool_calls)
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

    def _open_block(self, messages: Sequence[Message]) -> int | None:
        """Where the block starts that the policy is to go on with, after an inline result."""
        if not self._inline or not messages or messages[-1].type is not MessageType.TOOL:
            return None
        start, _ = self._block(messages, len(messages) - 1)
        return start if messages[start].type is MessageType.MODEL else None

    def _probe_turn_end(self) -> str:
        """What the template writes after an assistant's words."""
        question = Message("x", MessageType.MESSAGE)
        answer = Message(_SENTINELS[0], MessageType.MODEL)
        text = self.template.text([question, answer], (), generation=False)
        return text.partition(_SENTINELS[0])[2]


__all__ = ["Renderer", "make_template"]
