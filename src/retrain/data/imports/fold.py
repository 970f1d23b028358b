"""The calls of one conversation, put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from retrain.data.imports.base import Entry, Fault, Logged, chain
from retrain.data.messages import messages_from_dicts
from retrain.data.tasks import fingerprint
from retrain.data.traces import Trace
from retrain.types import Message, MessageType, UserError


@dataclass
class _Parsed:
    entry: Entry
    messages: tuple[Message, ...]
    keys: tuple[str, ...]


def fold(entries: Iterable[Entry | Fault]) -> Iterator[Logged | Fault]:
    """Conversations: an entry that another one of its group extends is part of that one.

    Of entries that go apart (a retry, a sub-agent, an edited history) each is a conversation. A
    message of an assistant trains where a call of the group is known to have returned it, and
    reads as that call returned it; what was only ever an input does not.
    """
    groups: dict[str, list[_Parsed]] = {}
    for entry in entries:
        if isinstance(entry, Fault):
            yield entry
            continue
        try:
            messages = messages_from_dicts(entry.messages, place=entry.place)
        except UserError as error:
            yield Fault("malformed", entry.place, error.cause)
            continue
        groups.setdefault(entry.group, []).append(_Parsed(entry, messages, chain(messages)))
    for group in groups.values():
        yield from _conversations(group)


def _conversations(group: list[_Parsed]) -> Iterator[Logged | Fault]:
    returned: dict[str, Message] = {}
    cut: set[str] = set()
    for call in group:
        for index in call.entry.made or ():
            returned.setdefault(call.keys[index], call.messages[index])
        cut |= {call.keys[index] for index in call.entry.cut}
    extended = {key for call in group for key in call.keys[:-1]}
    calls: dict[str, list[_Parsed]] = {}
    for call in group:
        calls.setdefault(call.keys[-1] if call.keys else "", []).append(call)
    counted: set[int] = set()
    for last, same in calls.items():
        if last in extended:
            continue
        before = [c for key in same[0].keys[:-1] for c in calls.get(key, ())]
        parts = [*before, *same]
        new = sum(len(c.entry.made or (0,)) for c in parts if id(c) not in counted)
        counted.update(map(id, parts))
        yield _conversation(same[0], parts, new, returned, cut)


def _conversation(
    last: _Parsed, calls: list[_Parsed], new: int, returned: dict[str, Message], cut: set[str]
) -> Logged | Fault:
    """`last` is one of `calls`, which extends or equals the others."""
    said = list(last.messages)
    if last.entry.made is not None:
        for index, message in enumerate(said):
            if message.type is MessageType.MODEL or message.role == "assistant":
                found = returned.get(last.keys[index])
                said[index] = found or replace(message, type=MessageType.MESSAGE, role="assistant")
    own = [i for i, m in enumerate(said) if m.type is MessageType.MODEL]
    if not own:
        return Fault("no_model_message", last.entry.place, "no message that a model said")
    if not all(said[i].content.strip() or said[i].tool_calls or said[i].reasoning for i in own):
        return Fault("malformed", last.entry.place, "an assistant's message says nothing")
    metadata: dict[str, Any] = {}
    for call in calls:
        metadata |= call.entry.metadata
    rewards = [c.entry.reward for c in calls if c.entry.reward is not None]
    tools = next((c.entry.tools for c in reversed(calls) if c.entry.tools), ())
    messages = tuple(said)
    return Logged(
        trace=Trace(fingerprint(messages), messages, tools, last.entry.place),
        keys=last.keys,
        group=last.entry.group,
        truncated=any(last.keys[i] in cut for i in own),
        calls=new,
        reward=rewards[-1] if rewards else None,
        metadata=metadata,
    )
