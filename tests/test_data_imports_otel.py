"""OpenTelemetry exports of real spans, in the conventions of several instrumentations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrain.data.imports import Fault, Logged, read_logs
from test_data_imports import outline

pytest.importorskip("opentelemetry.sdk")


def exported(make: Callable[[Any], object]) -> list[Any]:
    """The spans that `make` finishes with a real provider."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    make(provider)
    return list(exporter.get_finished_spans())


def otlp(spans: list[Any], **options: Any) -> dict[str, Any]:
    encoder = pytest.importorskip("opentelemetry.exporter.otlp.proto.common.trace_encoder")
    from google.protobuf.json_format import MessageToDict

    request: dict[str, Any] = MessageToDict(encoder.encode_spans(spans), **options)
    return request


def conversations(path: Path, *documents: Any) -> list[Logged | Fault]:
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    return read_logs([str(path)])


def spans_of(*calls: dict[str, Any]) -> list[Any]:
    """One trace, a span a call."""

    def make(provider: Any) -> None:
        tracer = provider.get_tracer("t")
        with tracer.start_as_current_span("invoke_agent"):
            for attributes in calls:
                with tracer.start_as_current_span("chat", attributes=attributes):
                    pass

    return exported(make)


def test_what_pydantic_ai_exports(tmp_path: Path) -> None:
    """Its spans of agents and tools repeat what those of calls hold."""
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent
    from pydantic_ai.capabilities import Instrumentation
    from pydantic_ai.models.instrumented import InstrumentationSettings
    from pydantic_ai.models.test import TestModel

    def run(provider: Any) -> None:
        settings = InstrumentationSettings(tracer_provider=provider)
        agent = Agent(
            TestModel(), system_prompt="Be brief", capabilities=[Instrumentation(settings)]
        )

        @agent.tool_plain
        def price(thing: str) -> int:
            """What it costs."""
            return 7

        agent.run_sync("Pen?")
        agent.run_sync("Cup?")

    spans = exported(run)
    found = conversations(tmp_path / "spans.jsonl", otlp(spans))
    expected = ['s:Be brief u:Pen? A:price t:7 A:{"price":7}',
                's:Be brief u:Cup? A:price t:7 A:{"price":7}']  # fmt: skip
    assert [outline(i) for i in found if isinstance(i, Logged)] == expected
    first = found[0]
    assert isinstance(first, Logged)
    assert first.trace.messages[2].tool_calls[0].arguments == {"thing": "a"}
    assert first.trace.tools[0]["function"]["name"] == "price"
    assert first.calls == 2 and first.metadata["model"] == "test"
    by_line = conversations(tmp_path / "lines.jsonl", *(json.loads(s.to_json()) for s in spans))
    assert [outline(i) for i in by_line if isinstance(i, Logged)] == expected


PARTS = {
    "gen_ai.operation.name": "chat",
    "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "Be brief"}]),
    "gen_ai.input.messages": json.dumps(
        [{"role": "user", "parts": [{"type": "text", "content": "1?"}]}]
    ),
    "gen_ai.output.messages": json.dumps(
        [{"role": "assistant", "finish_reason": "length",
          "parts": [{"type": "reasoning", "content": "hm"}, {"type": "text", "content": "one"}]}]
    ),
}  # fmt: skip


def test_parts_as_the_conventions_write_them(tmp_path: Path) -> None:
    [logged] = conversations(tmp_path / "s.jsonl", otlp(spans_of(PARTS)))
    assert isinstance(logged, Logged)
    assert outline(logged) == "s:Be brief u:1? A:one"
    assert (logged.trace.messages[-1].reasoning, logged.truncated) == ("hm", True)
    snake = otlp(spans_of(PARTS), preserving_proto_field_name=True)
    [same] = conversations(tmp_path / "s.jsonl", snake)
    assert isinstance(same, Logged) and same.trace.messages == logged.trace.messages


def test_attributes_that_are_structures(tmp_path: Path) -> None:
    """`arrayValue` and `kvlistValue` in place of a text of JSON."""
    text = {"key": "type", "value": {"stringValue": "text"}}

    def message(role: str, content: str) -> dict[str, Any]:
        part = {"kvlistValue": {"values": [
            text, {"key": "content", "value": {"stringValue": content}}]}}  # fmt: skip
        return {"kvlistValue": {"values": [
            {"key": "role", "value": {"stringValue": role}},
            {"key": "parts", "value": {"arrayValue": {"values": [part]}}}]}}  # fmt: skip

    attributes = [
        {"key": "gen_ai.input.messages",
         "value": {"arrayValue": {"values": [message("user", "1?")]}}},
        {"key": "gen_ai.output.messages",
         "value": {"arrayValue": {"values": [message("assistant", "one")]}}},
    ]  # fmt: skip
    span = {"traceId": "a", "spanId": "b", "attributes": attributes}
    request = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}
    [logged] = conversations(tmp_path / "s.jsonl", request)
    assert isinstance(logged, Logged) and outline(logged) == "u:1? A:one"


