"""A session that the policy answers: a caller's chat requests as turns of a rollout.

A caller keeps the conversation itself and sends all of it with every request. What it sends is
held against what it was answered, message by message: while it only appends, the policy goes on
from the very tokens that it sampled. A history that differs, or one that stops earlier, begins
another *branch*, which goes on from the last answer that still stands. The ledger forks there.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from retrain.engines.base import Bounds
from retrain.gateway.answers import not_followed, reply_of, usable_calls
from retrain.gateway.ask import Ask, Reply, RequestRefused, Wire, text_of
from retrain.gateway.branch import Answer, Branch, Heard, enter
from retrain.gateway.history import Key, digests, key_of, plain_arguments, said_key
from retrain.gateway.talk import Talk
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
        self._talk = Talk()
        self._branches: list[Branch] = []
        self._begun = 0
        self._by_reply: dict[str, list[Answer]] = {}
        self._refused: Counter[str] = Counter()
        """Requests that got no answer, by the digest of their messages."""
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
            self._refused[digests(keys)[-1]] += 1
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
        again = ask.retried
        if again and self._refused[(asked := digests(keys)[-1])]:
            self._refused[asked] -= 1
            again = False
        node = self._talk.deepest(keys)
        for answer in reversed(node.answers if node.depth == len(keys) else ()):
            same = answer.asked == _asked(ask) and answer.reply.id in self._by_reply
            if same and (again or not answer.delivered):
                for each in self._by_reply[answer.reply.id]:
                    each.delivered = True
                return answer.reply
        return None

    async def _sample(self, keys: Sequence[Key], ask: Ask) -> Reply:
        answers: list[Answer] = []
        try:
            for index in range(ask.n):
                answers.append(await self._turn(keys, ask, anew=index > 0))
        except BaseException:
            for answer in answers:
                answer.delivered = False
            raise
        reply = replace(
            answers[0].reply,
            choices=tuple(answer.reply.choices[0] for answer in answers),
            completion_tokens=sum(answer.reply.completion_tokens for answer in answers),
        )
        for answer in answers:
            answer.reply = reply
        self._by_reply[reply.id] = answers
        return reply

    async def _turn(self, keys: Sequence[Key], ask: Ask, *, anew: bool) -> Answer:
        """One answer, in the conversation that it goes on with. One that is not given leaves
        nothing behind.

        Args:
            anew: go on with none, but fork.
        """
        branch = self._branch(keys, anew=anew)
        mark = branch.mark()
        try:
            answer, said = await self._say(branch, ask)
        except BaseException:
            branch.rewind(mark)
            raise
        if not branch.answers:
            self._branches.append(branch)
        branch.answers.append(answer)
        self._talk.add(branch, mark.heard, keys, answer, said)
        return answer

    def _branch(self, keys: Sequence[Key], *, anew: bool) -> Branch:
        """The conversation that these messages go on with; else a fork of the one that they share
        most with, or a new one."""
        node = self._talk.deepest(keys)
        if node.branch is not None:
            for heard in node.branch.heard[: node.depth]:  # the caller has what it sends
                if heard.answer is not None:
                    heard.answer.delivered = True
        if node.ends and node.depth < len(keys) and not anew:
            return node.ends[0]
        made = None if node.branch is None else node.branch.forked(node.depth)
        if made is None:
            made = Branch(self._policy.start(self._task), node.branch)
        place = f"{self._number}.{self._begun}"
        self._begun += 1
        if place != "0.0":  # or it would draw the numbers of the first
            made.view.task = replace(self._task, id=f"{self._task.id}\0{place}")
        return made

    async def _say(self, branch: Branch, ask: Ask) -> tuple[Answer, list[Key]]:
        """The branch's next answer, and the keys that it may come back with."""
        before = len(branch.view.messages)
        for wire in ask.messages[len(branch.heard) :]:
            self._hear(branch, wire, ask.tools)
            branch.heard.append(Heard(len(branch.view.messages)))
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
        told = usable_calls(message, ask)
        calls = {f"call_{self._number}_{self.turns}_{n}": call for n, call in enumerate(told)}
        branch.calls |= calls
        reply = reply_of(message, calls, ask, self._renderer)
        reply = replace(reply, not_enforced=not_followed(ask, bool(calls), self._settings))
        answer = Answer(context, message, reply, _asked(ask))
        branch.heard.append(Heard(len(branch.view.messages), answer))
        choice = reply.choices[0]
        words = str(choice.message["content"] or "") + (choice.stopped_by or "")
        whole = self._renderer.codec.said(turn.token_ids)
        keys = [
            key_of(choice.message),
            said_key(whole),
            key_of({**choice.message, "content": words}),
        ]
        return answer, list(dict.fromkeys(keys))

    def _hear(self, branch: Branch, wire: Wire, tools: Sequence[ToolSchema]) -> None:
        """Append to the view what a message of the caller says."""
        role, text = str(wire.get("role")), text_of(wire.get("content"))
        view, form = branch.view, self._renderer.tool_format
        told = ""
        if form is not None and tools and self._describe and branch.described is None:
            told = form.describe(tools)
            branch.described = len(view.messages)
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


def _asked(ask: Ask) -> tuple[Any, ...]:
    """What tells requests apart that have the same messages."""
    limits = ask.n, ask.stop, ask.max_tokens, ask.logprobs
    return (*limits, ask.tools, ask.tool_choice, ask.parallel_tool_calls, dict(ask.sampling))


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
