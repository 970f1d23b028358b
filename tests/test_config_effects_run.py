"""What keys change of a run: of its rollouts, its evaluation, its files, and its rewards."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

import retrain
from retrain.config import load_config, resolve_stages
from retrain.config.data import PromptSourceConfig
from retrain.config.model import ModelConfig
from retrain.config.monitors import MonitorsConfig
from retrain.data import load_tasks
from retrain.engines.base import GenerateRequest
from retrain.loops.build import build_calculator
from retrain.loops.world import build_environment, build_renderer, build_sandbox
from retrain.models import load_policy
from retrain.rewards import verifier
from retrain.rollout import ModelUser
from retrain.types import Message, MessageType, Rollout, Task
from runs import (
    hyperparameters,
    metrics_of,
    model_section,
    rl_config,
    rollouts_of,
    sft_section,
)
from test_envs import Speaker


def config(**sections: Any) -> Any:
    return load_config(rl_config(Path("runs"), **sections))


@pytest.fixture(scope="module")
def policy() -> Any:
    return load_policy(ModelConfig.model_validate(model_section()))


# Prompt sources


def texts(**source: Any) -> list[str]:
    keys = {"shuffle": False, **source}
    section = TypeAdapter(PromptSourceConfig).validate_python(keys)
    return [task.prompt[-1].content for task in load_tasks(section, seed=0).epoch(0)]


def test_type_path_and_format_decide_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text('{"prompt": "one"}\n')
    (tmp_path / "b.txt").write_text("two\n")
    assert texts(type="list", prompts=["zero"]) == ["zero"]
    assert texts(type="file", path=str(tmp_path / "b.txt")) == ["two"]
    path = str(tmp_path / "a.log")
    assert texts(type="file", path=path, format="jsonl") == ["one"]
    assert texts(type="file", path=path, format="txt") == ['{"prompt": "one"}']
    rows = {"function": "runs:questions", "params": {"n": 1}}
    assert texts(type="python", **rows) == ["What is 10+11?"]
    pytest.importorskip("reasoning_gym")
    assert len(texts(type="reasoning_gym", dataset="chain_sum", size=3)) == 3
    counts = texts(type="reasoning_gym", dataset="letter_counting", size=1)
    assert "letter" in counts[0]


# Dialogue


def talked(policy: Any, *said: str, user: dict[str, Any], **section: Any) -> Rollout:
    given = config(environment={"type": "dialogue", "user": user, **section})
    renderer = build_renderer(given, policy)
    environment = build_environment(given, renderer, build_sandbox(given))
    task = Task("t", (Message("Hi", MessageType.MESSAGE),), metadata={"lines": ["own", "bye"]})
    return asyncio.run(environment.run(task, Speaker(said, renderer)))


def user_said(rollout: Rollout) -> list[str]:
    return [m.content for m in rollout.messages if m.type is MessageType.MESSAGE][1:]


def test_a_scripted_user_and_the_ends_of_a_dialogue(policy: Any) -> None:
    replies = {"type": "scripted", "replies": ["a", "b bye", "c"]}
    assert user_said(talked(policy, *"1234", user=replies)) == ["a", "b bye", "c"]
    own = {"type": "scripted", "replies_column": "lines"}
    assert user_said(talked(policy, *"1234", user=own)) == ["own", "bye"]
    short = talked(policy, *"1234", user=replies, max_turns=2)
    assert (len(short.model_messages), short.stop_reason) == (2, "max_steps")
    ended = talked(policy, *"1234", user=replies, stop_phrase="bye")
    assert user_said(ended) == ["a", "b bye"] and ended.stop_reason == "user_done"


def test_a_user_that_a_model_plays_is_sampled_as_described() -> None:
    given: dict[str, Any] = {"type": "model", "model": model_section(), "system_prompt": "{prompt}"}
    asked: list[GenerateRequest] = []

    async def reply(**section: Any) -> None:
        user = given | section
        environment = build_environment(
            config(environment={"type": "dialogue", "user": user}), None, None
        )
        model_user = environment.user
        assert isinstance(model_user, ModelUser)
        engine = model_user._engine
        real = engine.generate

        async def generate(request: GenerateRequest) -> Any:
            asked.append(request)
            return await real(request)

        engine.generate = generate
        rollout = Rollout(task=Task("t", (Message("Hi", MessageType.MESSAGE),)))
        rollout.add_messages(*rollout.task.prompt, Message("Ho", MessageType.MODEL))
        await model_user.reply(rollout.task, rollout)
        await engine.close()

    asyncio.run(reply())
    asyncio.run(reply(max_new_tokens=7, temperature=0.0, system_prompt="Longer {prompt}"))
    asyncio.run(reply(model=model_section("gpt2")))
    plain, changed, other = asked
    assert (plain.params.max_new_tokens, plain.params.temperature) == (128, 1.0)
    assert (changed.params.max_new_tokens, changed.params.temperature) == (7, 0.0)
    assert len(changed.prompt_ids) > len(plain.prompt_ids) == len(other.prompt_ids)


# Rewards


def two(rollout: Rollout, by: float = 1.0) -> float:
    return 2.0 * by


def of_turn(rollout: Rollout, step: int) -> float:
    return float(step + 1)


def of_group(rollouts: list[Rollout]) -> list[float]:
    return [10.0 for _ in rollouts]


@verifier
def never(rollout: Rollout) -> bool:
    return False


HERE = "test_config_effects_run"


def scored(**setup: Any) -> Rollout:
    """A rollout of two turns, scored alone."""
    rollout = Rollout(task=Task("t", ()))
    for text in ("a", "b"):
        rollout.add_messages(Message("?", MessageType.MESSAGE), Message(text, MessageType.MODEL))
    section = config(reward_setup=setup, environment={"type": "python", "path": "runs:Countdown"})
    calculator = build_calculator(section.reward_setup, build_sandbox(section))
    asyncio.run(calculator.score([rollout]))
    return rollout


def of_rollout(**entry: Any) -> list[float]:
    entry = {"function": f"{HERE}:two", **entry}
    return scored(rollout_reward_configs={"r": entry}).step_rewards


def test_every_key_of_a_reward_acts() -> None:
    assert of_rollout() == [0.0, 2.0]
    assert of_rollout(weight=3) == [0.0, 6.0]
    assert of_rollout(params={"by": 2}) == [0.0, 4.0]
    assert of_rollout(function="runs:digits") == [0.0, 0.0]
    assert of_rollout(distribution_strategy="all_steps_equal") == [2.0, 2.0]
    assert of_rollout(distribution_strategy="all_steps_average") == [1.0, 1.0]
    assert of_rollout(verifiers=[f"{HERE}:never"]) == [0.0, 0.0]
    gated = {"verifiers": [f"{HERE}:never"], "verifier_penalty": -4}
    assert of_rollout(**gated) == [0.0, -4.0]
    assert scored(step_reward_configs={f"{HERE}:of_turn": {}}).step_rewards == [1.0, 2.0]
    assert scored(group_reward_configs={f"{HERE}:of_group": {}}).reward == 10.0
    rewards = {"rollout_reward_configs": {f"{HERE}:two": {}}}
    assert scored(**rewards, verifiers=[f"{HERE}:never"]).reward == 0.0
    assert scored(**rewards, **gated).reward == -4.0


# A step of RL


def ran(path: Path, *, stage: str = "rl", **sections: Any) -> Any:
    return retrain.run_sync(rl_config(path, **{"environment": {"type": "qa"}, **sections}))


def stepped(path: Path, **changed: Any) -> tuple[list[Rollout], dict[str, Any]]:
    settings = {"hyperparameters": hyperparameters(steps=1, **changed)}
    result = ran(path, algorithm=settings)
    return rollouts_of(result.path)[1], metrics_of(result.path)[0]


def test_sizes_and_sampling_of_a_step(tmp_path: Path) -> None:
    plain, _ = stepped(tmp_path)
    assert len(plain) == 6
    assert len(stepped(tmp_path, prompts_per_step=3)[0]) == 9
    assert len(stepped(tmp_path, group_size=4)[0]) == 8
    short, _ = stepped(tmp_path, max_new_tokens=2)
    longest, usual = (
        max(turn.end - turn.start for r in rollouts for turn in r.segments[0].turns)
        for rollouts in (short, plain)
    )
    assert longest == 2 < usual <= 6
    cold, _ = stepped(tmp_path, temperature=1e-4)
    assert cold[0].messages[-1].content != plain[0].messages[-1].content
    by_group = {(r.group_id, r.messages[-1].content) for r in cold}
    assert len(by_group) == 2, "near 0 every member of a group says the same"
    result = ran(tmp_path, algorithm={"hyperparameters": hyperparameters(steps=3)})
    assert len(metrics_of(result.path)) == 3


def test_a_monitor_has_the_threshold_given(tmp_path: Path, caplog: Any) -> None:
    settings = {"hyperparameters": hyperparameters(steps=1)}
    for threshold, alerts in ((1e-9, 1), (1e9, 0), (None, 0)):
        off: dict[str, Any] = dict.fromkeys(MonitorsConfig.model_fields)
        with caplog.at_level(logging.WARNING, "retrain"):
            result = ran(tmp_path, algorithm=settings, monitors=off | {"logprob_gap": threshold})
        assert metrics_of(result.path)[0]["alerts"] == alerts


# Evaluation

SOURCE = {"type": "python", "function": "runs:questions", "params": {"n": 4, "first": 60}}


def evaluated(path: Path, *modes: dict[str, Any], **section: Any) -> Any:
    shown = [{"name": "m", **mode} for mode in modes] or [{"name": "m"}]
    evaluation = {"prompt_source": SOURCE, "modes": shown, "max_new_tokens": 4, **section}
    given = rl_config(path, evaluation=evaluation, stages=[{"kind": "eval"}])
    return retrain.run_sync(given)


def said(result: Any, mode: str = "m") -> list[list[int]]:
    (rollouts,) = rollouts_of(result.path, f"eval-{mode}").values()
    return [list(rollout.full_token_ids(0)) for rollout in rollouts]


def test_every_key_of_a_mode_acts(tmp_path: Path) -> None:
    modes = [{"name": "plain"}, {"name": "greedy", "temperature": 0}, {"name": "p", "top_p": 1e-6},
             {"name": "k", "top_k": 1}, {"name": "twice", "repeats": 2}]  # fmt: skip
    result = evaluated(tmp_path, *modes)
    assert [r.mode for r in result.evaluations] == ["plain", "greedy", "p", "k", "twice"]
    assert said(result, "greedy") == said(result, "p") == said(result, "k") != said(result, "plain")
    assert [len(said(result, mode)) for mode in ("plain", "twice")] == [4, 8]


def test_every_key_of_an_evaluation_acts(tmp_path: Path) -> None:
    one = evaluated(tmp_path)
    other = evaluated(
        tmp_path,
        prompt_source={**SOURCE, "params": {"n": 6}},
        max_new_tokens=2,
        success_threshold=-1,
        group_by="parity",
        exclude=["1"],
    )
    assert (one.evaluations[0].n, one.evaluations[0].successes) == (4, 0)
    # six tasks, of which the three odd ones do not count in the total
    assert (other.evaluations[0].n, other.evaluations[0].successes) == (3, 3)
    assert other.evaluations[0].by_group == {"0": (3, 3), "1": (3, 3)}
    assert max(map(len, said(other))) < max(map(len, said(one)))


def test_success_may_be_that_of_one_reward(tmp_path: Path) -> None:
    rewards = {"digits": {"function": "runs:digits"}, "two": {"function": f"{HERE}:two"}}
    given = rl_config(
        tmp_path,
        reward_setup={"rollout_reward_configs": rewards},
        evaluation={"prompt_source": SOURCE, "max_new_tokens": 4, "modes": [{"name": "m"}],
                    "success_threshold": 1.5},
        stages=[{"kind": "eval", "name": "total"},
                {"kind": "eval", "name": "part", "evaluation": {"success_reward": "digits"}}],
    )  # fmt: skip
    total, part = retrain.run_sync(given).evaluations
    assert (total.stage, total.successes, part.stage, part.successes) == ("total", 4, "part", 0)


# SFT


def test_every_key_of_sft_acts(tmp_path: Path) -> None:
    def tokens(**changed: Any) -> list[float]:
        section = sft_section(**{"steps": 2, "batch_size": 4, "params": {"n": 8}, **changed})
        result = retrain.run_sync(rl_config(tmp_path, sft=section), only="sft")
        return [row["tokens"] for row in metrics_of(result.path, "sft")]

    plain = tokens()
    assert len(plain) == 2
    assert len(tokens(steps=3)) == 3
    assert len(tokens(steps=None, epochs=2)) == 4  # 2 x 8 traces by 4
    assert tokens(params={"n": 16}) != plain
    assert tokens(batch_size=8)[0] == sum(plain)
    assert tokens(shuffle=False) != plain and sum(tokens(shuffle=False)) == sum(plain)
    rows = tmp_path / "one.jsonl"
    row = {"prompt": "2+2?", "completion": "4"}
    rows.write_text(json.dumps(row) + "\n")
    assert tokens(dataset=str(rows), params={}, batch_size=1) == [2.0, 2.0]


# What is written down


def test_every_key_of_tracking_acts(tmp_path: Path, capsys: Any) -> None:
    settings = {"hyperparameters": hyperparameters(steps=1)}

    def left(**tracking: Any) -> tuple[set[str], str]:
        tracking = {"plots": False, "progress": "off", **tracking}
        result = ran(tmp_path, algorithm=settings, tracking=tracking)
        return {path.name for path in result.path.iterdir()}, capsys.readouterr().out

    plain, quiet = left()
    assert "rollouts" in plain and "plots" not in plain
    assert "rollouts" not in left(rollouts=False)[0]
    assert "plots" in left(plots=True)[0]
    assert len(left(progress="on")[1]) > len(quiet)


def test_every_key_of_a_checkpoint_acts(tmp_path: Path) -> None:
    def kept(**checkpoint: Any) -> list[str]:
        section = sft_section(steps=5, batch_size=2)
        given = rl_config(tmp_path, sft=section, checkpoint=checkpoint)
        result = retrain.run_sync(given, only="sft")
        return sorted(path.name for path in (result.path / "checkpoints").iterdir())

    assert kept() == ["sft"]
    assert kept(every_steps=1) == ["sft", "sft-000003", "sft-000004"]
    assert kept(every_steps=1, keep_last=1) == ["sft", "sft-000004"]
    assert kept(every_steps=3) == ["sft", "sft-000003"]


def test_a_run_is_where_and_what_the_config_says(tmp_path: Path) -> None:
    settings = {"hyperparameters": hyperparameters(steps=1)}
    where = {"experiment_name": "mine", "output_dir": str(tmp_path / "there")}
    result = retrain.run_sync(rl_config(tmp_path, algorithm=settings) | where)
    assert result.path == tmp_path / "there" / "mine-001"


# Stages


@pytest.mark.parametrize(
    ("section", "overlay"),
    [
        ("algorithm", {"hyperparameters": {"steps": 7}}),
        ("environment", {"max_steps": 7}),
        ("prompt_source", {"limit": 7}),
        ("reward_setup", {"verifiers": ["non_empty"]}),
        ("rollout", {"retries": 7}),
        ("checkpoint", {"every_steps": 7}),
        ("monitors", {"masked": 0.7}),
        ("evaluation", {"success_threshold": 0.7}),
    ],
)
def test_a_stage_has_its_own(section: str, overlay: dict[str, Any]) -> None:
    stages = [{"kind": "rl"}, {"kind": "rl", "name": "own", section: overlay}]
    given = config(evaluation={"prompt_source": SOURCE}, stages=stages)
    (name, _, first), (own, kind, second) = resolve_stages(given)
    assert (name, own, kind) == ("rl", "own", "rl")
    assert getattr(first, section) != getattr(second, section)
    setattr(first, section, getattr(second, section))
    assert first == second
