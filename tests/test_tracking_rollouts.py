"""Rollout files: an exact round trip, a format that ten lines can read, and its cost."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from array import array
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.tracking.rollouts import (
    encode_rollout,
    read_records,
    read_rollouts,
    rollout_from_dict,
    rollout_to_dict,
)
from retrain.tracking.run_dir import RunDirectory
from retrain.types import (
    FinishReason,
    Message,
    MessageType,
    Prompt,
    RewardPart,
    Rollout,
    Segment,
    Span,
    StopReason,
    Task,
    ToolCall,
    Turn,
    UserError,
)

DOCS = Path(__file__).parent.parent / "docs" / "run_directory.md"

text = st.text(st.characters(), max_size=8)
number = st.floats(allow_nan=False)
int32 = st.integers(-(2**31), 2**31 - 1)
json_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
mapping = st.dictionaries(text, json_value, max_size=3)
maybe_text = st.none() | text
calls = st.builds(ToolCall, name=text, arguments=mapping, id=text, error=maybe_text)
messages = st.builds(
    Message,
    content=text,
    type=st.sampled_from(MessageType),
    role=maybe_text,
    name=maybe_text,
    reasoning=maybe_text,
    tool_calls=st.lists(calls, max_size=2).map(tuple),
    tool_call_id=maybe_text,
)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    length = draw(st.integers(0, 6))

    def column(code: str, values: st.SearchStrategy[Any]) -> array[Any]:
        return array(code, draw(st.lists(values, min_size=length, max_size=length)))

    spans = st.builds(
        Span,
        message=st.integers(0, 9),
        start=st.integers(0, 9),
        end=st.integers(0, 9),
        finish_reason=st.none() | st.sampled_from(get_args(FinishReason)),
    )
    return Segment(
        parent=draw(st.none() | st.integers(0, 3)),
        prefix_len=draw(st.integers(0, 100)),
        token_ids=column("i", int32),
        source=column("B", st.integers(0, 255)),
        logprobs=column("f", st.floats(width=32, allow_nan=False)),
        versions=column("i", int32),
        turns=draw(st.lists(spans, max_size=2)),
    )


parts = st.builds(
    RewardPart,
    name=text,
    kind=st.sampled_from(["environment", "step", "rollout", "group", "verifier"]),
    turn=st.none() | st.integers(0, 9),
    raw=number,
    weight=number,
    value=number,
    verifier=maybe_text,
    error=maybe_text,
)
tasks = st.builds(
    Task,
    id=text,
    prompt=st.lists(messages, max_size=2).map(tuple),
    answer=json_value,
    metadata=mapping,
)
rollouts = st.builds(
    Rollout,
    id=text,
    group_id=maybe_text,
    agent=text,
    trainable=st.booleans(),
    task=st.none() | tasks,
    messages=st.lists(messages, max_size=3),
    segments=st.lists(segments(), max_size=3),
    env_rewards=st.lists(number, max_size=3),
    step_rewards=st.lists(number, max_size=3),
    reward=number,
    reward_parts=st.lists(parts, max_size=3),
    stop_reason=st.none() | st.sampled_from(get_args(StopReason)),
    error=maybe_text,
    metrics=st.dictionaries(text, number, max_size=3),
)


def write(directory: Path, written: list[Rollout]) -> Path:
    return RunDirectory(directory).write_rollouts("rl", 0, written)


@settings(max_examples=150, deadline=None)
@given(written=st.lists(rollouts, max_size=3))
def test_round_trip_is_exact(
    written: list[Rollout], tmp_path_factory: pytest.TempPathFactory
) -> None:
    read = list(read_rollouts(write(tmp_path_factory.mktemp("run"), written)))
    assert read == written
    for before, after in zip(written, read, strict=True):
        for old, new in zip(before.segments, after.segments, strict=True):
            assert old.logprobs.tobytes() == new.logprobs.tobytes()
            assert (new.token_ids.typecode, new.source.typecode) == ("i", "B")


def sampled_rollout(index: int = 0) -> Rollout:
    """Two turns with a tool call between them: 60 tokens, 30 of them sampled."""
    question = Message("What is 123*45+6?", MessageType.MESSAGE)
    rollout = Rollout(id=f"r{index}", group_id="g0", task=Task("t0", (question,), answer="5541"))
    rollout.messages.append(question)
    call = ToolCall("python", {"code": "123*45+6"})
    for prompt, length, calls in (
        (Prompt(None, 0, list(range(20)), [0] * 20), 20, (call,)),
        (Prompt(0, 40, list(range(10)), [0] * 10), 10, ()),
    ):
        turn = Turn(
            prompt,
            array("i", [(index * 31 + 7 * t) % 500 for t in range(length)]),
            array("f", [-(t % 9) / 7 for t in range(length)]),
            array("i", [3] * length),
            "stop_token",
        )
        rollout.add_messages(Message("5541", MessageType.MODEL, tool_calls=calls, turn=turn))
    rollout.step_rewards, rollout.reward, rollout.stop_reason = [0.0, 1.0], 1.0, "answered"
    rollout.reward_parts = [RewardPart("exact_match", "rollout", None, 1.0, 1.0, 1.0)]
    return rollout


def test_a_sampled_rollout_keeps_its_ledger_and_drops_only_the_turn(tmp_path: Path) -> None:
    written = sampled_rollout()
    (read,) = read_rollouts(write(tmp_path, [written]))
    assert read == written
    assert list(read.segments[0].versions) == [-1] * 20 + [3] * 20 + [-1] * 10 + [3] * 10
    assert [m.turn for m in read.messages] == [None, None, None]


def test_columns_are_base64_of_little_endian_numbers() -> None:
    segment = Segment(
        token_ids=array("i", [1, -2]),
        source=array("B", [0, 2]),
        logprobs=array("f", [0.0, -0.5]),
        versions=array("i", [-1, 3]),
    )
    (record,) = rollout_to_dict(Rollout(segments=[segment]))["segments"]
    assert record["token_ids"] == "AQAAAP7///8="
    assert record["source"] == "AAI="
    assert record["logprobs"] == "AAAAAAAAAL8="
    assert record["versions"] == "/////wMAAAA="


def test_the_ten_lines_of_the_documentation_read_a_file(tmp_path: Path) -> None:
    path = RunDirectory(tmp_path).write_rollouts("rl", 0, [sampled_rollout()], {"r0": 0.25})
    (script,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in script.splitlines() if line]) <= 10
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, path], capture_output=True, text=True, check=True
    )
    first = [7 * t % 500 for t in range(20)]
    assert done.stdout == f"r0 1.0 0.25 {first + first[:10]}\n"


def test_numbers_that_json_has_no_form_for_survive(tmp_path: Path) -> None:
    written = Rollout(reward=-math.inf, step_rewards=[math.nan], metrics={"m": math.inf})
    (read,) = read_rollouts(write(tmp_path, [written]))
    assert read.reward == -math.inf and math.isnan(read.step_rewards[0])
    assert read.metrics == {"m": math.inf}
    assert '"reward": "-inf"' in encode_rollout(written)


def test_foreign_values_become_text_and_never_stop_a_run(tmp_path: Path) -> None:
    metadata = {"day": date(2026, 1, 2), "pair": (1, 2), "nan": math.nan, "big": 10**5000}
    arguments: dict[Any, Any] = {(1, 2): "tuple key"}
    call = Message("", MessageType.MODEL, tool_calls=(ToolCall("f", arguments),))
    (read,) = read_rollouts(
        write(tmp_path, [Rollout(task=Task("t", (), {1}, metadata), messages=[call])])
    )
    assert read.task is not None and read.task.answer == "{1}"
    assert read.task.metadata["day"] == "2026-01-02"
    assert read.task.metadata["pair"] == [1, 2]
    assert read.task.metadata["nan"] == "nan"
    assert int(read.task.metadata["big"], 16) == 10**5000
    assert read.messages[0].tool_calls[0].arguments == {"(1, 2)": "tuple key"}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, [sampled_rollout(i) for i in range(20)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"rl-000000\.jsonl\.gz cannot be read after line"):
        list(read_rollouts(path))
    path.write_bytes(b"not gzip")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_records(path))
    with pytest.raises(UserError, match="No such file"):
        list(read_rollouts(tmp_path / "nothing.gz"))


def test_a_record_of_something_else_is_refused() -> None:
    with pytest.raises(KeyError):
        rollout_from_dict({"id": "a"})


def test_writing_128_rollouts_of_60_tokens_is_cheap(tmp_path: Path) -> None:
    """8 ms on a 2-core machine; the bound leaves room for a busy one."""
    written = [sampled_rollout(i) for i in range(128)]
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        path = write(tmp_path, written)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05
    assert sum(len(s.token_ids) for r in read_rollouts(path) for s in r.segments) == 128 * 60
