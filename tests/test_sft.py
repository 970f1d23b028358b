"""Stages of SFT: streams, the loss of held-out traces, and evaluations of what the policy does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import retrain
from retrain.config.environment import ToolEnvironmentConfig
from retrain.config.root import TrainingConfig
from retrain.config.stages import SFTConfig
from retrain.data import Trace, load_traces
from retrain.loops.check import check
from retrain.loops.context import RunContext
from retrain.loops.run import STAGES
from retrain.loops.sft import SFTStage, trace_samples
from retrain.loops.validation import hold_out
from retrain.loops.world import build_renderer, build_sandbox, tool_schemas
from retrain.models import load_policy
from retrain.rollout import to_samples
from retrain.types import Message, MessageType, UserError
from runs import hyperparameters, metrics_of, rl_config, rollouts_of, sft_section, traces

EVALUATION = {
    "prompt_source": {"type": "python", "function": "runs:questions", "params": {"n": 3}},
    "every_steps": 2,
    "modes": [{"name": "T=1", "temperature": 1.0}],
}


def written(path: Path, n: int = 40, skip: int = 0) -> str:
    rows = list(traces(skip + n))[skip:]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(output_dir: Path, dataset: str, /, **changed: Any) -> dict[str, Any]:
    """Four steps of SFT on a file; RL would have one short step."""
    sections = {k: changed.pop(k) for k in ("evaluation", "checkpoint", "stages") if k in changed}
    section = sft_section(**{"dataset": dataset, "steps": 4, "batch_size": 4, **changed})
    settings = {"hyperparameters": hyperparameters(steps=1)}
    return rl_config(output_dir, sft=section, algorithm=settings, **sections)


def ran(output_dir: Path, dataset: str, /, **changed: Any) -> retrain.RunResult:
    return retrain.run_sync(config(output_dir, dataset, **changed), only="sft")


def tokens(result: retrain.RunResult) -> list[float]:
    return [row["tokens"] for row in metrics_of(result.path, "sft")]


def weights(result: retrain.RunResult) -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None
    return load_file(result.checkpoint / "model.safetensors")


def assert_same_weights(one: retrain.RunResult, other: retrain.RunResult) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# Streams


def test_a_stream_in_order_trains_as_the_file_does(tmp_path: Path) -> None:
    data = written(tmp_path / "t.jsonl", 10)  # four steps of four go into the second epoch
    listed = ran(tmp_path, data, shuffle=False)
    streamed = ran(tmp_path, data, shuffle=False, streaming=True)
    assert tokens(listed) == tokens(streamed)
    assert_same_weights(listed, streamed)
    mixed = ran(tmp_path, data, streaming=True, shuffle_buffer=5)
    assert tokens(mixed) != tokens(listed)
    assert tokens(ran(tmp_path, data, streaming=True)) != tokens(mixed)  # among 1,000


def endless(n: int) -> Iterator[dict[str, Any]]:
    while True:
        yield from traces(n)


def test_a_function_without_end_streams(tmp_path: Path) -> None:
    result = ran(tmp_path, "test_sft:endless", params={"n": 8}, streaming=True, shuffle_buffer=4)
    assert len(tokens(result)) == 4


def test_check_says_that_it_streams(tmp_path: Path) -> None:
    stages = [{"kind": "sft"}]
    data = written(tmp_path / "t.jsonl")
    given = config(tmp_path, data, streaming=True, stages=stages)
    assert f"traces: streamed from {data}" in check(retrain.load_config(given))
    given = config(tmp_path, data, holdout=0.25, stages=stages, evaluation=EVALUATION)
    said = check(retrain.load_config(given))
    assert "held out:" in said and "modes: T=1" in said and "environment: smolagent" in said


def test_what_a_stream_cannot_do_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path / "t.jsonl")
    for changed, message in (
        ({"steps": None}, "streaming needs steps"),
        ({"holdout": 0.1}, "holdout needs every trace in memory"),
        ({"shuffle": False, "shuffle_buffer": 3}, "shuffle_buffer acts only with"),
    ):
        with pytest.raises(UserError, match=message):
            retrain.load_config(config(tmp_path, data, **{"streaming": True, **changed}))
    with pytest.raises(UserError, match="shuffle_buffer acts only with streaming: true"):
        retrain.load_config(config(tmp_path, data, shuffle_buffer=3))
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(UserError, match="JSON, which can only be read as a whole"):
        ran(tmp_path, str(tmp_path / "t.json"), streaming=True)


def test_a_bad_row_of_a_stream_ends_the_run_with_what_was_learnt(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = Path(written(path, 24)).read_text().splitlines(keepends=True)
    path.write_text("".join([*rows[:18], '{"messages": 3}\n', *rows[18:]]))
    given = config(tmp_path / "a", str(path), shuffle=False, streaming=True, steps=6)
    with pytest.raises(UserError, match=r"t\.jsonl, line 19: column 'messages' holds int"):
        retrain.run_sync(given, only="sft")
    path.write_text("".join(rows))
    resumed = retrain.run_sync(given, only="sft", resume="latest")
    assert len(tokens(resumed)) == 6
    whole = ran(tmp_path / "b", str(path), shuffle=False, streaming=True, steps=6)
    assert_same_weights(resumed, whole)


def test_calls_without_tools_are_found_when_they_come(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    row = {"prompt": "2+2?", "completion": "4"}
    lines = [*[row] * 20, {"messages": said}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = config(tmp_path, str(path), shuffle=False, streaming=True, steps=6)
    with pytest.raises(UserError, match=r"line 21: it calls tools, but the environment has none"):
        retrain.run_sync(given | {"environment": {"type": "qa"}}, only="sft")


def test_a_stream_of_traces_that_are_all_too_long_ends(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "2?", "completion": "9 " * 400}) + "\n")
    with pytest.raises(UserError, match="no trace of epoch 1 fits the context of 192 tokens"):
        ran(tmp_path, str(path), streaming=True)


def test_the_columns_are_those_named(tmp_path: Path) -> None:
    def trained(row: dict[str, Any], **changed: Any) -> float:
        path = tmp_path / "t.jsonl"
        path.write_text(json.dumps(row) + "\n")
        given = {"steps": 1, "batch_size": 1, "validation": str(path), **changed}
        result = ran(tmp_path, str(path), **given)
        return validation(result)[0]

    plain = trained({"prompt": "2+3?", "completion": "5"})
    assert plain == trained(
        {"q": "2+3?", "a": "5", "prompt": "no", "completion": "none"},
        prompt_column="q",
        completion_column="a",
    )
    said = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    assert plain == trained({"chat": said, "messages": "no"}, messages_column="chat")
    system = {"role": "system", "content": "Add."}
    told = trained({"messages": [system, *said]})
    assert told != plain
    assert told == trained({"messages": said}, system_prompt="Add.")
    with pytest.raises(UserError, match="line 1: a trace needs the column 'chat', or 'prompt'"):
        trained({"messages": said}, messages_column="chat")


# Sources of one's own


class Countless:
    """Traces that nobody has counted, as an import of another agent's log may give them."""

    def epoch(self, n: int) -> Iterator[Trace]:
        for i in range(6):
            said = (
                Message(f"{n}.{i}?", MessageType.MESSAGE, role="user"),
                Message(str(i), MessageType.MODEL),
            )
            yield Trace(f"{n}.{i}", said)

    def __len__(self) -> int:
        raise TypeError("nobody knows")

    def preview(self) -> list[Trace]:
        return list(self.epoch(0))[:2]


