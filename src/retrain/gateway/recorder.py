"""A session that the policy answers: a caller's chat requests as turns of a rollout.

A caller keeps the conversation itself and sends all of it with every request. What it sends is
held against what it was answered, message by message: while it only appends, the policy goes on
from the very tokens that it sampled. A history that differs, or one that stops earlier, begins
another *branch*, which goes on from the last answer that still stands. The ledger forks there.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from retrain.engines.base import Bounds
from retrain.gateway.answers import not_followed, reply_of, usable_calls
from retrain.gateway.ask import Ask, Reply, RequestRefused, Wire, text_of
from retrain.gateway.branch import Answer, Branch, Heard, enter
from retrain.gateway.history import Key, key_of, plain_arguments, said_key
from retrain.rendering import Renderer, ToolSchema
from retrain.types import (
    InfrastructureError,
    Message,
    MessageType,
    Rollout,
    Task,
    ToolCall,
    Turn,
    UserError,
)


@runtime_checkable
class Policy(Protocol):
    """Who answers, turn by turn."""

    def start(self, task: Task) -> Rollout:
        """An empty rollout of this policy for a task."""
        ...

    async def act_within(
        self, rollout: Rollout, tools: Sequence[ToolSchema], bounds: Bounds
    ) -> Message:
        """Sample the next MODEL message and append it to the rollout.

        Raises:
            InfrastructureError: the engine failed, or the attempt is over.
        """
        ...


class Recorder:
    """Answers one caller by the policy, and keeps what it sampled.

    Requests that overlap are answered one after the other: they share one place in the engine.

    Args:
        policy: its sampling settings are its own, whatever a request says; it follows a request's
            stop strings and a lower token limit.
        task: what the seeds of its requests are made from.
        renderer: writes results of tools so that they cannot forge the policy's own words.
        settings: how the policy samples, by the names of OpenAI's chat body; of those that a
            request wants otherwise its answer says so.
        describe_tools: with a tool format that the chat template knows nothing of, the system
            message is told of the request's tools.
        lock: held while the policy answers; recorders of one rollout share it.
        stirred: set by a reward and by a failure.
        number: of the recorder among those, for seeds and ids of calls.
    """

    def __init__(
        self,
        policy: Policy,
        task: Task,
        renderer: Renderer,
        *,
        settings: Mapping[str, Any] | None = None,
        describe_tools: bool = True,
        lock: asyncio.Lock | None = None,
        number: int = 0,
        stirred: asyncio.Event | None = None,
    ) -> None:
        self._policy = policy
        self._task = task
        self._renderer = renderer
        self._settings = settings or {}
        self._describe = describe_tools
        self._lock = lock or asyncio.Lock()
        self._number = number
        self._branches: list[Branch] = []
        self._by_reply: dict[str, list[Answer]] = {}
        self.turns = 0
        """MODEL messages sampled."""
        self.requests = 0
        self.last: Turn | None = None
        """Of what was sampled last."""
        self.failed: Exception | None = None
        """The first failure that is not the caller's own business."""
        self.reward: float | None = None
        self.metadata: dict[str, Any] = {}
        self.stirred = stirred or asyncio.Event()

    @property
    def forks(self) -> int:
        """Conversations but the first."""
        return max(0, len(self._branches) - 1)

    async def answer(self, ask: Ask) -> Reply:
        """See `Session`.

        Raises:
            RequestRefused: it asks for what the policy cannot give, the context is full, or the
                engine failed (then `failed` has it too).
        """
        self.requests += 1
        keys = [key_of(message) for message in ask.messages]
        try:
            _check(ask, self._renderer)
            async with self._lock:
                reply = self._unheard(keys, ask) or await self._sample(keys, ask)
                if ask.gone():  # known before the next request is looked at
                    self.undelivered(reply)
                return reply
        except (InfrastructureError, UserError) as error:
            self._fail(error)
            raise _told(error) from error
        except RequestRefused:
            raise
        except Exception as error:
            self._fail(error)
            raise

    def undelivered(self, reply: Reply) -> None:
        for answer in self._by_reply.get(reply.id, ()):
            answer.delivered = False

    def note(self, reward: float | None, metadata: Mapping[str, Any]) -> None:
        """
        Raises:
            RequestRefused: the reward is not a finite number.
        """
        if reward is not None and not math.isfinite(reward):
            raise RequestRefused("reward is not a finite number", param="reward")
        self.metadata |= metadata
        if reward is not None:
            self.reward = reward
            self.stirred.set()

    def enter(self, rollout: Rollout) -> None:
        """Put all that was sampled, and that its caller got, into a rollout."""
        enter(self._branches, rollout)

    def _fail(self, error: Exception) -> None:
        self.failed = self.failed or error
        self.stirred.set()

    def _unheard(self, keys: Sequence[Key], ask: Ask) -> Reply | None:
        """What the same request was answered before, where that did not reach its caller."""
        for branch in reversed(self._branches):
            count = len(keys)
            if len(branch.heard) <= count or branch.shared(keys) < count:
                continue
            answer = branch.heard[count].answer
            if answer is not None and (ask.retried or not answer.delivered):
                for each in self._by_reply[answer.reply.id]:
                    each.delivered = True
                return answer.reply
        return None

    async def _sample(self, keys: Sequence[Key], ask: Ask) -> Reply:
        answers = []
        for index in range(ask.n):
            branch = self._branch(keys, anew=index > 0)
            answers.append(await self._say(branch, keys, ask))
        choices = tuple(answer.reply.choices[0] for answer in answers)
        first = answers[0].reply
        reply = replace(
            first,
            choices=choices,
            completion_tokens=sum(answer.reply.completion_tokens for answer in answers),
        )
        for answer in answers:
            answer.reply = reply
        self._by_reply[reply.id] = answers
        return reply

    def _branch(self, keys: Sequence[Key], *, anew: bool) -> Branch:
        """The conversation that these messages go on with; else a fork of the one that they share
        most with, or a new one.

        Args:
            anew: do not go on with one.
        """
        best, most = None, 0
        for branch in self._branches:
            count = branch.shared(keys)
            whole = count == len(branch.heard)
            if whole and len(keys) > count and not anew:
                _heard_again(branch)
                return branch
            if count > most:
                best, most = branch, count
        made = None if best is None else best.forked(most)
        if made is None:
            made = Branch(self._policy.start(self._task))
        else:
            assert best is not None
            _heard_again(best, upto=most)
        place = f"{self._number}.{len(self._branches)}"
        if place != "0.0":  # or it would draw the numbers of the first
            made.view.task = replace(self._task, id=f"{self._task.id}\0{place}")
        self._branches.append(made)
        return made

    async def _say(self, branch: Branch, keys: Sequence[Key], ask: Ask) -> Answer:
        known = len(branch.heard)
        before = len(branch.view.messages)
        for key, wire in zip(keys[known:], ask.messages[known:], strict=True):
            self._hear(branch, wire, ask.tools)
            branch.heard.append(Heard((key,), len(branch.view.messages)))
        context = tuple(branch.view.messages[before:])
        bounds = Bounds(ask.stop, ask.max_tokens)
        message = await self._policy.act_within(branch.view, ask.tools, bounds)
        turn = message.turn
        assert turn is not None
        self.last = turn
        if not turn.token_ids:
            raise RequestRefused(
                "the conversation is as long as the context limit allows",
                code="context_length_exceeded",
                param="messages",
            )
        self.turns += 1
        calls = usable_calls(message, ask)
        ids = [f"call_{self._number}_{self.turns}_{index}" for index in range(len(calls))]
        branch.calls |= dict(zip(ids, calls, strict=True))
        reply = reply_of(message, dict(zip(ids, calls, strict=True)), ask, self._renderer)
        reply = replace(reply, not_enforced=not_followed(ask, bool(calls), self._settings))
        answer = Answer(context, message, reply)
        branch.answers.append(answer)
        said = {
            key_of(reply.choices[0].message),
            said_key(self._renderer.codec.said(turn.token_ids)),
        }
        branch.heard.append(Heard(said, len(branch.view.messages), answer))
        return answer

    def _hear(self, branch: Branch, wire: Wire, tools: Sequence[ToolSchema]) -> None:
        """Append to the view what a message of the caller says."""
        role, text = str(wire.get("role")), text_of(wire.get("content"))
        view, form = branch.view, self._renderer.tool_format
        told = ""
        if form is not None and tools and self._describe and not branch.described:
            told = form.describe(tools)
            branch.described = True
        if role in ("system", "developer"):
            words = f"{text}\n\n{told}" if told else text
            view.add_messages(Message(words, MessageType.SYSTEM))
            return
        if told:
            view.add_messages(Message(told, MessageType.SYSTEM))
        if role == "tool":
            self._hear_result(branch, wire, text)
        elif role == "assistant":
            calls = tuple(_call(call) for call in wire.get("tool_calls") or ())
            branch.calls |= {call.id: call for call in calls}
            if form is not None and form.inline:
                text += "".join(form.render_call(call, tools) for call in calls)
                calls = ()
            view.add_messages(
                Message(text, MessageType.MESSAGE, role="assistant", tool_calls=calls)
            )
        else:
            view.add_messages(Message(text, MessageType.MESSAGE))

    def _hear_result(self, branch: Branch, wire: Wire, text: str) -> None:
        """A tool's result; with an inline format, one that follows words which the policy did not
        sample goes into those."""
        view, form = branch.view, self._renderer.tool_format
        call_id = str(wire.get("tool_call_id", ""))
        call = branch.calls.get(call_id, ToolCall(str(wire.get("name") or ""), {}, call_id))
        message = self._renderer.tool_message(text, call.name, call.id)
        before = view.messages[-1] if view.messages else None
        if (
            form is not None
            and form.inline
            and before is not None
            and before.type is MessageType.MESSAGE
            and before.role == "assistant"
        ):
            joined = before.content + form.render_result(message.content)
            view.messages[-1] = replace(before, content=joined)
            return
        view.add_messages(message)


