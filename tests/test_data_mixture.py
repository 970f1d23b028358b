"""Mixtures: shares, order, names, epochs of their own; a restored one goes on the same."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import retrain
from killing import left_behind
from retrain.config import load_config
from retrain.config.data import PromptSourceConfig
from retrain.data import TaskCursor, TaskSource, load_tasks
from retrain.data.mixture import Turns
from retrain.loops.check import check
from retrain.tracking.run_dir import RunDirectory
from retrain.types import Rollout, Task, UserError
from runs import hyperparameters, metrics_of, rl_config

ADAPTER: TypeAdapter[Any] = TypeAdapter(PromptSourceConfig)


def listed(name: str, number: int = 4, **keys: Any) -> dict[str, Any]:
    prompts = [{"prompt": f"{name}{i}", "answer": i} for i in range(number)]
    return {"type": "list", "prompts": prompts, "shuffle": False, **keys}


def mixture(**parts: Any) -> dict[str, Any]:
    """Parts are (weight, source) by name."""
    sources = [{"name": n, "weight": w, "source": s} for n, (w, s) in parts.items()]
    return {"type": "mixture", "sources": sources}


def load(source: dict[str, Any], seed: int = 0) -> TaskSource:
    return load_tasks(ADAPTER.validate_python(source), seed=seed)


def cursor(source: dict[str, Any], seed: int = 0) -> TaskCursor:
    return load(source, seed).cursor("prompt_source")


def drawn(data: TaskCursor, number: int) -> list[tuple[int, str]]:
    return [(epoch, task.prompt[-1].content) for epoch, task in islice(data, number)]


# --- order ---


def test_weights_interleave_and_each_part_has_its_own_epochs() -> None:
    data = cursor(mixture(a=(3, listed("a", 4)), b=(1, listed("b", 2))))
    assert drawn(data, 12) == [
        (0, "a0"), (0, "a1"), (0, "b0"), (0, "a2"),
        (0, "a3"), (1, "a0"), (0, "b1"), (1, "a1"),
        (1, "a2"), (1, "a3"), (1, "b0"), (2, "a0"),
    ]  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.integers(1, 400))
def test_shares_are_those_of_the_weights_at_any_time(weights: list[int], number: int) -> None:
    of = {str(i): float(weight) for i, weight in enumerate(weights)}
    turns, seen = Turns(of), Counter[str]()
    for done in range(1, number + 1):
        name = turns.next(of)
        turns.take(name, of)
        seen[name] += 1
        for other, weight in of.items():
            assert abs(seen[other] - done * weight / sum(weights)) < 2
    if number >= sum(weights):
        again = Turns(of)
        for _ in range(sum(weights)):
            again.take(again.next(of), of)
        assert again.credit == dict.fromkeys(of, 0.0), "it begins again after the sum of weights"


def test_parts_are_shuffled_each_in_its_own_way() -> None:
    data = cursor(mixture(a=(1, listed("", 9, shuffle=True)), b=(1, listed("", 9, shuffle=True))))
    order = [text for _, text in drawn(data, 18)]
    assert sorted(order[::2]) == sorted(order[1::2]) == [str(i) for i in range(9)]
    assert order[::2] != order[1::2]


# --- what its tasks are ---


def test_ids_and_metadata_name_the_part() -> None:
    source = load(mixture(math=(1, listed("p", metadata={"tools": ["python"]})),
                          words=(1, listed("p", metadata={"tools": []}))))  # fmt: skip
    tasks = list(source.epoch(0))
    assert len({task.id for task in tasks}) == len(source) == 8
    assert tasks[0].id.startswith("math:") and tasks[4].id.startswith("words:")
    assert tasks[0].id.removeprefix("math:") == tasks[4].id.removeprefix("words:")
    assert tasks[0].metadata == {"tools": ["python"], "source": "math"}
    assert tasks[4].metadata == {"tools": [], "source": "words"}


def test_a_column_called_source_is_not_lost_silently() -> None:
    rows = {"type": "list", "prompts": [{"prompt": "a", "source": "web"}]}
    with pytest.raises(UserError, match=r"source b: prompts\[0\]: has the metadata 'source'"):
        load(mixture(a=(1, listed("a")), b=(1, rows)))
    load(mixture(a=(1, listed("a")), b=(1, {**rows, "metadata_columns": []})))


def test_the_summary_says_what_is_mixed() -> None:
    lines = load(mixture(a=(3, listed("a")), b=(1, listed("b")))).summary().splitlines()
    assert lines[0] == "a mixture of 2 sources"
    assert lines[1] == "a, 75% of the tasks drawn: 4 rows read, 4 kept"
    assert lines[2].startswith("  first task a:") and "  " + "  user: a0" in lines


def test_streams_are_parts_too(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("s0\ns1\ns2\n")
    stream = {"type": "file", "path": str(path), "streaming": True, "shuffle": False}
    source = load(mixture(a=(1, listed("a", 2)), s=(1, stream)))
    with pytest.raises(TypeError):
        len(source)
    assert [task.prompt[0].content for task in source.known()] == ["a0", "a1"]
    assert drawn(source.cursor("prompt_source"), 7)[1::2] == [(0, "s0"), (0, "s1"), (0, "s2")]


# --- resuming ---


@pytest.fixture(autouse=True, scope="module")
def functions() -> Iterator[None]:
    made = ModuleType("mixture_functions")
    made.__dict__["forever"] = lambda: (f"p{i}" for i in count())
    sys.modules[made.__name__] = made
    yield
    del sys.modules[made.__name__]


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    flags = st.booleans()
    buffer = draw(st.integers(1, 6))
    kinds: dict[str, dict[str, Any]] = {
        "listed": listed("l", draw(st.integers(2, 9)), shuffle=draw(flags)),
        "filtered": listed("f", 9, filters=[{"column": "answer", "max": draw(st.integers(0, 8))}]),
        "endless": {"type": "python", "function": "mixture_functions:forever", "streaming": True,
                    "shuffle_buffer": buffer},
        "stream": {"type": "python", "function": "mixture_functions:forever", "streaming": True,
                   "limit": draw(st.integers(1, 9)), "shuffle": False},
        "levels": listed("c", 9, curriculum={"column": "kind"}, shuffle=draw(flags)),
    }  # fmt: skip
    for i, row in enumerate(kinds["levels"]["prompts"]):
        row["kind"] = i % 2
    names = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=2, max_size=5, unique=True))
    return mixture(**{name: (draw(st.sampled_from([0.3, 1, 2, 7])), kinds[name]) for name in names})


@settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
@given(mixtures(), st.integers(0, 60), st.integers(0, 5))
def test_a_restored_mixture_goes_on_the_same(source: dict[str, Any], cut: int, seed: int) -> None:
    whole = cursor(source, seed)
    list(islice(whole, cut))
    position = json.loads(json.dumps(whole.position()))
    expected = list(islice(whole, 40))
    again = cursor(source, seed)
    list(islice(again, 3))
    again.restore(position)
    assert again.position() == position
    assert list(islice(again, 40)) == expected
    assert again.position() == whole.position()


def test_a_part_that_has_changed_is_named() -> None:
    data = cursor(mixture(a=(1, listed("a")), b=(1, listed("b"))))
    list(islice(data, 3))
    other = cursor(mixture(a=(1, listed("a")), b=(1, listed("x"))))
    with pytest.raises(UserError, match="prompt_source: source b: the data is not what the run"):
        other.restore(data.position())


def test_a_source_that_fails_is_tried_again_in_its_turn(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('"s0"\n"s1"\n{broken\n')
    stream = {"type": "file", "path": str(path), "streaming": True, "shuffle": False}
    data = cursor(mixture(a=(1, listed("a")), s=(1, stream)))
    assert [text for _, text in drawn(data, 5)] == ["a0", "s0", "a1", "s1", "a2"]
    for _ in range(2):
        with pytest.raises(UserError, match="line 3: malformed JSON"):
            next(data)
    path.write_text('"s0"\n"s1"\n"s2"\n')
    assert [text for _, text in drawn(data, 2)] == ["s2", "a3"]


# --- metrics and runs ---


def test_metrics_are_shares_and_rewards_of_the_last_step() -> None:
    data = cursor(mixture(a=(3, listed("a")), b=(1, listed("b"))))

    def outcome(epoch: int, task: Task, reward: float) -> Rollout:
        return Rollout(task=task, reward=reward)

    rollouts = [outcome(*next(data), reward=float(i)) for i in range(4)]
    rollouts[3].mask("engine", "away")
    data.observe(rollouts, lambda *_: False)
    assert data.metrics() == {
        "mixture/a/share": 2 / 3, "mixture/a/reward": 0.5,
        "mixture/b/share": 1 / 3, "mixture/b/reward": 2.0,
    }  # fmt: skip


def test_a_source_that_was_not_scored_has_a_share_of_zero() -> None:
    """Otherwise the mean of what is logged is not the share of the rollouts."""
    data = cursor(mixture(a=(9, listed("a")), b=(1, listed("b"))))
    logged = []
    for _ in range(10):
        data.observe([Rollout(task=next(data)[1], reward=1.0)], lambda *_: True)
        logged.append(data.metrics())
    for name, expected in (("a", 0.9), ("b", 0.1)):
        shares = [metrics[f"mixture/{name}/share"] for metrics in logged]
        assert sum(shares) / len(shares) == pytest.approx(expected)
    assert sum("mixture/b/reward" in metrics for metrics in logged) == 1
    data.observe([], lambda *_: True)
    assert data.metrics() == {}, "there are no shares of nothing"


QUESTIONS = {"type": "python", "function": "runs:questions"}


def mixed_run(output_dir: Path) -> dict[str, Any]:
    return rl_config(
        output_dir,
        prompt_source=mixture(
            few=(1, {**QUESTIONS, "params": {"n": 3}}),
            many=(2, {**QUESTIONS, "params": {"first": 60}, "streaming": True,
                      "shuffle_buffer": 5}),
        ),
        environment={"type": "qa"},
        algorithm={"hyperparameters": hyperparameters(steps=4, prompts_per_step=3)},
        checkpoint={"every_steps": 1, "keep_last": 9},
    )  # fmt: skip


def test_a_run_on_a_mixture_is_resumed_to_the_bit(tmp_path: Path) -> None:
    whole = retrain.run_sync(mixed_run(tmp_path / "whole")).path
    rows = metrics_of(whole)
    assert [row["mixture/few/share"] for row in rows] == [pytest.approx(1 / 3)] * 4
    assert_resumed_the_same(whole, mixed_run(tmp_path), after=2)


def assert_resumed_the_same(whole: Path, config: dict[str, Any], *, after: int) -> None:
    """A run that goes on from the checkpoint after some steps of `whole` ends as it did."""
    run = Path(config["output_dir"]) / "t-001"
    shutil.copytree(whole, run)
    for saved in (run / "checkpoints").iterdir():
        if saved.name != f"rl-{after:06d}":
            shutil.rmtree(saved)
    RunDirectory(run).describe(status="running")
    retrain.run_sync(config, resume="latest")
    found, expected = left_behind(run), left_behind(whole)
    assert found["metrics"] == expected["metrics"]
    assert found["rollouts"] == expected["rollouts"]
    assert found["tensors"]["rl/model.safetensors"] == expected["tensors"]["rl/model.safetensors"]


def test_an_evaluation_asks_every_task_once_and_reports_by_source(tmp_path: Path) -> None:
    sums = {**QUESTIONS, "params": {"n": 2}}
    config = rl_config(
        tmp_path,
        environment={"type": "qa"},
        evaluation={
            "prompt_source": mixture(a=(1, sums), b=(1, {**QUESTIONS, "params": {"n": 3}})),
            "group_by": "source",
            "modes": [{"name": "greedy", "temperature": 0}],
        },
        stages=[{"kind": "eval"}],
    )
    assert "a mixture of 2 sources" in check(load_config(config))
    (row,) = metrics_of(retrain.run_sync(config).path, "eval")
    assert row["eval/greedy/n"] == 5
    assert {"eval/greedy/source=a/success", "eval/greedy/source=b/success"} <= row.keys()


# --- the config itself ---


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ([{"name": "a", "source": listed("a")}], "at least 2 items"),
        ([{"name": "a", "source": listed("a")}] * 2, "have one name: a, a"),
        ([{"name": "a:b", "source": listed("a")}], "match pattern"),
        ([{"name": "a", "weight": 0, "source": listed("a")}], "greater than 0"),
        ([{"name": "a", "weight": float("inf"), "source": listed("a")}], "finite"),
        ([{"name": "a", "source": mixture(b=(1, listed("a")))}], "a mixture inside a mixture"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(sources: Any, fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        ADAPTER.validate_python({"type": "mixture", "sources": sources})


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"weigt": 2}, "unknown key prompt_source.sources.0.weigt; did you mean 'weight'?"),
        ({"source": {**listed("a"), "limt": 2}},
         "unknown key prompt_source.sources.0.source.limt; did you mean 'limit'?"),
        ({"source": {"type": "lst"}}, "sources.0.source.type: there is no 'lst'; did you mean"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_told_with_its_place(where: dict[str, Any], expected: str) -> None:
    parts = mixture(a=(1, listed("a")), b=(1, listed("b")))
    parts["sources"][0] |= where
    with pytest.raises(UserError) as caught:
        load_config(rl_config(Path("runs"), prompt_source=parts))
    assert expected in caught.value.cause


def test_an_evaluation_refuses_weights() -> None:
    evaluation = {"prompt_source": mixture(a=(2, listed("a")), b=(1, listed("b")))}
    with pytest.raises(UserError, match=r"evaluation.prompt_source: weight has no effect"):
        load_config(rl_config(Path("runs"), evaluation=evaluation))