def test_a_stage_takes_traces_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(name: str, config: TrainingConfig, context: RunContext) -> SFTStage:
        assert config.sft is not None
        return SFTStage.of(name, config, context, config.sft, Countless())

    monkeypatch.setitem(STAGES, "sft", prepare)
    assert len(tokens(ran(tmp_path, "a:b"))) == 4
    with pytest.raises(UserError, match="nobody knows when an epoch ends"):
        ran(tmp_path, "a:b", steps=None)
    with pytest.raises(UserError, match="no share of them is known"):
        ran(tmp_path, "a:b", holdout=0.5)


# The loss of held-out traces


def validation(result: retrain.RunResult) -> dict[int, float]:
    rows = metrics_of(result.path, "sft-validation")
    return {int(row["step"]): row["validation/loss"] for row in rows}


def test_validation_loss_is_that_of_the_formula(tmp_path: Path) -> None:
    """Of the checkpoint, by the model's own forward pass, over the model's tokens alone."""
    held_out = written(tmp_path / "v.jsonl", 7, skip=40)
    result = ran(tmp_path, written(tmp_path / "t.jsonl"), validation=held_out)
    found = validation(result)
    assert list(found) == [0, 4] and found[4] < found[0]
    given = retrain.load_config(
        config(tmp_path, held_out) | {"model": {"name_or_path": str(result.checkpoint)}}
    )
    policy = load_policy(given.model, seed=0)
    model, renderer = policy.model.eval(), build_renderer(given, policy)
    assert isinstance(given.environment, ToolEnvironmentConfig)
    schemas = tool_schemas(given.environment.tool_list(), build_sandbox(given))
    total, count = 0.0, 0
    for sample in (s for t in load_traces(held_out) for s in trace_samples(t, renderer, schemas)):
        ids = torch.tensor([list(sample.token_ids)])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        for t, trains in enumerate(sample.loss_mask):
            if trains:
                total -= float(logprobs[t - 1, ids[0, t]])
                count += 1
    assert found[4] == pytest.approx(total / count, abs=1e-5)


