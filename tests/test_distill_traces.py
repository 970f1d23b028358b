"""`retrain distill` on another agent's log: what is kept, what trains, and resuming."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import retrain
from retrain.cli import app
from retrain.config.root import TrainingConfig
from retrain.data import load_traces
from retrain.loops.check import check
from retrain.loops.distill_traces import describe_traces
from retrain.tracking.run_dir import RunDirectory
from retrain.types import MessageType, Rollout, UserError
from runs import metrics_of, rl_config
from test_data_imports import call, exchange, said, user, written


def config(folder: Path, rows: list[Any], *, keys: Any = None, **sections: Any) -> dict[str, Any]:
    """Two steps on a log of these rows; `keys` are those of `distillation`."""
    distillation = {
        "type": "traces",
        "sources": [written(folder / "log.jsonl", rows)],
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-2,
        **(keys or {}),
    }
    plain = {"environment": {"type": "qa"}, "prompt_source": None, "reward_setup": {}}
    return rl_config(folder, **{**plain, "distillation": distillation, **sections})


def report_of(folder: Path, rows: list[Any], **given: Any) -> dict[str, Any]:
    """`distill_report.json` of a run, its traces, and what was dropped by reason."""
    result = retrain.run_sync(config(folder, rows, **given))
    report: dict[str, Any] = json.loads((result.path / "distill_report.json").read_text())
    traces = load_traces(result.path / "traces.jsonl")
    assert len(traces) == report["kept"]
    report["said"] = [t.messages[-1].content for t in traces]
    report["counts"] = {reason: found["count"] for reason, found in report["dropped"].items()}
    return report


def asked(question: str, reply: str, **more: Any) -> dict[str, Any]:
    return {"messages": [user(question), said(reply)], **more}


def test_what_the_log_alone_decides(tmp_path: Path) -> None:
    rows = [
        asked("1?", "one", reward=1.0),
        {"nothing": 1},
        {"messages": [user("1?")], "reward": 1},
        asked("1?", "on", finish_reason="length", reward=1),
        {"messages": [user("1?"), said("", tool_calls=[call("f", "{")])], "reward": 1},
        asked("1?", "two", reward=0.4),
        asked(" 1? ", "one\n", reward=1.0),
        asked("1?", "uno", reward=0.5),
        asked("1?", "bad"),
    ]
    report = report_of(tmp_path, rows, keys={"min_reward": 0.5})
    assert (report["read"], report["kept"], report["targets"]) == (9, 2, 2)
    assert report["said"] == ["one", "uno"]
    assert list(report["counts"].items()) == [
        ("malformed", 1), ("broken_call", 1), ("no_model_message", 1), ("truncated", 1),
        ("min_reward", 2), ("duplicate", 1)]  # fmt: skip
    log = f"{tmp_path}/log.jsonl"
    first, *more = report["dropped"]["min_reward"].pop("more")
    assert (first.startswith(str(log)), more) == (True, [])
    assert report["dropped"]["min_reward"] == {
        "count": 2, "place": f"{log}:6", "detail": "reward 0.4"}  # fmt: skip
    assert report["dropped"]["truncated"]["place"] == f"{log}:4"


def test_calls_of_tools_that_the_student_has(tmp_path: Path) -> None:
    def calling(name: str, answer: str) -> dict[str, Any]:
        asks = {**said(""), "tool_calls": [call(name, '{"code": "1+1"}')]}
        result = {"role": "tool", "tool_call_id": "c1", "content": "2"}
        return {"messages": [user("1+1?"), asks, result, said(answer)]}

    final = {**said("So: "), "tool_calls": [call("final_answer", '{"answer": 2}')]}
    rows = [
        calling("python", "2"),
        calling("search", "two"),
        {
            "messages": [
                *calling("python", "")["messages"][:3],
                final,
                {**user("2"), "role": "tool"},
            ]
        },
    ]
    tools = {"type": "smolagent", "tools": ["python"]}
    report = report_of(tmp_path, rows, environment=tools)
    assert report["counts"] == {"unknown_tool": 1, "duplicate": 1}
    assert report["dropped"]["unknown_tool"]["detail"] == "search"
    report = report_of(tmp_path, rows[1:], environment=tools)
    assert report["said"] == ["2"]
    with pytest.raises(UserError, match="it calls tools, but the environment has none"):
        report_of(tmp_path, rows[:1])


def right(rollout: Rollout) -> float:
    """1 for the answer, 0.5 for a number."""
    text = rollout.completion
    assert rollout.task is not None
    if text == str(rollout.task.answer):
        return 1.0
    return 0.5 if text.isdigit() else 0.0


def brief(rollout: Rollout) -> bool:
    return len(rollout.completion) < 6


RIGHT = {
    "rollout_reward_configs": {"right": {"function": "test_distill_traces:right"}},
    "verifiers": ["test_distill_traces:brief"],
    "verifier_penalty": 9.0,
}


def test_rewards_and_verifiers_reject(tmp_path: Path) -> None:
    rows = [
        asked("2+2?", "4", answer=4),
        asked("2+3?", "4", answer=5),
        asked("2+4?", "six", answer=6),
        asked("2+5?", "seven, surely", answer="seven, surely"),
    ]
    report = report_of(tmp_path, rows, keys={"threshold": 1.0}, reward_setup=RIGHT)
    assert report["said"] == ["4"]
    assert report["counts"] == {"threshold": 2, "verifier": 1}
    assert report["dropped"]["threshold"]["detail"] == "reward 0.5"
    assert report["dropped"]["verifier"]["place"] == f"{tmp_path}/log.jsonl:4"
    report = report_of(tmp_path, rows, keys={"threshold": 0.5}, reward_setup=RIGHT)
    assert report["said"] == ["4", "4"]
    report = report_of(tmp_path, rows, reward_setup=RIGHT)
    assert report["kept"] == 4
    with pytest.raises(UserError, match="threshold is 1, but reward_setup is empty"):
        report_of(tmp_path, rows, keys={"threshold": 1})


def failing(rollout: Rollout) -> float:
    if "one" in rollout.completion:
        raise ValueError("no ones")
    return 1.0


def test_rewards_that_fail_stop_or_mask(tmp_path: Path) -> None:
    setup = {"rollout_reward_configs": {"f": {"function": "test_distill_traces:failing"}}}
    rows = [asked("1?", "one"), asked("2?", "two")]
    with pytest.raises(UserError, match="reward 'f' failed: ValueError: no ones"):
        report_of(tmp_path, rows, keys={"threshold": 1}, reward_setup=setup)
    masking = {**setup, "on_error": "mask"}
    report = report_of(tmp_path, rows, keys={"threshold": 1}, reward_setup=masking)
    assert (report["said"], report["counts"]) == (["two"], {"unscored": 1})


def test_tasks_give_the_answers_that_a_log_lacks(tmp_path: Path) -> None:
    shot = [user("1+1?"), said("2", weight=0)]
    rows = [
        asked("New task:\n2+2?", "4"),
        asked("2+3? ", "5"),
        asked("9?", "9"),
        {"messages": [*shot, user("2+2?"), said("5")]},
    ]
    tasks = {"type": "list", "prompts": [{"prompt": "2+2?", "answer": 4},
                                         {"prompt": " 2+3?", "answer": 6}]}  # fmt: skip
    keys = {"threshold": 1.0, "tasks": tasks}
    report = report_of(tmp_path, rows, keys=keys, reward_setup=RIGHT)
    assert (report["said"], report["counts"]) == (["4"], {"no_task": 1, "threshold": 2})
    assert report["dropped"]["no_task"]["detail"] == "'9?'"
    with pytest.raises(UserError, match="tasks does nothing without threshold"):
        report_of(tmp_path, rows, keys={"tasks": tasks})


def test_the_best_of_each_prompt(tmp_path: Path) -> None:
    rows = [
        asked("1?", "a", reward=0.1),
        asked("2?", "b"),
        asked("1?", "c", reward=0.9),
        asked("1?", "d", reward=0.9),
        asked("2?", "e", reward=-1),
        asked("1?", "f", reward=0.95),
    ]
    report = report_of(tmp_path, rows, keys={"per_prompt": 2})
    assert (report["said"], report["counts"]) == (["b", "c", "e", "f"], {"per_prompt": 2})
    report = report_of(tmp_path, rows, keys={"per_prompt": 1})
    assert report["said"] == ["e", "f"]
    shot = [{"role": "system", "content": "S"}, user("0?"), said("null", weight=0)]
    rows = [{"messages": [*shot, *asked(question, "a")["messages"]]} for question in ("1?", "2?")]
    assert report_of(tmp_path, rows, keys={"per_prompt": 1})["kept"] == 2


def test_what_does_not_fit_and_what_opens(tmp_path: Path) -> None:
    """`system_prompt` replaces, or leaves out, what the teacher was told: here far too much."""
    system = {"role": "system", "content": "0 " * 500}
    rows = [asked("1?", "one"), {"messages": [system, user("2?"), said("two")]}]
    report = report_of(tmp_path, rows)
    assert report["counts"] == {"too_long": 1}
    assert "the limit is 192" in report["dropped"]["too_long"]["detail"]
    report = report_of(tmp_path, rows, keys={"system_prompt": ""})
    assert report["said"] == ["one", "two"]
    result = retrain.run_sync(config(tmp_path, rows, keys={"system_prompt": "Be brief"}))
    for trace in load_traces(result.path / "traces.jsonl"):
        kinds = [message.type for message in trace.messages]
        assert kinds == [MessageType.SYSTEM, MessageType.MESSAGE, MessageType.MODEL]
        assert trace.messages[0].content == "Be brief"


def test_the_format_that_is_named_is_the_one_read(tmp_path: Path) -> None:
    rows = [asked("1?", "one"), exchange("a", [user("2?")], said("two"))]
    assert report_of(tmp_path, rows)["said"] == ["one", "two"]
    report = report_of(tmp_path, rows, keys={"format": "gateway"})
    assert (report["said"], report["counts"]) == (["two"], {"malformed": 1})


def test_nothing_left_says_what_was_dropped(tmp_path: Path) -> None:
    rows = [{"x": 1}, {"x": 2}, asked("1?", "one")]
    with pytest.raises(UserError) as caught:
        report_of(tmp_path, rows, keys={"min_reward": 1})
    assert "none of 3 conversations is left" in caught.value.cause
    assert "2  malformed" in caught.value.cause and "1  min_reward" in caught.value.cause
    assert f"{tmp_path}/log.jsonl:1: no known format: an object with x" in caught.value.cause
    with pytest.raises(UserError, match=r"log\.jsonl: no conversation in it"):
        report_of(tmp_path, [])


def test_turns_that_forks_share_train_once(tmp_path: Path) -> None:
    start = [user("1?"), said("one"), user("2?")]
    rows = [
        exchange("a", [user("1?")], said("one")),
        exchange("a", [user("2?")], said("two")),
        exchange("b", start, said("zwei"), parent="a"),
    ]
    report = report_of(tmp_path, rows)
    assert (report["kept"], report["calls"], report["targets"]) == (2, 3, 3)
    fork = load_traces(next(tmp_path.glob("t-001/traces.jsonl")))[1]
    assert [m.type for m in fork.messages if m.content == "one"] == [MessageType.MESSAGE]


def sums(n: int = 64) -> list[dict[str, Any]]:
    """Records of a teacher that adds, with shots that it did not say itself."""
    shots = [user("1+1=?"), said("2")]
    return [
        exchange(str(a), [*shots, user(f"{a}+1=?")], said(str(a + 1)), session=str(a))
        for a in range(10, 10 + n)
    ]


def test_the_command_trains_on_what_the_model_said(tmp_path: Path) -> None:
    """The loss falls; two digits and the end of a turn train of each, not the shot's."""
    written(tmp_path / "records.jsonl", sums())
    path = tmp_path / "task.yaml"
    section = {"steps": 30, "batch_size": 8, "learning_rate": 1e-2, "optimizer": "muon"}
    data = rl_config(tmp_path / "runs", environment={"type": "qa"})
    data |= {"distillation": {"type": "traces", "sources": ["none"], **section}}
    del data["prompt_source"], data["reward_setup"]
    path.write_text(json.dumps(data))
    done = CliRunner().invoke(app, ["distill", str(path), "--from", str(tmp_path)])
    assert done.exit_code == 0, done.output
    run = tmp_path / "runs" / "t-001"
    rows = metrics_of(run, "distill")
    assert len(rows) == 30
    assert {row["tokens"] for row in rows} == {8 * 3.0}
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    report = json.loads((run / "distill_report.json").read_text())
    assert (report["read"], report["kept"], report["dropped"]) == (64, 64, {})
    assert report["sources"] == [str(tmp_path)]


