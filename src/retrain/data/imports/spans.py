"""OpenTelemetry's JSON: spans and log records with plain attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Span:
    trace: str
    id: str
    attributes: dict[str, Any]
    place: str
    began: int = 0
    """Nanoseconds; 0 where it is not said."""
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """(name, attributes or body), in time."""


@dataclass(frozen=True)
class Event:
    """A log record that belongs to a span."""

    trace: str
    span: str
    name: str
    values: dict[str, Any]


def looks_like_spans(value: Mapping[str, Any]) -> bool:
    """An OTLP request, or one span as the SDK's `to_json` writes it."""
    wrapped = ("resourceSpans", "resource_spans", "resourceLogs", "resource_logs")
    if any(isinstance(value.get(key), list) for key in wrapped):
        return True
    return "attributes" in value and ("context" in value or "traceId" in value)


def read_spans(value: Mapping[str, Any], place: str) -> Iterator[Span | Event]:
    found = False
    for kind in ("Spans", "Logs"):
        for resource in _list(value, f"resource{kind}"):
            found = True
            for scope in _list(resource, f"scope{kind}"):
                for item in _list(scope, "spans" if kind == "Spans" else "logRecords"):
                    yield _span(item, place) if kind == "Spans" else _event(item)
    if not found:
        yield _span(value, place)


def _list(value: Any, key: str) -> list[Any]:
    """Of a key in either of protobuf's JSON spellings."""
    if not isinstance(value, Mapping):
        return []
    snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in key)
    found = value.get(key, value.get(snake))
    return found if isinstance(found, list) else []


def _span(item: Mapping[str, Any], place: str) -> Span:
    context = item.get("context")
    about = context if isinstance(context, Mapping) else item
    events = [
        (str(event.get("name", "")), attributes_of(event.get("attributes")))
        for event in item.get("events") or ()
    ]
    began = item.get("startTimeUnixNano") or item.get("start_time_unix_nano") or 0
    return Span(
        trace=str(about.get("traceId") or about.get("trace_id") or place),
        id=str(about.get("spanId") or about.get("span_id") or ""),
        attributes=attributes_of(item.get("attributes")),
        place=place,
        began=int(began),
        events=events,
    )


def _event(item: Mapping[str, Any]) -> Event:
    values = attributes_of(item.get("attributes"))
    name = item.get("eventName") or item.get("event_name") or values.get("event.name") or ""
    body = plain(item.get("body"))
    if isinstance(body, dict):
        values = {**values, **body}
    trace = item.get("traceId") or item.get("trace_id") or ""
    return Event(
        str(trace), str(item.get("spanId") or item.get("span_id") or ""), str(name), values
    )


def attributes_of(value: Any) -> dict[str, Any]:
    """A list of `{"key", "value"}`, or the object that it stands for."""
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, list):
        return {}
    return {
        str(item["key"]): plain(item.get("value"))
        for item in value
        if isinstance(item, Mapping) and "key" in item
    }


def plain(value: Any) -> Any:
    """A protobuf `AnyValue` as Python's; what is none stays as it is."""
    if not isinstance(value, Mapping) or len(value) != 1:
        return value
    [(raw_kind, inner)] = value.items()
    kind = raw_kind.removesuffix("Value").removesuffix("_value")
    if kind == raw_kind:
        return value
    if kind == "int":
        return int(inner)
    if kind == "array":
        return [plain(item) for item in inner.get("values") or ()]
    if kind == "kvlist":
        return attributes_of(inner.get("values") or [])
    return inner


def nested(attributes: Mapping[str, Any], prefix: str) -> list[Any]:
    """`prefix.0.a.b`, `prefix.1.a.b`, ... as a list of objects, whose numbered keys are lists."""
    tree: dict[str, Any] = {}
    for name, value in attributes.items():
        if not name.startswith(prefix + "."):
            continue
        at = tree
        *path, last = name[len(prefix) + 1 :].split(".")
        for part in path:
            inner = at.setdefault(part, {})
            if not isinstance(inner, dict):
                break
            at = inner
        else:
            at[last] = value
    found = _listed(tree)
    return found if isinstance(found, list) else []


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(key.isdecimal() for key in value):
        return [_listed(value[key]) for key in sorted(value, key=int)]
    return {key: _listed(inner) for key, inner in value.items()}
