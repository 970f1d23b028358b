"""Other policies, environments and data through the same loops."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import retrain
from retrain.learner import TorchLearner
from retrain.loops.trainer import SFTTrainer
from retrain.types import MessageType, Source, UserError
from runs import (
    RecordingEngine,
    hyperparameters,
    metrics_of,
    model_section,
    rl_config,
    rollouts_of,
    sft_section,
    traces,
)

LORA = {"r": 4, "alpha": 8}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[RecordingEngine]:
    """The engines of the runs that follow, in order."""
    built: list[RecordingEngine] = []

    def build(config: Any, policy: Any) -> RecordingEngine:
        built.append(RecordingEngine(policy.model, tokenizer=policy.tokenizer))
        return built[-1]

    monkeypatch.setattr("retrain.loops.run.build_engine", build)
    return built


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full model that has learned to end its turns."""
    config = rl_config(tmp_path_factory.mktemp("base"), sft=sft_section())
    checkpoint = retrain.run_sync(config, only="sft").checkpoint
    assert checkpoint is not None
    return checkpoint


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = torch.tensor([tokenizer.encode("User:\nWhat is 12+13?\n\nAssistant:\n<code>")])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def test_an_adapter_is_saved_as_one_and_loads(
    base: Path, tmp_path: Path, engines: list[RecordingEngine]
) -> None:
    steps = {"hyperparameters": hyperparameters(learning_rate=1e-2)}
    model = {"name_or_path": str(base), "peft": LORA, "gradient_checkpointing": True}
    result = retrain.run_sync(rl_config(tmp_path, model=model, algorithm=steps))
    assert result.checkpoint is not None
    assert (result.checkpoint / "adapter_config.json").is_file()
    assert not (result.checkpoint / "config.json").is_file()
    assert all(row["logprob_gap/max"] < 1e-4 for row in metrics_of(result.path))
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint)
    own = logits(engines[0].model, tokenizer)
    for loader in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        loaded = loader.from_pretrained(str(result.checkpoint))
        torch.testing.assert_close(logits(loaded, tokenizer), own, atol=1e-5, rtol=0)
    plain = logits(AutoModelForCausalLM.from_pretrained(base), tokenizer)
    assert (plain - own).abs().max() > 1e-3

    # an adapter on top of that one cannot name a base on disk: it is saved merged
    again = {"name_or_path": str(result.checkpoint), "peft": LORA}
    second = retrain.run_sync(rl_config(tmp_path, model=again, algorithm=steps))
    assert second.checkpoint is not None and (second.checkpoint / "config.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(second.checkpoint)
    torch.testing.assert_close(
        logits(loaded, tokenizer), logits(engines[1].model, tokenizer), atol=1e-4, rtol=0
    )


def test_merged_lora(base: Path, tmp_path: Path, engines: list[RecordingEngine]) -> None:
    config = rl_config(
        tmp_path,
        model={"name_or_path": str(base), "peft": LORA},
        algorithm={"hyperparameters": hyperparameters(learning_rate=1e-2)},
        checkpoint={"merge_lora": True},
    )
    result = retrain.run_sync(config)
    assert result.checkpoint is not None
    assert not (result.checkpoint / "adapter_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    own = logits(engines[0].model, tokenizer)
    torch.testing.assert_close(logits(loaded, tokenizer), own, atol=1e-4, rtol=0)


def test_gpt2_in_the_plain_format(tmp_path: Path) -> None:
    result = retrain.run_sync(
        rl_config(tmp_path, model=model_section("gpt2"), environment={"type": "qa"})
    )
    assert all(row["logprob_gap/max"] < 1e-4 for row in metrics_of(result.path))
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint)
    for rollout in rollouts_of(result.path)[1]:
        (span,) = rollout.segments[0].turns
        prompt = tokenizer.decode(rollout.full_token_ids()[: span.start])
        assert prompt.endswith("?\n\nAssistant:\n") and "What is" in prompt
        assert len(rollout.messages) == 2


def test_a_scripted_dialogue(base: Path, tmp_path: Path) -> None:
    user = {"type": "scripted", "replies": ["And 2+2?", "Thanks, bye."]}
    environment = {"type": "dialogue", "user": user, "max_turns": 4, "stop_phrase": "bye"}
    config = rl_config(
        tmp_path,
        model={"name_or_path": str(base)},
        environment=environment,
        algorithm={"hyperparameters": hyperparameters(max_new_tokens=16)},
    )
    result = retrain.run_sync(config)
    ended = [r for step in rollouts_of(result.path).values() for r in step]
    finished = [r for r in ended if r.stop_reason == "user_done"]
    assert finished and all(r.stop_reason in ("user_done", "length") for r in ended)
    for rollout in finished:
        said = [m.content for m in rollout.messages if m.type is MessageType.MESSAGE]
        assert said[1:] == ["And 2+2?", "Thanks, bye."]
    assert all(row["logprob_gap/max"] < 1e-4 for row in metrics_of(result.path))


def test_a_dialogue_that_a_model_plays(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    real = retrain.loops.players.load_policy
    monkeypatch.setattr(
        "retrain.loops.players.load_policy", lambda *a, **k: loads.append(a) or real(*a, **k)
    )
    user = {
        "type": "model",
        "model": {"name_or_path": str(base)},
        "system_prompt": "You asked {prompt} and know {answer}.",
        "max_new_tokens": 5,
    }
    source = {"type": "list", "prompts": ["What is 1+2?"], "answer_column": None}
    config = rl_config(
        tmp_path,
        model={"name_or_path": str(base)},
        environment={"type": "dialogue", "user": user, "max_turns": 2},
        algorithm={"hyperparameters": hyperparameters(max_new_tokens=16)},
        evaluation={"prompt_source": source, "every_steps": 2, "max_new_tokens": 3},
    )
    result = retrain.run_sync(config)
    assert len(loads) == 1, "three stages and two modes share the user's model"
    rollouts = [r for step in rollouts_of(result.path).values() for r in step]
    replied = [r for r in rollouts if len(r.model_messages) == 2]
    assert replied
    for rollout in replied:
        # the user's words are context in the policy's ledger
        sampled = sum(s == Source.SAMPLED for s in rollout.segments[-1].source)
        assert sampled <= 32 and rollout.messages[-2].type is MessageType.MESSAGE
    assert all(row["logprob_gap/max"] < 1e-4 for row in metrics_of(result.path))


def test_an_environment_of_ones_own(tmp_path: Path) -> None:
    environment = {"type": "python", "path": "runs:Countdown", "params": {"turns": 3}}
    result = retrain.run_sync(rl_config(tmp_path, environment=environment, reward_setup={}))
    rollouts = [r for step in rollouts_of(result.path).values() for r in step]
    for rollout in rollouts:
        assert rollout.messages[1].content == "3 turns left"
        assert rollout.reward == sum(rollout.env_rewards) == sum(rollout.step_rewards)
        assert len(rollout.env_rewards) == len(rollout.model_messages)
    full = [r for r in rollouts if r.stop_reason == "environment"]
    assert all(len(r.model_messages) == 3 for r in full)


def test_sft_trainer_on_a_file(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in traces(20)))
    config = rl_config(tmp_path, sft={"batch_size": 5, "epochs": 2, "learning_rate": 1e-2})
    del config["reward_setup"], config["algorithm"]
    with pytest.raises(UserError, match="dataset"):
        SFTTrainer(config).train()
    result = SFTTrainer(config).train(path)
    rows = metrics_of(result.path, "sft")
    assert len(rows) == 8 and rows[-1]["loss"] < rows[0]["loss"]
    assert result.checkpoint == result.path / "checkpoints" / "sft"


def test_a_context_limit_above_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="context_limit is 500; the model's own limit is 192"):
        retrain.run_sync(rl_config(tmp_path, engine={"context_limit": 500}))