def _heard_again(branch: Branch, upto: int | None = None) -> None:
    """The caller has what it sends."""
    for heard in branch.heard[:upto]:
        if heard.answer is not None:
            heard.answer.delivered = True


def _check(ask: Ask, renderer: Renderer) -> None:
    """
    Raises:
        RequestRefused: it asks for what the policy cannot give.
        UserError: it has tools, and the config does not say how to call them.
    """
    if ask.tools and renderer.tool_format is None:
        raise UserError(
            "the agent has tools, and environment.tool_format does not say how the model calls "
            "them",
            "Set environment.tool_format.",
        )
    form = ask.sampling.get("response_format")
    if isinstance(form, Mapping) and form.get("type") not in (None, "text"):
        raise RequestRefused(
            f"response_format {form.get('type')!r} is not supported: this engine samples freely, "
            "so that what it samples can train; ask for JSON in words, or by a tool",
            code="unsupported_value",
            param="response_format",
        )
    if ask.sampling.get("top_logprobs"):
        raise RequestRefused(
            "top_logprobs is not supported: the engine gives those of sampled tokens only",
            code="unsupported_value",
            param="top_logprobs",
        )


def _call(call: Mapping[str, Any]) -> ToolCall:
    function = call["function"]
    arguments = plain_arguments(function.get("arguments") or "")
    given = arguments if isinstance(arguments, Mapping) else {}
    return ToolCall(str(function["name"]), given, str(call.get("id") or ""))


def _told(error: InfrastructureError | UserError) -> RequestRefused:
    if isinstance(error, InfrastructureError):
        return RequestRefused(f"the engine failed: {error}", status=503)
    return RequestRefused(str(error))
