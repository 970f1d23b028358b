"""LangFuse exports, and what smolagents keeps of real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retrain.data.imports import Fault, Logged, read_logs
from retrain.types import MessageType
from test_data_imports import call, outline, read, said, user


def generation(identity: str, asked: Any, output: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": identity,
        "traceId": "t1",
        "type": "GENERATION",
        "name": "chat",
        "startTime": f"2026-01-01T00:00:0{identity}Z",
        "model": "teacher",
        "input": asked,
        "output": output,
        "level": "DEFAULT",
        **more,
    }


TOOLS = [{"type": "function", "function": {"name": "price", "parameters": {}}}]
CALLED = {**said(""), "content": None, "tool_calls": [call("price", '{"of": "pen"}')]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "7"}
GENERATIONS = [
    generation("2", {"messages": [user("Pen?"), CALLED, RESULT], "tools": TOOLS}, said("7")),
    generation("1", {"messages": [user("Pen?")], "tools": TOOLS}, CALLED),
]


def trace(**more: Any) -> dict[str, Any]:
    return {
        "id": "t1",
        "name": "agent",
        "sessionId": None,
        "projectId": "p",
        "input": "Pen?",
        "output": "7",
        "metadata": {"answer": "7"},
        **more,
    }


def test_a_langfuse_trace_with_its_observations(tmp_path: Path) -> None:
    scores = [
        {"name": "reward", "value": 1, "dataType": "BOOLEAN"},
        {"name": "style", "value": 0.25},
        {"name": "label", "value": None, "stringValue": "good"},
    ]
    span = {"id": "9", "traceId": "t1", "type": "SPAN", "input": "x", "output": "y"}
    whole = trace(observations=[*GENERATIONS, span], scores=scores)
    for document in (whole, {"data": [whole], "meta": {"page": 1}}):
        [logged] = read(tmp_path / "log.jsonl", [document])
        assert outline(logged) == "u:Pen? A:price t:7 A:7"
        assert (logged.reward, logged.calls, logged.trace.tools) == (1.0, 2, tuple(TOOLS))
        about = {"trace": "t1", "model": "teacher", "answer": "7", "reward": 1.0, "style": 0.25}
        assert {k: v for k, v in logged.metadata.items() if k in about} == about


def test_langfuse_tables_of_observations_traces_and_scores(tmp_path: Path) -> None:
    """Rows in the newer spelling, with text that is JSON; the only score is the reward."""
    rows = [
        {
            "trace_id": "t1",
            "type": "GENERATION",
            "start_time": g["startTime"],
            "provided_model_name": "teacher",
            "input": json.dumps(g["input"]),
            "output": json.dumps(g["output"]),
        }
        for g in GENERATIONS
    ]
    score = {"id": "s", "traceId": "t1", "name": "correct", "value": 0.5, "dataType": "NUMERIC"}
    row = {k: v for k, v in trace().items() if k not in ("input", "output")}
    table = {**row, "input": None, "output": None, "scores": {}}
    [logged] = read(tmp_path / "log.jsonl", [*rows, table, score])
    assert outline(logged) == "u:Pen? A:price t:7 A:7"
    assert (logged.reward, logged.metadata["correct"]) == (0.5, 0.5)
    assert logged.metadata["answer"] == "7"


def test_langfuse_sessions_join_traces_and_a_trace_may_be_the_call(tmp_path: Path) -> None:
    first = trace(sessionId="s", input=[user("1?")], output=said("one"), scores={"a": [0, 1]})
    second = {**first, "id": "t2", "input": [user("1?"), said("one"), user("2?")], "output": "two"}
    [logged] = read(tmp_path / "log.jsonl", [first, second])
    assert outline(logged) == "u:1? A:one u:2? A:two"
    failed = trace(observations=[generation("1", [user("1?")], None, level="ERROR")])
    [fault] = read_logs([_json(tmp_path / "log.json", failed)])
    assert isinstance(fault, Fault) and fault.kind == "no_model_message"


def _json(path: Path, value: Any) -> str:
    path.write_text(json.dumps(value, default=str))
    return str(path)


def scripted(kind: str, says: list[Any], task: str = "Pen?") -> Any:
    """A real smolagents agent whose model says this, after its run."""
    smolagents = pytest.importorskip("smolagents")
    models = pytest.importorskip("smolagents.models")

    class Scripted(smolagents.Model):  # type: ignore[misc]
        def generate(self, messages: Any, **options: Any) -> Any:
            words = says.pop(0)
            if isinstance(words, str):
                return models.ChatMessage(role="assistant", content=words)
            calls = [
                models.ChatMessageToolCall(
                    id=f"c{len(says)}.{number}",
                    type="function",
                    function=models.ChatMessageToolCallFunction(name=name, arguments=arguments),
                )
                for number, (name, arguments) in enumerate(words)
            ]
            return models.ChatMessage(role="assistant", content=None, tool_calls=calls)

    @smolagents.tool  # type: ignore[misc]
    def price(thing: str) -> int:
        """What a thing costs.

        Args:
            thing: Its name.
        """
        return {"pen": 7, "cup": 8}[thing]

    agent = getattr(smolagents, kind)(tools=[price], model=Scripted(), verbosity_level=0)
    agent.run(task)
    return agent


def test_a_tool_calling_agents_memory(tmp_path: Path) -> None:
    agent = scripted(
        "ToolCallingAgent",
        [
            [("price", {"thing": "nib"})],
            [("price", {"thing": "pen"}), ("price", {"thing": "cup"})],
            [("final_answer", {"answer": "15"})],
        ],
    )
    steps = agent.memory.get_full_steps()
    [logged] = read_logs([_json(tmp_path / "memory.json", steps)])
    assert isinstance(logged, Logged)
    system, task, *rest = logged.trace.messages
    assert (system.type, system.content) == (MessageType.SYSTEM, agent.system_prompt)
    assert task.content == "New task:\nPen?"
    kinds = [m.type for m in rest]
    model, tool = MessageType.MODEL, MessageType.TOOL
    assert kinds == [model, tool, model, tool, tool, model]
    assert rest[1].content.startswith("Error:\nError executing tool 'price'")
    assert [(c.name, c.arguments["thing"]) for c in rest[2].tool_calls] == [
        ("price", "pen"), ("price", "cup")]  # fmt: skip
    results = {m.tool_call_id: m.content for m in rest[3:5]}
    assert sorted(results.values()) == ["7", "8"]
    assert set(results) == {call.id for call in rest[2].tool_calls}
    assert rest[-1].tool_calls[0].arguments == {"answer": "15"}


def test_calls_that_were_written_as_text(tmp_path: Path) -> None:
    """Models without tool calls of their own write JSON, which is not trained twice."""
    text = 'I look.\nAction:\n{"name": "final_answer", "arguments": {"answer": "7"}}'
    agent = scripted("ToolCallingAgent", [text])
    [logged] = read_logs([_json(tmp_path / "memory.json", agent.memory.get_full_steps())])
    assert isinstance(logged, Logged)
    last = logged.trace.messages[-1]
    assert last.content == "I look."
    assert [(c.name, c.arguments) for c in last.tool_calls] == [("final_answer", {"answer": "7"})]


@pytest.mark.parametrize("full", [True, False])
def test_a_code_agents_memory(full: bool, tmp_path: Path) -> None:
    says = [
        "I look.\n<code>\nprint(price('pen'))\n</code>",
        "Done.\n<code>\nfinal_answer(7)\n</code>",
    ]
    agent = scripted("CodeAgent", list(says))
    memory = agent.memory
    steps = memory.get_full_steps() if full else memory.get_succinct_steps()
    row = {"steps": steps, "answer": "7", "reward": 1.0}
    [logged] = read_logs([_json(tmp_path / "memory.json", [row])])
    assert isinstance(logged, Logged)
    messages = logged.trace.messages[1:] if full else logged.trace.messages
    assert [m.content for m in messages] == [
        "New task:\nPen?",
        says[0],
        "Execution logs:\n7\nLast output from code snippet:\nNone",
        says[1],
    ]
    assert [m.tool_calls for m in messages] == [()] * 4
    assert (logged.reward, logged.metadata["answer"]) == (1.0, "7")


def test_steps_and_plans_of_a_memory(tmp_path: Path) -> None:
    """`[step.dict() for step in agent.memory.steps]` with a system prompt and a plan."""
    agent = scripted("ToolCallingAgent", [[("final_answer", {"answer": "7"})]])
    steps = [step.dict() for step in agent.memory.steps]
    del steps[1]["model_input_messages"]
    steps = [{"system_prompt": "Be brief"}, steps[0], {"plan": "Look."}, *steps[1:]]
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"memory": {"steps": steps}}, default=str) + "\n")
    [logged] = read_logs([str(path)])
    assert isinstance(logged, Logged)
    assert outline(logged) == (
        "s:Be brief u:New task:\nPen? a:Look. u:Now proceed and carry out this plan. A:final_answer"
    )