def test_switching_off_tools_that_are_not_there_is_refused(tmp_path: Path) -> None:
    evaluation = {
        "prompt_source": {"type": "list", "prompts": ["a"]},
        "modes": [{"name": "x", "tools": False}],
    }
    config = rl_config(tmp_path, environment={"type": "qa"}, evaluation=evaluation)
    with pytest.raises(UserError, match="no tools to switch off"):
        retrain.run_sync(config)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_sees_the_future_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    from retrain.models.forward import is_causal
    from tiny import tiny_gpt2, tiny_qwen3

    torch.manual_seed(0)
    bert = BertLMHeadModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    assert not is_causal(bert.eval())
    assert is_causal(tiny_qwen3())
    assert is_causal(tiny_gpt2())
    damaged = tiny_gpt2()
    damaged.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="logits that are not finite"):
        is_causal(damaged)


def test_two_tasks_of_one_id_in_a_step_are_refused() -> None:
    from retrain.loops.pipeline import take_distinct
    from retrain.types import Task, UserError

    tasks = iter([(0, Task("a", ())), (0, Task("b", ())), (0, Task("a", ()))])
    assert [task.id for _, task in take_distinct(tasks, 2, set())] == ["a", "b"]
    with pytest.raises(UserError, match="two tasks have the id"):
        take_distinct(iter([(0, Task("a", ())), (0, Task("a", ()))]), 2, set())


def test_traces_with_calls_need_an_environment_with_tools() -> None:
    from retrain.config import load_config
    from retrain.data import Trace
    from retrain.loops.sft import check_calls
    from retrain.types import Message, MessageType, ToolCall, UserError

    call = Message("", MessageType.MODEL, tool_calls=(ToolCall("python", {"code": "1"}),))
    trace = Trace("t", (Message("x", MessageType.MESSAGE), call), place="t.jsonl, line 1")
    config = {"model": {"name_or_path": "x"}, "sft": {"dataset": "t.jsonl"}}
    with pytest.raises(UserError, match=r"t\.jsonl, line 1: it calls tools"):
        check_calls([trace], load_config(config, only="sft"))
    config["environment"] = {"type": "smolagent", "tools": ["python"]}
    check_calls([trace], load_config(config, only="sft"))


def test_an_evaluation_groups_by_a_column_that_is_there() -> None:
    from retrain.config.data import ListSourceConfig
    from retrain.config.stages import EvaluationConfig
    from retrain.data import load_tasks
    from retrain.loops.evaluate import check_groups
    from retrain.types import UserError

    source = ListSourceConfig(type="list", prompts=[{"prompt": "a", "kind": "k"}])
    tasks = load_tasks(source, seed=0)
    check_groups(tasks, EvaluationConfig(prompt_source=source, group_by="kind", exclude=["k"]))
    with pytest.raises(UserError, match="no column 'form'"):
        check_groups(tasks, EvaluationConfig(prompt_source=source, group_by="form"))
    with pytest.raises(UserError, match="no task has kind = 'z'"):
        check_groups(tasks, EvaluationConfig(prompt_source=source, group_by="kind", exclude=["z"]))


def test_sft_leaves_the_event_loop_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watches servers has to be heard meanwhile."""
    threads = set()
    forward_backward = TorchLearner.forward_backward

    def heard(self: TorchLearner, *args: Any, **how: Any) -> dict[str, float]:
        threads.add(threading.current_thread())
        return forward_backward(self, *args, **how)

    monkeypatch.setattr(TorchLearner, "forward_backward", heard)
    retrain.run_sync(rl_config(tmp_path, sft=sft_section(steps=2)), only="sft")
    assert len(threads) == 1 and threading.main_thread() not in threads
