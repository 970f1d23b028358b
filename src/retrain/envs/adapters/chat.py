"""A foreign harness's chat requests as turns of the policy.

A harness keeps the conversation itself and sends all of it with every request. What it sends is
held against what it was answered: while it only appends, the policy goes on from the very tokens
that it sampled. A history that differs begins another *branch*: what the model said in it is
context, and the ledger forks at the first token that differs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retrain.envs.base import Agent
from retrain.rendering import Renderer, ToolSchema
from retrain.rendering.ledger import common_prefix
from retrain.types import Message, MessageType, Prompt, Rollout, Task, ToolCall, Turn, UserError

Wire = Mapping[str, Any]
"""A message in the OpenAI chat format."""

_TYPES = {
    "system": MessageType.SYSTEM,
    "developer": MessageType.SYSTEM,
    "user": MessageType.MESSAGE,
    "tool": MessageType.TOOL,
}


@dataclass(frozen=True)
class Answer:
    """One MODEL message, and where its branch's ledger holds it."""

    context: tuple[Message, ...]
    """What the conversation gained since the branch's last answer."""
    message: Message
    segment: int


@dataclass
class _Branch:
    """One conversation, with a ledger of its own until all are put together."""

    view: Rollout
    keys: list[str] = field(default_factory=list)
    """Of each message of the view, as the harness sends it."""
    calls: dict[str, ToolCall] = field(default_factory=dict)
    """By the id that the harness knows."""
    answers: list[Answer] = field(default_factory=list)


class ChatRecorder:
    """Answers one harness by an agent, and keeps what it sampled.

    Args:
        agent: the policy.
        task: what the seeds of its requests are made from.
        renderer: writes results of tools so that they cannot forge the policy's own words.
        lock: held while the policy answers; the recorders of one rollout share it.
        number: of the recorder among those, for seeds and ids of calls.
    """

    def __init__(
        self,
        agent: Agent,
        task: Task,
        renderer: Renderer,
        lock: asyncio.Lock | None = None,
        number: int = 0,
    ) -> None:
        self._agent = agent
        self._task = task
        self._renderer = renderer
        self._number = number
        self._branches: list[_Branch] = []
        self._lock = lock or asyncio.Lock()
        self._turns = 0

    @property
    def turns(self) -> int:
        """MODEL messages sampled."""
        return self._turns

    async def answer(
        self, messages: Sequence[Wire], tools: Sequence[ToolSchema] = ()
    ) -> tuple[Wire, Turn]:
        """The policy's next message, in the OpenAI format, and its turn.

        Raises:
            UserError: messages that are not text, or tools without a format to call them in.
            InfrastructureError: the engine failed.
        """
        if tools and self._renderer.tool_format is None:
            raise UserError(
                "the environment has tools, and environment.tool_format does not say how the "
                "model calls them",
                "Set environment.tool_format.",
            )
        async with self._lock:
            keys = [_key(message) for message in messages]
            branch = self._branch(keys)
            context = tuple(self._read(message, branch) for message in messages[len(branch.keys) :])
            branch.view.add_messages(*context)
            message = await self._agent.act(branch.view, tools)
            wire = self._write(message, branch)
            branch.keys = [*keys, _key(wire)]
            segment = len(branch.view.segments) - 1
            branch.answers.append(Answer(context, message, segment))
            self._turns += 1
        assert message.turn is not None
        return wire, message.turn

    def _branch(self, keys: Sequence[str]) -> _Branch:
        """The longest conversation that these messages go on with; else a new one."""
        for branch in sorted(self._branches, key=lambda b: -len(b.keys)):
            if keys[: len(branch.keys)] == branch.keys and len(keys) > len(branch.keys):
                return branch
        place = f"{self._number}.{len(self._branches)}"
        view = self._agent.start(self._task)
        if place != "0.0":  # or it would draw the numbers of the first
            view.task = replace(self._task, id=f"{self._task.id}\0{place}")
        self._branches.append(_Branch(view))
        return self._branches[-1]

    def _read(self, wire: Wire, branch: _Branch) -> Message:
        role, text = str(wire.get("role")), _text(wire)
        if role == "assistant":
            return Message(text, MessageType.MESSAGE, role="assistant")
        if role == "tool":
            call_id = str(wire.get("tool_call_id", ""))
            call = branch.calls.get(call_id, ToolCall(str(wire.get("name") or ""), {}, call_id))
            return self._renderer.tool_message(text, call.name, call.id)
        if role not in _TYPES:
            raise UserError(f"the environment sent a message of role {role!r}", "Mend it.")
        return Message(text, _TYPES[role])

    def _write(self, message: Message, branch: _Branch) -> Wire:
        """Reasoning before `</think>` goes into a field of its own. A call that could not be parsed
        is sent with what is wrong in the place of its arguments: the harness says so."""
        reasoning, closed, content = message.content.partition("</think>")
        wire: dict[str, Any] = {"role": "assistant", "content": message.content}
        if closed:
            wire["content"] = content.lstrip()
            wire["reasoning_content"] = reasoning.strip().removeprefix("<think>").strip()
        calls = []
        for index, call in enumerate(message.tool_calls):
            call_id = f"call_{self._number}_{self._turns}_{index}"
            branch.calls[call_id] = call
            arguments = call.error or json.dumps(dict(call.arguments), ensure_ascii=False)
            function = {"name": call.name, "arguments": arguments}
            calls.append({"id": call_id, "type": "function", "function": function})
        if calls:
            wire["tool_calls"] = calls
        return wire

    def enter(self, rollout: Rollout) -> None:
        """Put every branch into a rollout, one after the other."""
        for branch in self._branches:
            segments: dict[int, int] = {}
            for answer in branch.answers:
                rollout.add_messages(*answer.context)
                turn = answer.message.turn
                assert turn is not None
                prompt = _moved(turn.prompt, segments, rollout)
                moved = replace(turn, prompt=prompt, rollout=rollout.id, place=None)
                rollout.add_messages(replace(answer.message, turn=moved))
                segments[answer.segment] = len(rollout.segments) - 1


def _moved(prompt: Prompt, segments: Mapping[int, int], rollout: Rollout) -> Prompt:
    """A branch's prompt in the ledger of all: what begins a branch forks off the segment that it
    shares most with."""
    if prompt.parent is not None:
        return replace(prompt, parent=segments[prompt.parent])
    parent, shared = None, 0
    for index in range(len(rollout.segments)):
        length = common_prefix(rollout.full_token_ids(index), prompt.token_ids)
        if length > shared:
            parent, shared = index, length
    return Prompt(parent, shared, prompt.token_ids[shared:], prompt.sources[shared:])


def _key(wire: Wire) -> str:
    """What tells a message from another, whichever way it was written down."""
    calls = [
        [call.get("id"), call["function"]["name"], call["function"]["arguments"]]
        for call in wire.get("tool_calls") or ()
        if call.get("function")
    ]
    return json.dumps([wire.get("role"), _text(wire), calls, wire.get("tool_call_id")])


def _text(wire: Wire) -> str:
    """
    Raises:
        UserError: a part of the content is not text.
    """
    content = wire.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if len(texts) < len(content):
        raise UserError(
            "the environment sent a message with a part that is not text",
            "The policy reads text only.",
        )
    return "\n".join(map(str, texts))
