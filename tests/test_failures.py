"""Faults in real runs: what the policy and the user see, and what the run does about them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import retrain
from faults import (
    FINISHED,
    DyingEngine,
    FailsInForward,
    answer_by,
    failures_of,
    run_scripted,
    sample_of,
    small_run,
)
from retrain.engines.torch_engine import TorchEngine
from retrain.loops import run as runs_module
from retrain.rewards import RewardFailure
from retrain.types import UserError
from runs import hyperparameters, metrics_of, rl_config, rollouts_of
from sandboxes import need_jail
from test_sandbox_jail import zygote_of

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Of coroutines that ignore their end, as some here do on purpose."""

TOOLS: dict[str, tuple[str, str]] = {
    "fine": ("ok", "7"),
    "raises": ("tool_error", "ValueError: bad input"),
    "hangs": ("timeout", "hangs gave no result within 0.5 s."),
    "waits": ("timeout", "waits gave no result within 0.5 s."),
    "huge": ("ok", f"{'y' * 30}\n... [9999940 characters left out] ...\n{'y' * 30}"),
    "table": ("ok", '{"a": [7, null, 1.5]}'),
    "raw": ("ok", "ok \ufffd"),
    "cyclic": ("ok", "[1, [...]]"),
    "exits": ("tool_error", "SystemExit: 3"),
    "mute": ("tool_error", "Unshowable: (its message cannot be shown: ValueError)"),
}
"""What the model reads of each, in the order of the samples."""


async def call_a_tool(session: str, turn: int, attempt: int) -> str:
    name = list(TOOLS)[sample_of(session)]
    call = json.dumps({"name": name, "arguments": {"x": 7}})
    return f"<code>{call}</code>" if turn == 0 else f"done {sample_of(session)}"


def test_what_the_model_reads_of_a_tool_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        "type": "smolagent",
        "tools": [f"faults:{name}" for name in TOOLS],
        "tool_timeout_s": 0.5,
        "max_output_chars": 60,
    }
    algorithm = {"hyperparameters": hyperparameters(steps=1, group_size=len(TOOLS))}
    config = small_run(tmp_path, environment=environment, algorithm=algorithm)
    began = time.perf_counter()
    result = run_scripted(monkeypatch, config, call_a_tool)
    assert time.perf_counter() - began < 15
    rollouts = rollouts_of(result.path)[1]
    assert len(rollouts) == 2 * len(TOOLS)
    for rollout in rollouts:
        status, text = list(TOOLS.values())[sample_of(rollout.id)]
        assert rollout.messages[-2].content == text
        assert rollout.metrics[f"tool_calls/{status}"] == 1
        assert rollout.messages[-1].content == f"done {sample_of(rollout.id)}"
        assert rollout.stop_reason == "answered" and rollout.error is None
    row = metrics_of(result.path)[0]
    assert row["rollouts/masked"] == row["rollouts/retried"] == row["groups/too_small"] == 0
    assert row["tool_calls/timeout/mean"] == 2 / len(TOOLS)
    assert failures_of(result.path) == []


def test_a_tool_whose_infrastructure_is_away_masks_its_rollouts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def say(session: str, turn: int, attempt: int) -> str:
        return "<code>7</code>" if turn == 0 and sample_of(session) == 1 else "12"

    environment = {"type": "smolagent", "tools": ["faults:away"], "tool_retries": 0}
    config = small_run(tmp_path, rollout={"retries": 1}, environment=environment)
    result = run_scripted(monkeypatch, config, say)
    row = metrics_of(result.path)[0]
    assert (row["rollouts/masked"], row["masked/tool"], row["rollouts/retried"]) == (2, 2, 2)
    assert row["groups/too_small"] == 0
    masked = [r for r in rollouts_of(result.path)[1] if r.error]
    assert [sample_of(r.id) for r in masked] == [1, 1]
    cause = "InfrastructureError: 503 from the index"
    assert masked[0].error == f"{cause} (2 attempts)"
    assert [(f.kind, f.attempt) for f in masked[0].failures] == [("tool", 1), ("tool", 2)]
    assert failures_of(result.path)[:2] == [
        {"stage": "rl", "step": 1, "rollout": masked[0].id, "kind": "tool", "attempt": n,
         "masked": n == 2, "cause": cause}
        for n in (1, 2)
    ]  # fmt: skip