def test_messages_that_are_numbered_attributes(tmp_path: Path) -> None:
    llmetry = {
        "gen_ai.prompt.0.role": "user",
        "gen_ai.prompt.0.content": json.dumps([{"type": "text", "text": "Pen?"}]),
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.finish_reason": "tool_calls",
        "gen_ai.completion.0.tool_calls.0.id": "c1",
        "gen_ai.completion.0.tool_calls.0.name": "price",
        "gen_ai.completion.0.tool_calls.0.arguments": '{"of": "pen"}',
        "llm.request.functions.0.name": "price",
        "llm.request.functions.0.parameters": '{"type": "object"}',
        "gen_ai.response.model": "teacher",
    }
    later = {
        "gen_ai.prompt.0.role": "user",
        "gen_ai.prompt.0.content": "Pen?",
        "gen_ai.prompt.1.role": "assistant",
        "gen_ai.prompt.1.tool_calls.0.id": "c1",
        "gen_ai.prompt.1.tool_calls.0.name": "price",
        "gen_ai.prompt.1.tool_calls.0.arguments": '{"of": "pen"}',
        "gen_ai.prompt.2.role": "tool",
        "gen_ai.prompt.2.tool_call_id": "c1",
        "gen_ai.prompt.2.content": "7",
        "gen_ai.completion.0.content": "7",
    }
    inference = {
        "openinference.span.kind": "LLM",
        "llm.input_messages.0.message.role": "user",
        "llm.input_messages.0.message.contents.0.message_content.type": "text",
        "llm.input_messages.0.message.contents.0.message_content.text": "Cup?",
        "llm.output_messages.0.message.role": "assistant",
        "llm.output_messages.0.message.tool_calls.0.tool_call.function.name": "price",
        "llm.output_messages.0.message.tool_calls.0.tool_call.function.arguments": '{"of": "cup"}',
        "llm.tools.0.tool.json_schema": '{"type": "function", "function": {"name": "price"}}',
    }
    agent = {**inference, "openinference.span.kind": "AGENT"}
    spans = otlp(spans_of(llmetry, later, inference, agent))
    first, second = conversations(tmp_path / "s.jsonl", spans)
    assert isinstance(first, Logged) and isinstance(second, Logged)
    assert outline(first) == "u:Pen? A:price t:7 A:7" and first.metadata["model"] == "teacher"
    schema = first.trace.tools[0]["function"]
    assert (schema["name"], schema["parameters"]) == ("price", {"type": "object"})
    assert outline(second) == "u:Cup? A:price"
    assert second.trace.messages[1].tool_calls[0].arguments == {"of": "cup"}
    assert second.trace.tools[0]["function"]["name"] == "price"


def test_messages_that_are_events(tmp_path: Path) -> None:
    """On the span, and as log records; an evaluation is the reward."""

    def make(provider: Any) -> None:
        with provider.get_tracer("t").start_as_current_span("chat") as span:
            span.add_event("gen_ai.system.message", {"content": "Be brief"})
            span.add_event("gen_ai.user.message", {"content": "1?"})
            message = json.dumps({"content": "one"})
            span.add_event("gen_ai.choice", {"index": 0, "message": message})
            result = {"gen_ai.evaluation.name": "right", "gen_ai.evaluation.score.value": 0.5}
            span.add_event("gen_ai.evaluation.result", result)

    [logged] = conversations(tmp_path / "s.jsonl", otlp(exported(make)))
    assert isinstance(logged, Logged)
    assert (outline(logged), logged.reward) == ("s:Be brief u:1? A:one", 0.5)

    def record(name: str, **body: str) -> dict[str, Any]:
        values = [{"key": key, "value": {"stringValue": value}} for key, value in body.items()]
        return {"eventName": name, "traceId": "a", "spanId": "b",
                "body": {"kvlistValue": {"values": values}}}  # fmt: skip

    choice = record("gen_ai.choice", message=json.dumps({"content": "two"}), finish_reason="stop")
    records = [record("gen_ai.user.message", content="2?"), choice]
    logs = {"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]}
    span = {"traceId": "a", "spanId": "b", "attributes": []}
    spans = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}
    [late] = conversations(tmp_path / "s.jsonl", spans, logs)
    assert isinstance(late, Logged) and outline(late) == "u:2? A:two"
    plain = {
        **span,
        "attributes": [
            {
                "key": "gen_ai.output.messages",
                "value": {"stringValue": '[{"role": "assistant", "parts": [{"type": "blob"}]}]'},
            }
        ],
    }
    spans["resourceSpans"][0]["scopeSpans"][0]["spans"] = [plain]
    [fault] = conversations(tmp_path / "s.jsonl", spans)
    assert isinstance(fault, Fault) and "type 'blob'" in fault.detail
