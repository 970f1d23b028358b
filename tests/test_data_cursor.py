"""Where a run stands in its data: the same items after a restore, and none of changed data."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from retrain.config.data import PromptSourceConfig
from retrain.data import Cursor, TaskSource, Trace, TraceSource, load_tasks
from retrain.types import Message, MessageType, Task, UserError

ADAPTER: TypeAdapter[Any] = TypeAdapter(PromptSourceConfig)


def load(seed: int = 0, **keys: Any) -> TaskSource:
    return load_tasks(ADAPTER.validate_python(keys), seed=seed)


def cursor(seed: int = 0, **keys: Any) -> Cursor[Task]:
    return Cursor(load(seed, **keys), place="prompt_source")


def of(*prompts: Any, **keys: Any) -> Cursor[Task]:
    return cursor(type="list", prompts=list(prompts), **{"shuffle": False, **keys})


def taken(data: Cursor[Task], number: int) -> list[tuple[int, str]]:
    return [(epoch, task.prompt[-1].content) for epoch, task in islice(data, number)]


# --- going on ---


def test_epochs_follow_each_other() -> None:
    data = of("a", "b")
    assert taken(data, 5) == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a")]
    shuffled = of(*"abcdefgh", shuffle=True)
    first, second = taken(shuffled, 8), taken(shuffled, 8)
    assert sorted(first) == [(0, x) for x in "abcdefgh"]
    assert sorted(second) == [(1, x) for x in "abcdefgh"]
    assert [x for _, x in first] != [x for _, x in second]


def test_a_position_is_that_after_the_items_handed_out() -> None:
    data = of("a", "b", "c")
    start = data.position()
    assert (start["epoch"], start["taken"], start["last"], start["size"]) == (0, 0, "", 3)
    ids = [task.id for _, task in islice(data, 4)]
    position = data.position()
    assert (position["epoch"], position["taken"], position["last"]) == (1, 1, ids[3])
    again = of("a", "b", "c")
    again.restore(position)
    assert again.position() == position and taken(again, 2) == [(1, "b"), (1, "c")]


def test_the_end_of_an_epoch_is_a_position_too() -> None:
    data = of("a", "b")
    taken(data, 2)
    position = data.position()
    assert (position["epoch"], position["taken"]) == (0, 2)
    again = of("a", "b")
    again.restore(position)
    assert taken(again, 1) == [(1, "a")]


def test_a_position_stays_of_one_size() -> None:
    data = of(*(f"n{i}" for i in range(500)))
    taken(data, 3)
    short = json.dumps(data.position())
    taken(data, 1400)
    assert len(json.dumps(data.position())) < len(short) + 10


def test_restoring_goes_back_as_well_as_forward() -> None:
    data = of(*"abcd")
    taken(data, 1)
    position = data.position()
    taken(data, 9)
    data.restore(position)
    assert taken(data, 2) == [(0, "b"), (0, "c")]


class Stairs:
    """Epoch n has two items fewer than epoch n - 1."""

    def epoch(self, n: int) -> Iterator[Trace]:
        return (Trace(f"{n}.{i}", ()) for i in range(4 - 2 * n))


def test_an_epoch_without_an_item_is_an_error() -> None:
    data = Cursor(Stairs(), place="sft.dataset", noun="trace")
    assert [trace.id for _, trace in islice(data, 6)] == ["0.0", "0.1", "0.2", "0.3", "1.0", "1.1"]
    for _ in range(2):
        with pytest.raises(UserError, match=r"sft\.dataset: there is no trace in epoch 2"):
            next(data)


class Fragile:
    """Its first reading fails after two items; later ones do not."""

    readings = 0

    def epoch(self, n: int) -> Iterator[Trace]:
        self.readings += 1
        for i in range(4):
            if i == 2 and self.readings == 1:
                raise UserError("the disk was away")
            yield Trace(f"{n}.{i}", ())


def test_an_error_of_the_source_skips_nothing() -> None:
    data = Cursor(Fragile(), place="sft.dataset", noun="trace")
    assert [trace.id for _, trace in islice(data, 2)] == ["0.0", "0.1"]
    with pytest.raises(UserError, match="the disk was away"):
        next(data)
    assert data.position()["taken"] == 2
    assert [trace.id for _, trace in islice(data, 3)] == ["0.2", "0.3", "1.0"]


def test_a_source_is_first_asked_when_it_is_needed() -> None:
    source = Fragile()
    data = Cursor(source, place="sft.dataset")
    data.position()
    assert source.readings == 0


def test_traces_come_in_a_seeded_order() -> None:
    said = Message("x", MessageType.MODEL)
    traces = [Trace(f"t{i}", (said,)) for i in range(9)]
    data = Cursor(TraceSource(traces, shuffle=True, seed=3), place="sft.dataset", noun="trace")
    order = list(range(9))
    random.Random("3:sft:1").shuffle(order)
    assert len(list(islice(data, 11))) == 11
    position = data.position()
    again = Cursor(TraceSource(traces, shuffle=True, seed=3), place="sft.dataset", noun="trace")
    again.restore(position)
    assert [(epoch, t.id) for epoch, t in islice(again, 7)] == [(1, f"t{i}") for i in order[2:]]
    plain = TraceSource(traces, shuffle=False, seed=3)
    assert list(plain.epoch(5)) == traces and len(plain) == 9
    tools = ({"type": "function", "function": {"name": "f"}},)
    changed = [Trace(t.id, t.messages, tools) for t in traces]
    other = Cursor(TraceSource(changed, shuffle=True, seed=3), place="sft.dataset", noun="trace")
    with pytest.raises(UserError, match=r"sft\.dataset: .* among traces 1 to 2 of epoch 1"):
        other.restore(position)


# --- data that has changed ---


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (["a", "b", "c"], "an epoch had 4 tasks and has 3 now"),
        (["a", "b", "c", "d", "e"], "an epoch had 4 tasks and has 5 now"),
        (["a", "x", "c", "d"], "task 2 of epoch 1 was '.{16}' and is '.{16}' now"),
        (["x", "b", "c", "d"], "something differs among tasks 1 to 2 of epoch 1"),
        (["a", {"prompt": "b", "answer": 1}, "c", "d"], "something differs among tasks 1 to 2"),
    ],
)
def test_changed_data_is_refused(now: list[Any], difference: str) -> None:
    data = of("a", "b", "c", "d")
    taken(data, 6)
    other = of(*now)
    before = taken(other, 1)
    with pytest.raises(UserError, match=f"prompt_source: .*: {difference}") as caught:
        other.restore(data.position())
    assert "start a new run" in caught.value.next_step
    assert before == [(0, "a")] or now[0] == "x"
    assert other.position()["taken"] == 1 and taken(other, 1)[0][0] == 0


def test_a_stream_that_became_shorter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a\nb\nc\n")
    keys: dict[str, Any] = {"type": "file", "path": str(path), "streaming": True, "shuffle": False}
    data = cursor(**keys)
    taken(data, 6)
    assert "size" not in data.position()
    path.write_text("a\nb\n")
    with pytest.raises(UserError, match="epoch 1 ends after task 2, and 3 of it were taken"):
        cursor(**keys).restore(data.position())


ANSWERS: list[Any] = [
    None, 0, 1, 1.0, "1", True, [1], {"a": 1}, {"a": 2}, b"x", b"y", {1, 2}, {1, 3}, 2 + 1j, object,
]  # fmt: skip


def answer_fingerprint(answer: Any) -> Any:
    data = Cursor(TasksOf([Task("t", (), answer)]), place="prompt_source")
    next(data)
    return data.position()["fingerprint"]


class TasksOf:
    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = tasks

    def epoch(self, n: int) -> Iterator[Task]:
        return iter(self.tasks)


def test_answers_that_differ_are_told_apart() -> None:
    assert len({answer_fingerprint(answer) for answer in ANSWERS}) == len(ANSWERS)


def test_an_answer_counts_the_same_in_every_process() -> None:
    class Opaque:
        pass

    itself: list[Any] = []
    itself.append(itself)
    assert answer_fingerprint(Opaque()) == answer_fingerprint(Opaque())
    assert answer_fingerprint(itself) == answer_fingerprint([*itself])
    prompt = hashlib.blake2b(b"[]", digest_size=8).hexdigest()
    line = rf'["t", "{prompt}", ["\"a\"", "\"b\"", "\"c\""]]' + "\n"
    expected = hashlib.blake2b(line.encode(), digest_size=16).hexdigest()
    assert answer_fingerprint({"c", "a", "b"}) == expected
