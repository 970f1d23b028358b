"""Agents of a config: what it can say of them, what runs train, whose rewards count."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import retrain
from engine_servers.chat import ChatServer
from retrain.config.agents import AgentsConfig
from retrain.config.load import load_config
from retrain.engines.base import SamplingParams
from retrain.envs import Episode, MultiAgentEnvironment
from retrain.loops.agents import build_agents
from retrain.loops.check import check
from retrain.loops.world import build_renderer, build_sandbox
from retrain.models import Policy
from retrain.rendering import Renderer
from retrain.rollout import Sampler, to_samples
from retrain.tools import tool
from retrain.types import (
    InfrastructureError,
    Rollout,
    Task,
    UserError,
)
from runs import TAGS, hyperparameters, metrics_of, model_section, rl_config, rollouts_of
from scripted import ScriptedEngine, plain_renderer, tag_renderer
from test_agents import END, TASK
from test_learner import assert_same, exact
from test_update import by_hand, first_gradient, group, plain_gradient, policy_gradient, updating
from tiny import byte_tokenizer, tiny_gpt2


class EachOnce(MultiAgentEnvironment):
    """All speak once, also where somebody was cut short, as untrained models mostly are."""

    async def conduct(self, task: Task, episode: Episode) -> None:
        said = ""
        for name in self.roles:
            speaker = await episode.participant(name)
            if said:
                speaker.hear(said)
            said = (await speaker.speak()).content or "-"


def with_agent(rollouts: list[Rollout], name: str, *, trainable: bool = True) -> list[Rollout]:
    for rollout in rollouts:
        rollout.agent, rollout.trainable = name, trainable
        rollout.id, rollout.episode = f"{rollout.id}/{name}", rollout.id
    return rollouts


@pytest.mark.parametrize("frozen", [False, True])
async def test_each_agents_tokens_train_with_its_own_advantages(frozen: bool) -> None:
    """Against log-probabilities and advantages of plain torch, in float64; what is frozen has no
    share at all."""
    model = exact(tiny_gpt2)
    groups = [
        [
            *with_agent(group("x", 1, 0, 0, 3), "a"),
            *with_agent(group("y", 5, 9, 5, 5), "b", trainable=not frozen),
        ]
    ]
    update = updating(model)
    samples = update.samples(groups)
    counted = (
        [group("x", 1, 0, 0, 3)] if frozen else [group("x", 1, 0, 0, 3), group("y", 5, 9, 5, 5)]
    )
    for own, name in zip(counted, "ab", strict=False):
        with_agent(own, name)
    expected = plain_gradient(model, by_hand(counted), policy_gradient)
    assert_same(await first_gradient(update, samples), expected)
    assert {sample.rollout_id[-1] for sample in samples} == ({"a"} if frozen else {"a", "b"})


TWO = {
    "type": "agents",
    "path": "test_agents_run:EachOnce",
    "agents": {
        "asker": {"system_prompt": "Ask."},
        "solver": {"trainable": False},
    },
}
DIGITS = {"rollout_reward_configs": {"digits": {"function": "runs:digits"}}}


def test_a_run_trains_the_agents_that_are_to_train(tmp_path: Path) -> None:
    config = rl_config(tmp_path, environment=TWO)
    evaluation = {
        "prompt_source": {"type": "python", "function": "runs:questions", "limit": 3},
        "modes": [{"name": "T=1"}],
    }
    result = retrain.run_sync(config | {"evaluation": evaluation})
    rollouts = rollouts_of(result.path)[1]
    assert [(r.agent, r.trainable) for r in rollouts[:2]] == [("asker", True), ("solver", False)]
    assert len(rollouts) == 2 * 2 * 3, "two prompts, three episodes, two agents"
    metrics = metrics_of(result.path)[0]
    askers = [r.reward for r in rollouts if r.agent == "asker"]
    assert metrics["reward/mean"] == pytest.approx(sum(askers) / len(askers))
    assert metrics["agent/asker/reward"] == metrics["reward/mean"]
    assert {"agent/solver/reward", "rollouts/stale"} <= set(metrics)
    assert metrics["rollouts/stale"] == 0
    assert [e.n for e in result.evaluations] == [3, 3], "those that train count"


def test_evaluations_count_the_agents_named(tmp_path: Path) -> None:
    evaluation = {
        "prompt_source": {"type": "python", "function": "runs:questions", "limit": 3},
        "modes": [{"name": "T=1", "repeats": 2}],
    }
    rewards = {"random": {"agents": ["asker"]}, "one": {"function": "test_agents_run:one"}}
    found = []
    for agents in (None, ["solver"], ["asker", "solver"]):
        config = rl_config(
            tmp_path,
            environment=TWO,
            evaluation=evaluation | ({} if agents is None else {"agents": agents}),
            reward_setup={"rollout_reward_configs": rewards},
            stages=[{"kind": "eval"}],
        )
        (result,) = retrain.run_sync(config).evaluations
        found.append((result.n, result.successes, result.reward_mean > 1.01))
    assert found == [(6, 6, True), (6, 6, False), (12, 12, True)]


def one(rollout: Rollout) -> float:
    return 1.0


def test_a_frozen_agents_words_and_rewards_change_no_weight(tmp_path: Path) -> None:
    """The share of a frozen agent is exactly zero: its rewards do not reach the weights."""
    digests = []
    for weight, frozen in ((1.0, True), (-7.0, True), (-7.0, False)):
        agents = {
            "asker": {"system_prompt": "Ask."},
            "solver": {"system_prompt": "Solve.", "trainable": not frozen},
        }
        environment = TWO | {"agents": agents}
        rewards = {
            "digits": {"function": "runs:digits", "agents": ["asker"]},
            "more": {"function": "runs:digits", "agents": ["solver"], "weight": weight},
        }
        config = rl_config(
            tmp_path / f"{weight}{frozen}",
            environment=environment,
            reward_setup={"rollout_reward_configs": rewards},
        )
        result = retrain.run_sync(config)
        assert result.checkpoint is not None
        digests.append((result.checkpoint / "model.safetensors").read_bytes())
    assert digests[0] == digests[1]
    assert digests[1] != digests[2]


def test_agents_of_many_attempts_do_not_wait_for_each_others_slots(tmp_path: Path) -> None:
    """Each of them keeps a slot of the engine until the attempt ends."""
    environment = {"type": "agents", "agents": {"a": {}, "b": {"sees_task": False}}}
    environment |= {"path": "test_agents_run:EachOnce"}
    config = rl_config(
        tmp_path,
        environment=environment,
        engine={"type": "torch", "max_slots": 4},
        rollout={"timeout_s": 20, "retries": 0},
        algorithm={"hyperparameters": hyperparameters(group_size=4, steps=1)},
        reward_setup=DIGITS,
    )
    result = retrain.run_sync(config)
    assert result.metrics["rollouts"] == 16 and result.metrics["rollouts/masked"] == 0
    crowd = environment | {"agents": {f"a{number}": {} for number in range(40)}}
    with pytest.raises(UserError, match=r"40 agents .* slots, which each of them keeps"):
        retrain.run_sync(config | {"environment": crowd})


def test_means_are_those_of_the_agents_that_a_reward_is_for(tmp_path: Path) -> None:
    evaluation = {
        "prompt_source": {"type": "python", "function": "runs:questions", "limit": 2},
        "agents": ["solver"],
        "success_reward": "one",
        "modes": [{"name": "T=1"}],
    }
    agents = {"asker": {"system_prompt": "Ask."}, "solver": {"system_prompt": "Solve."}}
    rewards = {
        "one": {"function": "test_agents_run:one", "agents": ["solver"]},
        "digits": {"function": "runs:digits", "agents": ["asker"]},
    }
    config = rl_config(
        tmp_path,
        environment=TWO | {"agents": agents},
        evaluation=evaluation,
        reward_setup={"rollout_reward_configs": rewards},
    )
    metrics = metrics_of(retrain.run_sync(config).path)[0]
    assert metrics["success"] == 1.0 and metrics["reward/one"] == 1.0
    assert metrics["reward/digits"] == pytest.approx(metrics["agent/asker/reward"])


def test_another_model_plays_a_frozen_opponent(tmp_path: Path) -> None:
    opponent = {"type": "model", "model": model_section(), "max_new_tokens": 4}
    agents = {"a": {}, "b": {"player": opponent | {"temperature": 0.5}}}
    environment = TWO | {"agents": agents}
    result = retrain.run_sync(rl_config(tmp_path, environment=environment, reward_setup=DIGITS))
    rollouts = rollouts_of(result.path)[2]
    theirs = [r for r in rollouts if r.agent == "b"]
    assert theirs and not any(r.trainable for r in theirs)
    assert {v for r in theirs for s in r.segments for v in s.versions} == {-1, 0}
    assert all(span.end - span.start <= 4 for r in theirs for s in r.segments for span in s.turns)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"agents": {}}, "at least 1"),
        ({"agents": {"a b": {}}}, "agent name 'a b'"),
        ({"agents": {"a": {"calls": ["b"]}}}, "no agent 'b'"),
        ({"agents": {"a": {"calls": ["a"], "description": "x"}}}, "wait for itself"),
        ({"agents": {"a": {"calls": ["b"]}, "b": {}}}, "no description"),
        ({"agents": {"a": {"description": "x"}}}, "no agent calls it"),
        ({"agents": {"a": {"max_steps": 3}}}, "max_steps 3 does nothing"),
        ({"agents": {"a": {}}, "max_turns": 3}, "max_turns does nothing"),
        ({"agents": {"a": {}}, "describe_tools": True}, "nothing to act on"),
        ({"agents": {"a": {}, "b": {"trainable": False}}, "tool_retries": 1}, "no agent has tools"),
        ({"agents": {"a": {}}, "stop_phrase": "x"}, "stop_phrase does nothing"),
        ({"agents": {"a": {"calls": ["b", "b"]}, "b": {"description": "x"}}}, "an agent twice"),
        ({"agents": {"a": {"trainable": False}}}, "no agent trains"),
        ({"agents": {"a": {}}, "params": {"x": 1}}, "params needs path"),
        (
            {"agents": {"a": {"tools": ["python"], "player": {
                "type": "openai", "url": "http://127.0.0.1:1", "model": "m"}}}},
            "only answers",
        ),
    ],
)  # fmt: skip
def test_what_cannot_act_is_refused(environment: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(rl_config(Path(), environment={"type": "agents", **environment}))


def test_rewards_and_evaluations_name_agents_that_there_are(tmp_path: Path) -> None:
    reward = {"rollout_reward_configs": {"random": {"agents": ["solvr"]}}}
    with pytest.raises(UserError, match=r"random.agents: there is no agent 'solvr'; there are a"):
        load_config(rl_config(tmp_path, environment=TWO, reward_setup=reward))
    with pytest.raises(UserError, match="one agent only"):
        load_config(rl_config(tmp_path, reward_setup=reward))


def test_check_finds_tools_and_classes_that_there_are_not(tmp_path: Path) -> None:
    for environment, message in (
        ({"agents": {"a": {"tools": ["nonexistent"]}}}, "no built-in tool 'nonexistent'"),
        ({"agents": {"a": {}}, "path": "test_agents_run:one"}, "not a subclass of"),
    ):
        with pytest.raises(UserError, match=message):
            check(load_config(rl_config(tmp_path, environment={"type": "agents", **environment})))


def test_tools_of_agents_can_be_switched_off_in_an_evaluation(tmp_path: Path) -> None:
    evaluation = {
        "prompt_source": {"type": "python", "function": "runs:questions", "limit": 1},
        "modes": [{"name": "off", "tools": False}],
    }
    environment = {"type": "agents", "agents": {"a": {"tools": ["python"]}}}
    config = rl_config(tmp_path, environment=environment, evaluation=evaluation)
    assert retrain.run_sync(config, only="eval").evaluations[0].n == 1
    with pytest.raises(UserError, match="no tools to switch off"):
        retrain.run_sync(config | {"environment": TWO}, only="eval")


def test_check_says_who_takes_part(tmp_path: Path) -> None:
    said = check(load_config(rl_config(tmp_path, environment=TWO)))
    assert "agent asker: policy, trains" in said
    assert "agent solver: policy, does not train" in said


def built(renderer: Renderer, agents: dict[str, Any], **section: Any) -> MultiAgentEnvironment:
    environment = {"type": "agents", "agents": agents, **section}
    config = load_config(rl_config(Path(), environment=environment))
    assert isinstance(config.environment, AgentsConfig)
    return build_agents(config.environment, config, renderer, build_sandbox(config), {})


def spoken(world: MultiAgentEnvironment, renderer: Renderer, *turns: str) -> list[Rollout]:
    sampler = Sampler(
        world, ScriptedEngine(renderer.codec, turns), renderer, SamplingParams(), retries=0
    )
    return asyncio.run(sampler.episode(TASK))


@tool
async def slow(text: str) -> str:
    """Take a while to say something long, or fail."""
    if text == "away":
        tries.append(text)
        raise InfrastructureError("away")
    await asyncio.sleep(0.3 if text == "late" else 0)
    return text * 100


tries: list[str] = []


def test_every_key_of_an_agent_with_tools_acts() -> None:
    renderer = tag_renderer("chatml")
    lead = {"tools": ["test_agents_run:slow"], "max_steps": 2}
    call = "<code>ab</code>"
    (cut,) = spoken(built(renderer, {"a": lead}, max_output_chars=16), renderer, call, f"ok{END}")
    assert 16 <= len(cut.messages[2].content) < 100
    (long,) = spoken(built(renderer, {"a": lead}), renderer, call, call)
    assert long.stop_reason == "max_steps" and long.messages[2].content == "ab" * 100
    late = built(renderer, {"a": lead}, tool_timeout_s=0.05)
    (waited,) = spoken(late, renderer, "<code>late</code>", f"ok{END}")
    assert waited.metrics["tool_calls/timeout"] == 1
    for retries in (0, 1):
        tries.clear()
        world = built(renderer, {"a": lead}, tool_retries=retries)
        (lost,) = spoken(world, renderer, "<code>away</code>")
        assert lost.error is not None and len(tries) == retries + 1
    about = {"b": {"description": "Knows all.", "sees_task": False}}
    told = built(renderer, {"a": lead | {"calls": ["b"]}, **about}, describe_tools=True)
    (one,) = spoken(told, renderer, f"ok{END}")
    assert "Knows all." in one.messages[0].content and "slow" in one.messages[0].content


def test_calls_between_agents_are_written_in_the_format_given(tmp_path: Path) -> None:
    for chosen, markers in (({"type": "fenced"}, "```"), ({"type": "tags"}, "<code>")):
        environment = {
            "type": "agents",
            "agents": {"a": {"calls": ["b"]}, "b": {"description": "Knows.", "sees_task": False}},
            "tool_format": chosen,
        }
        config = load_config(rl_config(tmp_path, environment=environment))
        tokenizer = byte_tokenizer(special=("<eos>", *TAGS))
        policy = Policy(tiny_gpt2(), tokenizer)
        tool_format = build_renderer(config, policy).tool_format
        assert tool_format is not None and any(markers in marker for marker in tool_format.markers)


def test_an_endpoint_plays_an_agent(tmp_path: Path) -> None:
    with ChatServer() as server:
        player = {"type": "openai", "url": server.url, "model": "small", "max_new_tokens": 7}
        world = built(plain_renderer("chatml"), {"a": {}, "b": {"player": player}}, max_turns=1)
        renderer = plain_renderer("chatml")
        (ours, theirs) = spoken(world, renderer, f"hello{END}")
    assert ours.trainable and not theirs.trainable
    assert theirs.segments == [] and to_samples(theirs) == []
    assert ours.messages[-1].content == theirs.messages[-1].content != ""
    (asked,) = server.bodies
    assert asked["max_tokens"] == 7
    assert [m["content"] for m in asked["messages"]] == ["Sum 2 and 3.\n\nhello"]


def test_an_own_class_gets_its_params(tmp_path: Path) -> None:
    environment = {
        "type": "agents",
        "path": "test_agents:Proposes",
        "agents": {"proposer": {}, "solver": {"sees_task": False}},
    }
    changed = hyperparameters(group_size=2, prompts_per_step=1, steps=1)
    config = rl_config(
        tmp_path, environment=environment, algorithm={"hyperparameters": changed},
        reward_setup=DIGITS,
    )  # fmt: skip
    result = retrain.run_sync(config)
    assert [r.agent for r in rollouts_of(result.path)[1]] == ["proposer", "solver", "solver"] * 2
    with pytest.raises(UserError, match="do not fit test_agents:Proposes"):
        retrain.run_sync(config | {"environment": environment | {"params": {"x": 1}}})
