"""What of a row trains, token by token: the model's own words and its end of turn, nothing else."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from retrain.data import load_traces
from retrain.loops.sft import trace_samples
from retrain.rendering import Renderer
from retrain.types import Sample
from scripted import TAGS, native_renderer, plain_renderer, tag_renderer

Runs = list[tuple[int, str]]
SCHEMA = {
    "type": "function",
    "function": {
        "name": "run",
        "description": "Run.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
    },
}
TOLD = json.dumps(SCHEMA)


def entry(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"id": "0", "type": "function", "function": {"name": "run", "arguments": '{"code": "1"}'}}
WITH_TOOLS = {
    # The same words from the tool, from the model, and from one whose words are not to be learnt.
    "messages": [
        entry("user", "a"),
        entry("assistant", "", tool_calls=[CALL]),
        entry("tool", "It is 5.", name="run", tool_call_id="0"),
        entry("assistant", "It is 5."),
        entry("user", "b"),
        entry("assistant", "It is 5.", weight=0),
        entry("user", "c"),
        entry("assistant", "It is 6."),
    ],
    "tools": [SCHEMA],
}
THOUGHT = {
    "messages": [
        entry("user", "a"),
        entry("assistant", "5", reasoning_content="hm"),
        entry("user", "b"),
        entry("assistant", "6", reasoning_content="so"),
    ]
}


def runs_of(renderer: Renderer, row: dict[str, Any], path: Path) -> list[Runs]:
    """Of each sample of a row its tokens as text, cut where training begins or ends."""
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (trace,) = load_traces(path)
    return [runs(renderer, sample) for sample in trace_samples(trace, renderer)]


def runs(renderer: Renderer, sample: Sample) -> Runs:
    found: Runs = []
    start = 0
    for trains, group in groupby(sample.loss_mask):
        end = start + len(list(group))
        found.append((trains, renderer.codec.decode(sample.token_ids[start:end])))
        start = end
    return found


def im(role: str, text: str = "") -> str:
    return f"<|im_start|>{role}\n{text}"


END = "<|im_end|>"
TURN = f"{END}\n{im('assistant')}"
CHATML_CALL = '<tool_call>\n{"name": "run", "arguments": {"code": "1"}}\n</tool_call>'
CHATML_RESULT = f"\n{im('user')}<tool_response>\nIt is 5.\n</tool_response>{TURN}"
LATER = f"\n{im('user', 'b')}{TURN}It is 5.{END}\n{im('user', 'c')}{TURN}"
LLAMA_HEAD = (
    f"<|bos|><|start|>system<|end|>\n\n[{TOLD}]<|eot_id|><|start|>user<|end|>\n\na<|eot_id|>"
    "<|start|>assistant<|end|>\n\n"
)
LLAMA_CALL = '{"name": "run", "parameters": {"code": "1"}}<|eot_id|>'
LLAMA_TURN = "<|eot_id|><|start|>assistant<|end|>\n\n"

EXPECTED: dict[str, list[Runs]] = {
    "chatml": [[
        (0, f"{im('system')}# Tools{TOLD}{END}\n{im('user', 'a')}{TURN}"),
        (1, f"{CHATML_CALL}{END}"),
        (0, CHATML_RESULT),
        (1, f"It is 5.{END}"),
        (0, LATER),
        (1, f"It is 6.{END}"),
    ]],
    "qwen3": [[
        (0, f"{im('system')}[{TOLD}]{END}\n{im('user', 'a')}{TURN}"),
        (1, f"{CHATML_CALL}{END}"),
        (0, CHATML_RESULT),
        (1, f"It is 5.{END}"),
        (0, LATER),
        (1, f"<think>\n\n</think>\n\nIt is 6.{END}"),  # as the template writes a last answer
    ]],
    # The call is written anew once there is a result: a fork, in which it does not train again.
    "llama3": [
        [(0, LLAMA_HEAD), (1, LLAMA_CALL)],
        [
            (0, f"{LLAMA_HEAD}{LLAMA_CALL}<|start|>ipython<|end|>\n\nIt is 5.{LLAMA_TURN}"),
            (1, "It is 5.<|eot_id|>"),
            (0, f"<|start|>user<|end|>\n\nb{LLAMA_TURN}It is 5.<|eot_id|>"
                f"<|start|>user<|end|>\n\nc{LLAMA_TURN}"),
            (1, "It is 6.<|eot_id|>"),
        ],
    ],
    "strict": [[
        (0, f"{im('user', 'a')}{TURN}"),
        (1, "<code>1</code>"),
        (0, "<interpreter>It is 5.</interpreter>"),
        (1, f"It is 5.{END}"),
        (0, LATER),
        (1, f"It is 6.{END}"),
    ]],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_only_the_models_own_tokens_train(name: str, tmp_path: Path) -> None:
    renderer = tag_renderer(name, *TAGS) if name == "strict" else native_renderer(name)
    assert runs_of(renderer, WITH_TOOLS, tmp_path / "t.jsonl") == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "first", "second", "end"),
    [
        ("chatml", f"{im('user', 'a')}{TURN}", f"5{END}\n{im('user', 'b')}{TURN}", END),
        ("qwen3", f"{im('user', 'a')}{TURN}", f"5{END}\n{im('user', 'b')}{TURN}", END),
        ("mistral", "<|bos|>[INST] a[/INST]", " 5<eos>[INST] b[/INST]", "<eos>"),
    ],
)
def test_reasoning_trains_where_it_is_said_and_is_gone_later(
    name: str, first: str, second: str, end: str, tmp_path: Path
) -> None:
    space = " " if name == "mistral" else ""
    assert runs_of(plain_renderer(name), THOUGHT, tmp_path / "t.jsonl") == [
        [(0, first), (1, f"<think>\nhm\n</think>\n\n{space}5{end}")],
        [(0, first + second), (1, f"<think>\nso\n</think>\n\n{space}6{end}")],
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "5"},
        {"prompt": [entry("user", "a")], "completion": [entry("assistant", "5")]},
        {"messages": [entry("user", "a"), entry("assistant", "5")]},
    ],
)
def test_every_format_trains_the_same_tokens(row: dict[str, Any], tmp_path: Path) -> None:
    found = runs_of(plain_renderer("chatml"), row, tmp_path / "t.jsonl")
    assert found == [[(0, f"{im('user', 'a')}{TURN}"), (1, f"5{END}")]]


def test_a_completion_of_several_turns_trains_the_models(tmp_path: Path) -> None:
    later = [entry("assistant", "5"), entry("user", "b"), entry("assistant", "6")]
    row = {"prompt": "a", "completion": later}
    assert runs_of(plain_renderer("chatml"), row, tmp_path / "t.jsonl") == [[
        (0, f"{im('user', 'a')}{TURN}"),
        (1, f"5{END}"),
        (0, f"\n{im('user', 'b')}{TURN}"),
        (1, f"6{END}"),
    ]]  # fmt: skip