def test_a_sandbox_that_dies_costs_an_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_jail()
    made: list[Any] = []
    killed: list[str] = []
    build = runs_module.build_sandbox

    def remembered(config: Any) -> Any:
        made.append(build(config))
        return made[-1]

    async def say(session: str, turn: int, attempt: int) -> str:
        if turn == 1 and attempt == 1 and not killed:
            killed.append(session)
            os.kill(await zygote_of(made[0]), signal.SIGKILL)
            await asyncio.sleep(0.3)
        return (f"<code>x = {sample_of(session)}</code>", "<code>x + 1</code>", "12")[turn]

    monkeypatch.setattr("retrain.loops.run.build_sandbox", remembered)
    sandbox = {"type": "jail", "packages": []}
    environment = {"type": "smolagent", "tools": ["python"], "max_steps": 3, "tool_retries": 0}
    config = small_run(tmp_path, sandbox=sandbox, environment=environment)
    result = run_scripted(monkeypatch, config, say)
    rollouts = rollouts_of(result.path)[1]
    assert [r.messages[4].content for r in rollouts] == ["1", "2", "3"] * 2
    assert [r.error for r in rollouts] == [None] * 6
    row = metrics_of(result.path)[0]
    assert row["rollouts/masked"] == 0 and row["rollouts/retried"] >= 1
    assert {f["kind"] for f in failures_of(result.path)} == {"sandbox"}
    assert not any(f["masked"] for f in failures_of(result.path))


def run_with_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: FailsInForward
) -> retrain.RunResult:
    def build(config: Any, policy: Any) -> TorchEngine:
        policy.model.get_submodule("model.layers.0").register_forward_pre_hook(hook)
        return TorchEngine(policy.model, tokenizer=policy.tokenizer)

    monkeypatch.setattr("retrain.loops.run.build_engine", build)
    return retrain.run_sync(rl_config(tmp_path))


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """Its numbers, but for those of time and of the engine."""
    left_out = ("stage", "seconds", "tokens_per_s", "engine")
    return {k: v for k, v in row.items() if not k.startswith(left_out)}


def test_an_engine_that_dies_mid_batch_restarts_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counting = FailsInForward(at=0)
    calm = run_with_hook(tmp_path, monkeypatch, counting)
    with caplog.at_level(logging.WARNING, "retrain"):
        broken = run_with_hook(tmp_path, monkeypatch, FailsInForward(at=counting.calls - 2))
    assert [r.message for r in caplog.records if "restarts" in r.message] == [
        "decoding failed: RuntimeError: device lost; the engine restarts, "
        "6 requests are issued again"
    ]
    for step, expected in rollouts_of(calm.path).items():
        found = rollouts_of(broken.path)[step]
        assert [r.full_token_ids() for r in found] == [r.full_token_ids() for r in expected]
        assert [r.error for r in found] == [None] * 6
    calm_rows, rows = metrics_of(calm.path), metrics_of(broken.path)
    assert [row.get("engine/restarts") for row in rows] == [None, 1]
    for row, expected_row in zip(rows, calm_rows, strict=True):
        assert comparable(row) == pytest.approx(comparable(expected_row), rel=1e-4, abs=1e-5)


def test_an_engine_that_stays_dead_loses_a_step_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DyingEngine, "failures", 4)
    monkeypatch.setattr(
        "retrain.loops.run.build_engine",
        lambda _, policy: DyingEngine(policy.model, tokenizer=policy.tokenizer),
    )
    result = retrain.run_sync(rl_config(tmp_path, rollout={"retries": 0}))
    first, second = metrics_of(result.path)
    assert first["rollouts/masked"] == first["masked/engine"] == 6
    assert first["groups/too_small"] == 2 and first["engine/restarts"] == 3
    assert "loss" not in first and "reward/mean" not in first
    assert second["rollouts/masked"] == 0 and "loss" in second
    assert {r.error for r in rollouts_of(result.path)[1]} == {
        "InfrastructureError: decoding failed: RuntimeError: device lost (after 3 restarts)"
    }


def test_an_engine_that_hangs_on_a_turn_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def say(session: str, turn: int, attempt: int) -> str:
        if attempt == 1 and sample_of(session) == 2:
            await asyncio.sleep(60)
        return "12"

    config = small_run(tmp_path, rollout={"turn_timeout_s": 0.2}, environment={"type": "qa"})
    result = run_scripted(monkeypatch, config, say)
    row = metrics_of(result.path)[0]
    assert (row["rollouts/masked"], row["rollouts/retried"]) == (0, 2)
    assert [(f["kind"], f["cause"]) for f in failures_of(result.path)] == [
        (
            "engine",
            "InfrastructureError: the engine gave no turn within 0.2 s (rollout.turn_timeout_s)",
        )
    ] * 2


@pytest.mark.parametrize("heeds", [True, False])
def test_an_environment_that_hangs_delays_its_own_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heeds: bool
) -> None:
    monkeypatch.setattr("retrain.rollout.sampling.GRACE_S", 0.1)
    FINISHED.clear()
    environment = {"type": "python", "path": "faults:Hangs", "params": {"heeds": heeds}}
    config = small_run(tmp_path, rollout={"timeout_s": 0.5}, environment=environment)
    result = run_scripted(monkeypatch, config, answer)
    row = metrics_of(result.path)[0]
    assert (row["rollouts/masked"], row["masked/deadline"], row["rollouts/retried"]) == (2, 2, 0)
    assert row["tokens/trained"] > 0
    rollouts = rollouts_of(result.path)[1]
    assert [r.error for r in rollouts if sample_of(r.id) == 0] == [
        "OutOfTime: the rollout did not end within 0.5 s (rollout.timeout_s); "
        "it was in the environment after turn 1"
    ] * 2
    assert not any(r.error for r in rollouts if sample_of(r.id) > 0)
    own = [r.id for r in rollouts if sample_of(r.id) == 0]
    assert (set(own) <= set(FINISHED)) == heeds


