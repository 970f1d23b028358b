"""The gateway's own records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from retrain.data.imports.base import Entry, Fault, Malformed, number
from retrain.data.imports.exchange import is_cut
from retrain.data.imports.normalise import openai_messages, openai_tools


@dataclass
class _Conversation:
    session: str
    place: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    tools: tuple[dict[str, Any], ...] = ()
    model: str | None = None
    fault: str | None = None
    """An exchange of it could not be read, so what follows it is not known either."""


class GatewayReader:
    """Lines of `exchange`, each with what its conversation gained and the reply, and of `session`,
    with a reward and metadata for all conversations of one."""

    def __init__(self) -> None:
        self._conversations: list[_Conversation] = []
        self._open: dict[tuple[str, str], _Conversation] = {}
        self._sessions: dict[str, dict[str, Any]] = {}
        self._rewards: dict[str, float] = {}

    def feed(self, value: Any, place: str) -> None:
        if not isinstance(value, Mapping) or not isinstance(value.get("session"), str):
            raise Malformed("no record of the gateway: it names no session")
        session = value["session"]
        if value.get("type") == "session":
            self._sessions.setdefault(session, {}).update(value.get("metadata") or {})
            if (reward := number(value.get("reward"))) is not None:
                self._rewards[session] = reward
            return
        if value.get("type") != "exchange" or not isinstance(value.get("conversation"), str):
            raise Malformed(f"no record of the gateway: type {value.get('type')!r}")
        key = session, value["conversation"]
        if key not in self._open or _begins_anew(self._open[key], value.get("messages")):
            self._open[key] = _Conversation(session, place)
            self._conversations.append(self._open[key])
        conversation = self._open[key]
        try:
            _gain(conversation, value)
        except Malformed as error:
            conversation.fault = conversation.fault or f"{place}: {error}"
            raise

    def entries(self) -> Iterator[Entry | Fault]:
        for conversation in self._conversations:
            if not conversation.made:
                continue
            end = conversation.made[-1] + 1
            session = conversation.session
            about = {"session": session, "model": conversation.model}
            yield Entry(
                group=f"session {session}",
                place=conversation.place,
                messages=conversation.messages[:end],
                made=frozenset(conversation.made),
                cut=frozenset(conversation.cut),
                tools=conversation.tools,
                reward=self._rewards.get(session),
                metadata=about | self._sessions.get(session, {}),
            )


def _begins_anew(conversation: _Conversation, messages: Any) -> bool:
    """A gateway that was started again, or a session that was opened again, counts its
    conversations from the first: what comes with a whole opening is not a gain."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], Mapping):
        return False
    if messages[0].get("role") in ("system", "developer"):
        return True
    before = conversation.messages[:1]
    try:
        return openai_messages(messages[:1])[:1] == before
    except Malformed:
        return False


def _gain(conversation: _Conversation, value: Mapping[str, Any]) -> None:
    """
    Raises:
        Malformed: the exchange, or one before it, cannot be read.
    """
    if conversation.fault is not None:
        raise Malformed(f"it goes on from an exchange that cannot be read ({conversation.fault})")
    gained = openai_messages(value.get("messages") or [])
    if not isinstance(value.get("reply"), Mapping):
        raise Malformed("the exchange has no reply", "no_model_message")
    [reply] = openai_messages([{"role": "assistant", **value["reply"]}])
    conversation.messages += gained
    conversation.made.append(len(conversation.messages))
    if is_cut(value):
        conversation.cut.append(len(conversation.messages))
    conversation.messages.append(reply)
    if value.get("tools") is not None:
        conversation.tools = openai_tools(value["tools"])
    conversation.model = value.get("model") or conversation.model
