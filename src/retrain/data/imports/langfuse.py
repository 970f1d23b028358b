"""LangFuse exports: traces with their observations, or tables of either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from retrain.data.imports.base import Entry, Fault, Malformed, number
from retrain.data.imports.exchange import is_cut, read_replies, read_request
from retrain.data.imports.messages import call_entry
from retrain.data.imports.normalise import parsed

_OBSERVATIONS = (
    "GENERATION",
    "SPAN",
    "EVENT",
    "AGENT",
    "TOOL",
    "CHAIN",
    "RETRIEVER",
    "EMBEDDING",
    "EVALUATOR",
    "GUARDRAIL",
)


def looks_like_langfuse(value: Mapping[str, Any]) -> bool:
    """A trace, an observation, a score, or the API's page of them."""
    value = _snake(value)
    if isinstance(value.get("observations"), list) or _is_observation(value) or _is_score(value):
        return True
    data = value.get("data")
    if isinstance(data, list) and data and isinstance(data[0], Mapping):
        return looks_like_langfuse(data[0])
    trace = "input" in value and "output" in value and "id" in value
    return trace and any(key in value for key in ("scores", "session_id", "project_id", "name"))


@dataclass
class _Trace:
    columns: dict[str, Any] = field(default_factory=dict)
    place: str | None = None
    generations: list[tuple[str, Mapping[str, Any], str]] = field(default_factory=list)
    """(start time, observation, place)."""
    scores: dict[str, float] = field(default_factory=dict)


class LangfuseReader:
    """Observations of type GENERATION are calls; a trace without one is a call itself, where its
    input and output are messages.

    Calls are put together by session, or without one by trace. The reward is the score named
    `reward`, or the only numeric one; all scores are metadata.
    """

    def __init__(self) -> None:
        self._traces: dict[str, _Trace] = {}

    def feed(self, value: Any, place: str) -> None:
        if not isinstance(value, Mapping):
            raise Malformed("no trace and no observation")
        value = _snake(value)
        if isinstance(value.get("data"), list):
            for item in value["data"]:
                self.feed(item, place)
        elif _is_observation(value):
            self._observe(value, value.get("trace_id") or place, place)
        elif _is_score(value):
            self._score(value, value["trace_id"])
        elif "input" in value or isinstance(value.get("observations"), list):
            self._trace(value, place)
        else:
            raise Malformed("no trace and no observation")

    def _trace(self, value: Mapping[str, Any], place: str) -> None:
        identity = str(value.get("id") or place)
        trace = self._traces.setdefault(identity, _Trace())
        trace.columns.update({k: v for k, v in value.items() if k != "observations"})
        trace.place = place
        for observation in value.get("observations") or ():
            if isinstance(observation, Mapping):  # the API may list ids only
                self._observe(_snake(observation), identity, place)
        scores = parsed(value.get("scores"))
        if isinstance(scores, Mapping):
            scores = [{"name": name, "value": score} for name, score in scores.items()]
        for score in scores if isinstance(scores, list) else ():
            if isinstance(score, Mapping):
                self._score(_snake(score), identity)

    def _observe(self, value: Mapping[str, Any], trace: str, place: str) -> None:
        if value.get("type") == "GENERATION":
            began = str(value.get("start_time") or "")
            self._traces.setdefault(trace, _Trace()).generations.append((began, value, place))

    def _score(self, value: Mapping[str, Any], trace: str) -> None:
        found = parsed(value.get("value"))
        if isinstance(found, list) and found:  # the table of traces lists a name's values
            found = found[-1]
        if (score := number(found)) is not None:
            scores = self._traces.setdefault(trace, _Trace()).scores
            scores[str(value.get("name"))] = score

    def entries(self) -> Iterator[Entry | Fault]:
        for identity, trace in self._traces.items():
            calls = sorted(trace.generations, key=lambda call: call[0])
            if not calls and trace.place is not None:
                calls = [("", trace.columns, trace.place)]
            for _, call, place in calls:
                try:
                    yield from _calls(call, place, identity, trace)
                except Malformed as error:
                    yield Fault(error.kind, place, str(error))


def _calls(call: Mapping[str, Any], place: str, identity: str, trace: _Trace) -> Iterator[Entry]:
    session = trace.columns.get("session_id") or call.get("session_id")
    own = {"trace": identity, "model": call.get("model") or call.get("provided_model_name")}
    own |= {"session": session, **_metadata(trace.columns), **_metadata(call), **trace.scores}
    if call.get("output") in (None, "", [], {}):
        raise Malformed("the generation has no output", "no_model_message")
    request = read_request(call.get("input"))
    named = trace.scores.get("reward")
    if named is None and len(trace.scores) == 1:
        [named] = trace.scores.values()
    for reply in read_replies(call["output"]):
        group = f"session {session}" if session else f"trace {identity}"
        entry = call_entry(own, place, group, request, reply)
        entry.reward = named
        if is_cut(call):
            entry.cut = frozenset([max(entry.made or (0,))])
        yield entry


def _metadata(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    found = parsed(columns.get("metadata"))
    return found if isinstance(found, Mapping) else {}


def _is_observation(value: Mapping[str, Any]) -> bool:
    return value.get("type") in _OBSERVATIONS and ("trace_id" in value or "input" in value)


def _is_score(value: Mapping[str, Any]) -> bool:
    return "trace_id" in value and "value" in value and "name" in value


def _snake(value: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as the newer tables write them: `traceId` is `trace_id`."""
    return {
        "".join(f"_{c.lower()}" if c.isupper() else c for c in str(key)): item
        for key, item in value.items()
    }