async def answer(session: str, turn: int, attempt: int) -> str:
    return answer_by(sample_of(session))


def test_a_finish_that_hangs_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("retrain.envs.base.FINISH_S", 0.2)
    environment = {"type": "python", "path": "faults:Hangs", "params": {"where": "finish"}}
    config = small_run(tmp_path, environment=environment)
    with caplog.at_level(logging.WARNING, "retrain"):
        result = run_scripted(monkeypatch, config, answer)
    assert metrics_of(result.path)[0]["rollouts/masked"] == 0
    late = [r.message for r in caplog.records if r.name == "retrain.envs.base"]
    own = [r.id for r in rollouts_of(result.path)[1] if sample_of(r.id) == 0]
    assert sorted(late) == sorted(
        f"Hangs.finish of rollout {one} is not done after 0.2 s, and is left behind" for one in own
    )


def test_a_run_that_loses_every_rollout_stops_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        "type": "python",
        "path": "faults:Hangs",
        "params": {"where": "reset", "all_of_them": True},
    }
    algorithm = {"hyperparameters": hyperparameters(steps=5)}
    config = small_run(
        tmp_path,
        rollout={"timeout_s": 0.2, "max_lost_steps": 2},
        environment=environment,
        algorithm=algorithm,
    )
    with pytest.raises(UserError) as failure:
        run_scripted(monkeypatch, config, answer)
    run = tmp_path / "t-001"
    assert failure.value.cause == (
        "rl step 2: every rollout of the last 2 steps was lost; the first cause: OutOfTime: "
        "the rollout did not end within 0.2 s (rollout.timeout_s); it was in the environment after "
        "turn 0"
    )
    assert f"{run / 'failures.jsonl'} lists them" in failure.value.next_step
    assert "--resume" in failure.value.next_step and "max_lost_steps" in failure.value.next_step
    assert [row["masked/deadline"] for row in metrics_of(run)] == [6, 6]
    assert len(failures_of(run)) == 12 and len(rollouts_of(run)) == 2


@pytest.mark.parametrize("on_error", ["stop", "mask", "penalty"])
def test_a_reward_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    setup = {
        "rollout_reward_configs": {"mine": {"function": "runs:raises_sometimes"}},
        "on_error": on_error,
        **({"error_penalty": -2.0} if on_error == "penalty" else {}),
    }
    config = small_run(tmp_path, reward_setup=setup, environment={"type": "qa"})
    if on_error == "stop":
        with pytest.raises(RewardFailure, match="reward 'mine' failed: KeyError: 'oops'"):
            run_scripted(monkeypatch, config, answer)
        return
    result = run_scripted(monkeypatch, config, answer)
    row = metrics_of(result.path)[0]
    first = [r for r in rollouts_of(result.path)[1] if sample_of(r.id) == 0]
    if on_error == "mask":
        assert (row["rollouts/masked"], row["masked/reward"]) == (2, 2)
        assert [f["kind"] for f in failures_of(result.path)] == ["reward"] * 2
        assert all("KeyError" in str(r.error) and r.messages for r in first)
        assert row["reward/mean"] == pytest.approx(0.75)  # of "1a" and "12" alone
    else:
        assert row["rollouts/masked"] == 0 and [r.reward for r in first] == [-2.0] * 2
        assert row["reward/mean"] == pytest.approx((-2.0 + 0.5 + 1.0) / 3)


@pytest.mark.parametrize(
    ("function", "masked", "cause"),
    [
        ("remote_reward", ["0/0", "1/0"], "reward 'mine': no judge"),
        ("slow_reward", ["0/0", "0/1", "0/2"], "the group was not scored within 0.5 s"),
    ],
)
def test_a_reward_whose_infrastructure_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, masked: list[str], cause: str
) -> None:
    """`masked` is the parity of the task and the number of the sample."""
    setup = {"rollout_reward_configs": {"mine": {"function": f"faults:{function}"}}}
    config = small_run(
        tmp_path, rollout={"timeout_s": 0.5}, reward_setup=setup, environment={"type": "qa"}
    )
    config["prompt_source"]["params"] = {"n": 2}
    result = run_scripted(monkeypatch, config, answer)
    found = [r for r in rollouts_of(result.path)[1] if r.error]
    names = [f"{r.task.metadata['parity']}/{sample_of(r.id)}" for r in found if r.task]
    assert sorted(names) == masked and cause in str(found[0].error)
    row = metrics_of(result.path)[0]
    assert row["masked/reward"] == len(masked)
    assert row["groups/too_small"] == (1 if function == "slow_reward" else 0)