def test_a_resumed_stage_trains_on_what_it_kept(tmp_path: Path) -> None:
    """The log has grown since; weights end as those of a run that was not stopped."""

    def weights(run: Path) -> bytes:
        return (run / "checkpoints" / "distill" / "model.safetensors").read_bytes()

    keys = {"steps": 6, "batch_size": 4, "per_prompt": 1}
    given = config(tmp_path, sums(16), keys=keys, checkpoint={"every_steps": 2})
    whole = retrain.run_sync(given)
    kept = (whole.path / "traces.jsonl").read_bytes()
    expected = weights(whole.path)
    checkpoints = whole.path / "checkpoints"
    assert (checkpoints / "distill-000002").is_dir()
    for folder in (checkpoints / "distill", checkpoints / "distill-000004"):
        shutil.rmtree(folder)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps(exchange("new", [user("?")], said("!"), session="new")) + "\n")
    RunDirectory(whole.path).describe(status="interrupted")
    resumed = retrain.run_sync(given, resume=whole.path)
    assert (resumed.path / "traces.jsonl").read_bytes() == kept
    assert weights(resumed.path) == expected
    assert len(metrics_of(resumed.path, "distill")) == 6


def test_stages_write_files_of_their_own(tmp_path: Path) -> None:
    given = config(tmp_path, [asked("1?", "one")], keys={"steps": 1, "batch_size": 1})
    given["stages"] = [{"kind": "distill"}, {"kind": "distill", "name": "again"}]
    path = retrain.run_sync(given).path
    names = {f.name for f in path.iterdir() if "traces" in f.name or "report" in f.name}
    assert names == {"distill_report.json", "traces.jsonl", "again_distill_report.json",
                     "again_traces.jsonl"}  # fmt: skip


