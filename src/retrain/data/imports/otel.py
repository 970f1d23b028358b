"""OpenTelemetry exports of generative AI calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from retrain.data.imports.base import Entry, Fault, Malformed, number
from retrain.data.imports.exchange import Reply, Request, is_cut
from retrain.data.imports.messages import call_entry
from retrain.data.imports.normalise import openai_messages, openai_tools, parsed
from retrain.data.imports.spans import Event, Span, looks_like_spans, nested, read_spans

_NO_CALLS = ("invoke_agent", "create_agent", "execute_tool", "embeddings", "invoke_workflow")
"""Operations that repeat what the calls below them hold, or are none of a model."""

_NO_KINDS = ("AGENT", "CHAIN", "TOOL", "RETRIEVER", "EMBEDDING", "RERANKER", "GUARDRAIL")
"""The same, as OpenInference names them."""

_SESSIONS = ("gen_ai.conversation.id", "session.id")
_MODELS = ("gen_ai.response.model", "gen_ai.request.model", "llm.model_name")
_SCORE = "gen_ai.evaluation.score.value"


class OtelReader:
    """Spans of calls, as OTLP JSON or as the SDK writes them.

    Messages are looked for as the semantic conventions write them (`gen_ai.input.messages`), as
    events (`gen_ai.user.message`, `gen_ai.choice`) on the span or as log records, as OpenLLMetry
    (`gen_ai.prompt.N.*`) and as OpenInference (`llm.input_messages.N.*`). Calls are put together
    by conversation or session, or without one by trace. An evaluation result on any span of
    a trace is the reward of all its calls.
    """

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._events: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
        self._rewards: dict[str, float] = {}

    def feed(self, value: Any, place: str) -> None:
        if not isinstance(value, Mapping) or not looks_like_spans(value):
            raise Malformed("no spans")
        for item in read_spans(value, place):
            if isinstance(item, Event):
                key = item.trace, item.span
                self._events.setdefault(key, []).append((item.name, item.values))
                self._judge(item.trace, item.values)
                continue
            self._spans.append(item)
            for values in (item.attributes, *(values for _, values in item.events)):
                self._judge(item.trace, values)

    def _judge(self, trace: str, values: Mapping[str, Any]) -> None:
        if (score := number(values.get(_SCORE))) is not None:
            self._rewards[trace] = score

    def entries(self) -> Iterator[Entry | Fault]:
        for span in sorted(self._spans, key=lambda span: span.began):
            span.events += self._events.get((span.trace, span.id), [])
            try:
                found = _call(span)
            except Malformed as error:
                yield Fault(error.kind, span.place, str(error))
                continue
            if found is None:
                continue
            attributes = span.attributes
            session = next((attributes[k] for k in _SESSIONS if attributes.get(k)), None)
            group = f"trace {span.trace}" if session is None else f"session {session}"
            about = {"trace": span.trace, "session": session}
            request, replies = found
            for reply in replies:
                entry = call_entry(about, span.place, group, request, reply)
                entry.reward = self._rewards.get(span.trace)
                yield entry


def _call(span: Span) -> tuple[Request, list[Reply]] | None:
    """None for a span that is no call of a model, or does not say what was said.

    Raises:
        Malformed: its messages cannot be read.
    """
    attributes = dict(span.attributes)
    if attributes.get("gen_ai.operation.name") in _NO_CALLS:
        return None
    if str(attributes.get("openinference.span.kind", "")).upper() in _NO_KINDS:
        return None
    for _, values in span.events:  # one event may hold all, under the attributes' names
        attributes |= {k: v for k, v in values.items() if k.startswith("gen_ai.")}
    asked, said = _conventions(attributes)
    if not said:
        asked, said = _from_events(span.events)
    if not said:
        asked, said = _numbered(attributes)
    if not said:
        return None
    model = next((attributes[key] for key in _MODELS if attributes.get(key)), None)
    replies = []
    for item in said:
        row = {**item, "role": "assistant"}
        replies.append(Reply(openai_messages([row]), is_cut(item)))
    return Request(openai_messages(asked), _tools(attributes), model), replies


def _conventions(attributes: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """`gen_ai.input.messages` and `gen_ai.output.messages`, with the instructions before them."""
    asked = _listed(attributes.get("gen_ai.input.messages"))
    said = _listed(attributes.get("gen_ai.output.messages"))
    if instructions := _listed(attributes.get("gen_ai.system_instructions")):
        asked = [{"role": "system", "parts": instructions}, *asked]
    return asked, said


def _from_events(events: list[tuple[str, dict[str, Any]]]) -> tuple[list[Any], list[Any]]:
    """An event a message, `gen_ai.<role>.message`, and an event a reply, `gen_ai.choice`."""
    asked: list[Any] = []
    said: list[Any] = []
    for name, values in events:
        if name == "gen_ai.choice":
            message = parsed(values.get("message", values))
            message = message if isinstance(message, Mapping) else {"content": message}
            reason = values.get("finish_reason")
            said.append({**_message(message), "finish_reason": reason})
        elif name.startswith("gen_ai.") and name.endswith(".message"):
            role = name.removeprefix("gen_ai.").removesuffix(".message")
            row = {"role": role, **_message(values)}
            if role == "tool" and isinstance(values.get("id"), str):
                row["tool_call_id"] = values["id"]
            asked.append(row)
    return asked, said


def _message(values: Mapping[str, Any]) -> dict[str, Any]:
    row = {key: parsed(v) if key == "tool_calls" else v for key, v in values.items()}
    return {key: v for key, v in row.items() if "." not in key and v is not None}


def _numbered(attributes: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """A message spread over attributes with its number in their names."""
    asked, said = nested(attributes, "gen_ai.prompt"), nested(attributes, "gen_ai.completion")
    if asked or said:
        return [_flat(m) for m in asked], [_flat(m) for m in said]
    asked = nested(attributes, "llm.input_messages")
    said = nested(attributes, "llm.output_messages")
    return [_inferred(m) for m in asked], [_inferred(m) for m in said]


def _flat(message: Any) -> dict[str, Any]:
    """OpenLLMetry writes a list of parts as its JSON."""
    if not isinstance(message, Mapping):
        raise Malformed("a message is not an object")
    content = parsed(message.get("content"))
    parts = isinstance(content, list) and all(
        isinstance(p, Mapping) and "type" in p for p in content
    )
    return {**message, "content": content if parts else message.get("content")}


def _inferred(item: Any) -> dict[str, Any]:
    """OpenInference puts every object under its kind: `message`, `tool_call`."""
    message = item.get("message") if isinstance(item, Mapping) else None
    if not isinstance(message, Mapping):
        raise Malformed("a message is not an object")
    row = {key: message[key] for key in ("role", "content", "name") if key in message}
    if message.get("tool_call_id"):
        row["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("contents"), list):
        parts = [part.get("message_content") or {} for part in message["contents"]]
        row["content"] = [{"type": p.get("type", "text"), "text": p.get("text")} for p in parts]
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        row["tool_calls"] = [call.get("tool_call") for call in calls]
    return row


def _tools(attributes: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    found = openai_tools(attributes.get("gen_ai.tool.definitions"))
    if not found:
        found = openai_tools(nested(attributes, "llm.request.functions"))
    if not found:
        schemas = [tool.get("tool", {}) for tool in nested(attributes, "llm.tools")]
        found = openai_tools([schema["json_schema"] for schema in schemas if schema])
    return found


def _listed(value: Any) -> list[Any]:
    found = parsed(value)
    return found if isinstance(found, list) else []
