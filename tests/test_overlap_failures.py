"""Rollouts that overlap training, and what goes wrong: staleness, failures, and being stopped."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import retrain
from killing import KillServer
from retrain.engines.base import Completion, GenerateRequest
from retrain.engines.torch_engine import TorchEngine
from retrain.learner import NotFiniteError
from retrain.loops.update import PolicyUpdate
from retrain.tracking.rollouts import read_records
from retrain.types import InfrastructureError, Rollout, UserError
from runs import metrics_of
from test_overlap_run import UNSHUFFLED, World, config, expected_order, order_of, step_of


class Behind(TorchEngine):
    """Of each group's first rollout every token is said to be from the very first weights, as of a
    replica that missed its updates."""

    async def generate(self, request: GenerateRequest) -> Completion:
        got = await super().generate(request)
        if not str(request.session).endswith("/0"):
            return got
        old = array("i", [0]) * len(got.versions)
        return Completion(got.token_ids, got.logprobs, old, got.finish_reason)


def with_engine(monkeypatch: pytest.MonkeyPatch, kind: type[TorchEngine]) -> None:
    monkeypatch.setattr(
        "retrain.loops.run.build_engine",
        lambda config, policy: kind(policy.model, tokenizer=policy.tokenizer, own_weights=True),
    )


@pytest.mark.parametrize(("staleness", "least"), [(0, None), (1, None), (1, 3)])
def test_stale_rollouts_are_dropped_and_counted_and_are_no_failures(
    staleness: int,
    least: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with_engine(monkeypatch, Behind)
    sections = {"rollout": {"min_group_size": least}}
    run = retrain.run_sync(config(tmp_path, staleness, sections=sections)).path
    for step, row in enumerate(metrics_of(run), 1):
        late = step - 1 > staleness
        records = list(read_records(run / "rollouts" / f"rl-{step:06d}.jsonl.gz"))
        assert row["rollouts/stale"] == 2 * late and row["rollouts/masked"] == 0
        learnt = 2 if least == 3 else 5  # nothing trains from the third step on
        assert row["staleness/steps_max"] == min(step - 1, learnt)
        assert row["groups/too_small"] == (2 if late and least == 3 else 0)
        trained = [bool(record.get("advantages")) for record in records]
        assert trained[0::3] == [not late] * 2 or not any(trained)
        assert all(record.get("error") is None for record in records)
        assert ("loss" not in row) == (late and least == 3)
    assert not (run / "failures.jsonl").exists()
    assert f"rl step {staleness + 2}: 2 of 6 rollouts do not train" in caplog.text


# What goes wrong


class Blocked(World):
    """The first step's rollouts never end; the second step's do."""

    async def wait(self, rollout: Rollout, turn: int) -> None:
        if step_of(rollout) == 1:
            await asyncio.Event().wait()


def raises_for_the_second_step(rollout: Rollout) -> float:
    raise KeyError("oops")


def run_and_look(settings: dict[str, Any]) -> tuple[BaseException, list[dict[str, Any]]]:
    """What ended a run, and what asyncio complained of; nothing may be left running."""
    complaints: list[dict[str, Any]] = []

    async def main() -> BaseException:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, about: complaints.append(about))
        with pytest.raises(BaseException) as ended:
            await retrain.run(settings)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return ended.value

    error = asyncio.run(main())
    return error, complaints


def test_a_reward_that_raises_in_the_background_ends_the_run_at_once(tmp_path: Path) -> None:
    sections = {
        "environment": {"type": "python", "path": "test_overlap_failures:Blocked"},
        "prompt_source": UNSHUFFLED,
        "reward_setup": {
            "rollout_reward_configs": {
                "bad": {"function": "test_overlap_failures:raises_for_the_second_step"}
            }
        },
    }
    error, complaints = run_and_look(config(tmp_path, sections=sections))
    assert isinstance(error, UserError) and "reward 'bad'" in str(error) and "oops" in str(error)
    assert complaints == []
    assert not (tmp_path / "t-001" / "metrics.jsonl").exists()


def test_a_loss_that_is_not_finite_surfaces_from_the_learners_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = PolicyUpdate.learn

    def fails(self: PolicyUpdate, samples: Any, step: int, changed: Callable[[], None]) -> Any:
        if step == 3:
            raise NotFiniteError("the loss is nan after 2 updates", "Look.", samples)
        return learn(self, samples, step, changed)

    monkeypatch.setattr(PolicyUpdate, "learn", fails)
    error, complaints = run_and_look(config(tmp_path))
    assert isinstance(error, UserError) and complaints == []
    assert str(error).startswith("rl step 3: the loss is nan after 2 updates; its batch: ")
    run = tmp_path / "t-001"
    assert len(metrics_of(run)) == 2 and list((run / "not_finite").iterdir())
    assert (run / "checkpoints" / "rl-000002").is_dir(), "what was learnt is kept"
    monkeypatch.undo()
    settings = config(tmp_path)
    retrain.run_sync(settings, resume="latest")
    assert order_of(run) == expected_order(settings, 10)


class Dying(TorchEngine):
    """Loses everything that it is asked for after the second step."""

    async def generate(self, request: GenerateRequest) -> Completion:
        if self.version >= 2:
            raise InfrastructureError("the engine is gone")
        return await super().generate(request)


def test_lost_steps_end_the_run_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_engine(monkeypatch, Dying)
    lost = {"rollout": {"retries": 0, "max_lost_steps": 2}}
    settings = config(tmp_path, steps=8, sections=lost)
    error, complaints = run_and_look(settings)
    assert "every rollout of the last 2 steps was lost" in str(error) and complaints == []
    rows = metrics_of(tmp_path / "t-001")
    assert [row["rollouts/masked"] for row in rows[-2:]] == [6, 6]
    monkeypatch.undo()
    retrain.run_sync(settings, resume="latest")
    assert order_of(tmp_path / "t-001") == expected_order(settings, 16)


# Resuming


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KillServer]:
    with KillServer(tmp_path_factory.mktemp("server"), hash_seed=1) as started:
        yield started


@pytest.mark.parametrize("number", [2, 15, 9], ids=["SIGINT", "SIGTERM", "SIGKILL"])
def test_stopped_anywhere_and_resumed_no_task_is_lost_or_repeated(
    number: int, server: KillServer, tmp_path: Path
) -> None:
    settings = config(
        tmp_path,
        1,
        steps=12,
        dynamic_sampling_rounds=1,
        sections={"checkpoint": {"every_steps": 3}},
    )
    run = tmp_path / "t-001"
    codes = []
    for lines in (2, 4, 7):
        after = [str(run / "metrics.jsonl"), lines]
        codes.append(server.run(settings, "auto", after_lines=after, after_s=0.01, signal=number))
    assert codes == [-9 if number == 9 else 128 + number] * 3, server.said()
    assert server.run(settings, "auto") == 0, server.said()
    said = server.said()
    assert "rollouts overlap training in rl (max_staleness 1): a resumed run is not the" in said
    assert "not bit for bit what it would have been: the engine is not deterministic" in said
    assert "never retrieved" not in said and "Task was destroyed" not in said
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert max(row["staleness/steps_max"] for row in rows) == 1
    order = order_of(run)
    assert order == expected_order(settings, len(order))