def test_check_says_what_is_kept(tmp_path: Path) -> None:
    rows = [asked("1?", "one", answer="one"), asked("2?", "two", answer="2"), {"x": 1}]
    given = config(tmp_path, rows, keys={"threshold": 1}, reward_setup=RIGHT)
    text = check(TrainingConfig.model_validate(given))
    assert "kept 1 of 3 conversations (2 calls), 1 messages to train" in text
    assert "1  malformed" in text and "1  threshold" in text
    assert "2 steps of 2, " in text
    unscored = config(tmp_path, rows, reward_setup=RIGHT)
    lines = list(describe_traces(TrainingConfig.model_validate(unscored)))
    assert "note: reward_setup scores no trace: distillation.threshold is not set" in lines
    judge = {"llm_judge": {"params": {"model": "m", "base_url": "http://127.0.0.1:9"}}}
    judged = {"rollout_reward_configs": judge}
    asking = config(tmp_path, rows, keys={"threshold": 1}, reward_setup=judged)
    lines = list(describe_traces(TrainingConfig.model_validate(asking)))
    assert "not scored here: the reward llm_judge asks an endpoint" in lines


def test_5000_traces_take_seconds(tmp_path: Path) -> None:
    rows = []
    for a in range(2500):
        first = [user(f"{a}+1?")]
        second = [*first, said("I add."), user("And?")]
        rows.append(exchange("a", first, said("I add."), session=str(a)))
        rows.append(exchange("a", second[2:], said(str(a + 1)), session=str(a)))
        rows.append({"messages": first, "response": "I count."})
        rows.append({"messages": [*first, said("I count."), user("And?")], "response": str(a)})
    setup = {"rollout_reward_configs": RIGHT["rollout_reward_configs"]}
    data = config(tmp_path, rows, keys={"threshold": 0, "per_prompt": 2}, reward_setup=setup)
    checked = TrainingConfig.model_validate(data)
    started = time.perf_counter()
    first_line = next(iter(describe_traces(checked)))
    assert "kept 5,000 of 5,000 conversations (10,000 calls)" in first_line
    assert time.perf_counter() - started < 30