def test_when_it_is_scored_and_that_it_changes_nothing(tmp_path: Path) -> None:
    data = written(tmp_path / "t.jsonl")
    plain = ran(tmp_path, data)
    scored = ran(tmp_path, data, validation=data, validation_every_steps=2)
    assert list(validation(scored)) == [0, 2, 4]
    assert tokens(scored) == tokens(plain)
    assert_same_weights(scored, plain)
    first, last = metrics_of(scored.path, "sft")[0], validation(scored)
    whole = ran(tmp_path, data, validation=data, batch_size=40, steps=1)
    assert metrics_of(whole.path, "sft")[0]["loss"] == pytest.approx(last[0], abs=1e-5)
    assert first["loss"] != pytest.approx(last[0], abs=1e-5)


def test_a_share_is_held_out_by_what_was_asked(tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}?", "completion": f"{a}{end}"} for a in range(300) for end in ("", "!")]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_traces(path)
    settings = SFTConfig(dataset="t.jsonl", holdout=0.2)
    train, held_out = hold_out(settings, data)
    assert isinstance(train, list) and len(train) + len(held_out) == 600
    assert 40 < len(held_out) / 2 < 80, "a fifth of 300 questions"
    asked, scored = ({t.messages[0].content for t in part} for part in (train, held_out))
    assert not asked & scored and len(asked | scored) == 300
    assert hold_out(settings, data[:100])[1] == [t for t in held_out if t in data[:100]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    left = len(hold_out(settings, data[:40])[0])
    result = ran(tmp_path, str(path), steps=None, batch_size=1, holdout=0.2)
    assert len(tokens(result)) == left < 40
    assert list(validation(result)) == [0, left]


def test_the_best_checkpoint_is_that_of_the_least_validation_loss(tmp_path: Path) -> None:
    keep = {"every_steps": 1, "keep_last": 1,
            "keep_best": {"metric": "validation/loss", "mode": "min"}}  # fmt: skip
    data = written(tmp_path / "t.jsonl", 4)
    other = written(tmp_path / "v.jsonl", 4, skip=100)
    given = {"validation": other, "validation_every_steps": 1, "learning_rate": 0.05, "steps": 8}
    result = ran(tmp_path, data, checkpoint=keep, **given)
    losses = validation(result)
    best = min(range(1, 8), key=losses.__getitem__)
    kept = {path.name for path in (result.path / "checkpoints").iterdir()}
    assert kept == {"sft", "sft-000007", f"sft-{best:06d}"}


def test_what_cannot_be_held_out_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path / "t.jsonl")
    for changed, message in (
        ({"validation": data, "holdout": 0.1}, "validation and holdout both say"),
        ({"validation_every_steps": 2}, "validation_every_steps does nothing without"),
    ):
        with pytest.raises(UserError, match=message):
            retrain.load_config(config(tmp_path, data, **changed))
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": "2?", "completion": "2"}) + "\n")
    for holdout, missing in ((0.999, "train on"), (1e-6, "score")):
        with pytest.raises(UserError, match=f"of 1 traces leaves none to {missing}"):
            ran(tmp_path, str(one), holdout=holdout)
    one.write_text(json.dumps({"prompt": "2?", "completion": "2 " * 500}) + "\n")
    with pytest.raises(UserError, match="no held-out trace fits the context of 192 tokens"):
        ran(tmp_path, data, validation=str(one))


# Evaluations of what the policy does


def test_sft_is_evaluated_by_acting_on_the_way(tmp_path: Path) -> None:
    data = written(tmp_path / "t.jsonl")
    plain, acting = ran(tmp_path, data), ran(tmp_path, data, evaluation=EVALUATION)
    rows = metrics_of(acting.path, "sft-eval")
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["eval/T=1/n"] == 3 for row in rows)
    assert tokens(acting) == tokens(plain)
    assert_same_weights(acting, plain)
    acted = rollouts_of(acting.path, "sft-eval-T_1")
    for step, rollouts in acted.items():
        versions = {v for r in rollouts for s in r.segments for v in s.versions if v >= 0}
        assert versions == {step}, "the policy as it was after that step"
        assert all(to_samples(rollout) for rollout in rollouts)
    assert math.isfinite(rows[-1]["eval/T=1/reward"])


def test_a_config_of_sft_and_evaluation_is_evaluated_before_and_after(tmp_path: Path) -> None:
    given = config(tmp_path, written(tmp_path / "t.jsonl"), evaluation=EVALUATION)
    del given["prompt_source"]
    result = retrain.run_sync(given)
    assert [e.stage for e in result.evaluations] == ["before", "after"]
    assert [row["step"] for row in metrics_of(result.path, "sft-eval")] == [2, 4]


def test_a_stage_of_its_own_may_go_without(tmp_path: Path) -> None:
    stages = [{"kind": "sft", "evaluation": {"every_steps": None}}, {"kind": "rl"}]
    given = config(
        tmp_path, written(tmp_path / "t.jsonl"), evaluation={**EVALUATION, "every_steps": 1},
        stages=stages,
    )  # fmt: skip
    result = retrain.run_sync(given)
    assert metrics_of(result.path, "sft-eval") == []
    assert [row["step"] for row in metrics_of(result.path, "rl-eval")] == [1]
