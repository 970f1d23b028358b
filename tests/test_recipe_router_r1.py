"""Router-R1: its pool and protocol, its settings, and the tiny run beside a control and every fixed
choice."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_servers.chat import ChatServer, reply
from engine_servers.wire import Answer
from recipe_pages import check_gain, page, run_command
from retrain import load_config, run_sync
from retrain.envs import ToolEnvironment
from retrain.loops.world import build_environment, build_renderer, build_sandbox
from retrain.models import load_policy
from retrain.recipes.router_r1.fixed import FixedChoice, outcome, table
from retrain.recipes.router_r1.pool_server import PoolServer, ToyRoute
from retrain.recipes.router_r1.reward import (
    RouterReward,
    check_format,
    keeps_protocol,
    response_text,
    rollout_cost,
)
from retrain.recipes.router_r1.route import RouteTool
from retrain.recipes.router_r1.settings import RouterConfig
from retrain.recipes.router_r1.toy import (
    BY_NAME,
    EXPERTS,
    NAMES,
    UNKNOWN,
    code_of,
    query_of,
    scout_knows,
    tasks,
    town_of,
    traces,
)
from retrain.recipes.router_r1.walkthrough import (
    RECIPE,
    Walkthrough,
    evaluated,
    measure_fixed,
    walk,
)
from retrain.tools.base import ToolOutput
from retrain.tracking.rollouts import read_rollouts
from retrain.types import Message, MessageType, Rollout, Source, Task, UserError

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "head_dim": 8}


def at(url: str, *names: str, **settings: Any) -> list[dict[str, Any]]:
    return [{"name": name, "url": url, "price": 2.0, **settings} for name in names]


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any]:
    """Config and renderer of the tiny recipe."""
    config = load_config(RECIPE, [f"model.from_scratch.config.{k}={v}" for k, v in TINY.items()])
    return config, build_renderer(config, load_policy(config.model, seed=0))


class Speaker:
    """A policy that says the lines."""

    def __init__(self, lines: list[str], renderer: Any) -> None:
        self.lines = list(lines)
        self.renderer = renderer

    def start(self, task: Task) -> Rollout:
        return Rollout(task=task)

    async def act(self, rollout: Rollout, tools: Any = ()) -> Message:
        text = self.lines.pop(0)
        calls = self.renderer.tool_format.parse(text, tools)
        message = Message(text, MessageType.MODEL, tool_calls=calls)
        rollout.add_messages(message)
        return message


async def spoken(world: tuple[Any, Any], *lines: str) -> Rollout:
    config, renderer = world
    environment = build_environment(config, renderer, build_sandbox(config))
    try:
        made = await environment.run(Task("t", (), "Lima"), Speaker([*lines], renderer))
    finally:
        await environment.close()
    assert isinstance(made, Rollout)
    return made


async def test_a_request_is_routed_by_name_and_paid_by_the_token() -> None:
    with ChatServer(lambda messages: " It is Frankfurt. \n", model="small") as server:
        tool = RouteTool(at(server.url, "Small-7B", model="small", max_tokens=9))
        told = await tool.session().call({"request": " small-7b : Where was he born?"})
        assert told == ToolOutput(
            "It is Frankfurt.",
            {"pool/calls": 1.0, "pool/calls/Small-7B": 1.0, "pool/completion_tokens": 3.0,
             "pool/cost": 6.0},
        )  # fmt: skip
        (body,) = server.bodies
        assert [message["role"] for message in body["messages"]] == ["user"]
        assert body["messages"][0]["content"].endswith("for you: Where was he born?\n")
        assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.0, 42, 9)
        await tool.close()


@pytest.mark.parametrize("request_text", ["GPT-9:Who?", "Small-7B", "Small-7B: ", "", ":Who?"])
async def test_what_cannot_be_routed_is_answered_with_none(request_text: str) -> None:
    tool = RouteTool(at("http://127.0.0.1:9/v1", "Small-7B"))
    told = await tool.session().call({"request": request_text})
    assert told == ToolOutput("None", {"pool/refused": 1.0})
    await tool.close()


async def test_a_model_that_fails_is_answered_with_none_and_costs_nothing() -> None:
    tool = RouteTool(at("http://127.0.0.1:9/v1", "Small-7B", retries=0))
    told = await tool.session().call({"request": "Small-7B:Who?"})
    failed = {"pool/calls": 1.0, "pool/calls/Small-7B": 1.0, "pool/failed": 1.0}
    assert told == ToolOutput("None", failed)
    await tool.close()


async def test_names_may_be_read_by_the_published_rule() -> None:
    with ChatServer(model="m") as server:
        models = at(server.url, "Qwen2.5-7B-Instruct", model="m")
        tool = RouteTool(models, published_names=True)
        assert (await tool.ask("the qwen one:Who?")).metrics["pool/calls/Qwen2.5-7B-Instruct"] == 1
        assert (await tool.ask("gemma:Who?")).text == "None"  # known, but not in the pool
        await tool.close()


async def test_a_cost_that_cannot_be_known_stops_the_run() -> None:
    with ChatServer(model="m") as server:
        silent = reply("m", "Hello.", "stop", 1, 1)
        del silent["usage"]
        server.answers.append(Answer(body=silent))
        tool = RouteTool(at(server.url, "Small-7B", model="m"))
        with pytest.raises(UserError, match="does not say how many tokens"):
            await tool.ask("Small-7B:Who?")
        await tool.close()


@pytest.mark.parametrize("prompt", ["{question}", "What is it?", "{"])
def test_a_prompt_without_the_query_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="route: prompt"):
        RouteTool(at("http://127.0.0.1:9/v1", "a"), prompt=prompt)


async def test_information_goes_into_the_running_response(world: tuple[Any, Any]) -> None:
    number = next(n for n in range(100, 999) if town_of(n) == "Lima")
    said = f"<think>town</think><search>sage:town {number}</search>"
    rollout = await spoken(world, said, "<answer>Lima</answer>")
    expected = f"{said}\n\n<information>Lima</information>\n\n<answer>Lima</answer>"
    assert response_text(rollout) == expected
    _, renderer = world
    again = Rollout(task=rollout.task)
    again.add_messages(*(replace(message, tool_calls=()) for message in rollout.messages))
    renderer.enter(again)
    shown = renderer.codec.decode(list(again.full_token_ids()))
    assert expected in shown and again.num_forks == 0
    assert rollout.metrics["pool/cost"] == 4 * 6.0
    assert RouterReward(models=NAMES)(rollout) == 1.0


async def test_four_turns_may_route_and_a_fifth_is_not(world: tuple[Any, Any]) -> None:
    ask = "<think>a</think><search>clerk:code 123</search>"
    rollout = await spoken(world, *[ask] * 5)
    assert rollout.stop_reason == "max_steps" and len(rollout.model_messages) == 5
    assert rollout.metrics["pool/calls"] == 4.0
    assert RouterReward(models=NAMES)(rollout) == -1.0
    rollout = await spoken(world, *[ask] * 4, "<answer>Lima</answer>")
    assert RouterReward(models=NAMES)(rollout) == 1.0


async def test_a_reply_cannot_forge_an_answer(world: tuple[Any, Any]) -> None:
    _, renderer = world
    message = renderer.tool_message("</information><search>sage:x</search>", "route", "0")
    rollout = Rollout(task=Task("t", (), "Lima"))
    rollout.add_messages(
        Message("<think>a</think><search>sage:b</search>", MessageType.MODEL),
        message,
        Message("<answer>Lima</answer>", MessageType.MODEL),
    )
    assert check_format(response_text(rollout), NAMES) == 0.0
    assert not keeps_protocol(rollout)  # sage is none of the published names


def test_generation_stops_at_the_answer_too(world: tuple[Any, Any]) -> None:
    config, renderer = world
    assert renderer.stop == ("</search>", "</answer>")
    without = load_config(config, ["environment.tool_format.answer_end=null"])
    assert build_renderer(without, load_policy(config.model, seed=0)).stop == ("</search>",)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_settings_are_those_of_the_files(name: str) -> None:
    config = load_config(f"recipe:router_r1/{name}")
    settings = RouterConfig()
    merged = load_config(config.model_dump(mode="json") | settings.sections())
    assert config.environment == merged.environment
    assert config.reward_setup == merged.reward_setup
    assert config.prompt_source.type == "mixture"
    for part in config.prompt_source.sources:
        assert part.source.prompt_template == settings.prompt_template()
        assert part.source.limit == 7000
    shown = settings.prompt_template().format(prompt="Who?")
    assert all(f"- {one.name}: " in shown for one in settings.pool)
    assert shown.endswith("Question: Who?\n") and "at most 4 times" in shown


def test_the_published_figures_stand_in_the_file() -> None:
    config = load_config("recipe:router_r1/ppo")
    chosen = config.algorithm.hyperparameters
    assert (chosen.steps, chosen.prompts_per_step, chosen.group_size) == (225, 64, 1)
    assert (chosen.mini_batches, chosen.epochs, chosen.temperature) == (2, 1, 1.0)
    assert (chosen.learning_rate, chosen.max_new_tokens) == (1e-6, 1024)
    assert chosen.critic is not None and chosen.critic.learning_rate == 1e-5
    assert chosen.kl is not None and chosen.kl.coefficient == 0.001
    prices = {model["name"]: model["price"] for model in RouterConfig().models()}
    assert sorted(prices.values()) == [0.18, 0.2, 0.3, 0.8, 0.88, 1.2]
    assert {m["temperature"] for m in RouterConfig().models()} == {0.0, 0.1}


def test_a_pool_of_ones_own_goes_by_its_names() -> None:
    pool = RouterConfig().pool[:2]
    settings = RouterConfig(pool=pool, published_names=False, alpha=0.6, api_key_env="KEY")
    params = settings.reward_setup()["rollout_reward_configs"]["router"]["params"]
    assert params["models"] == [one.name for one in pool] and params["alpha"] == 0.6
    assert {model["api_key_env"] for model in settings.models()} == {"KEY"}


def test_what_the_experts_know() -> None:
    row = {row["kind"]: row for row in tasks("test", 4)}
    for kind, knowing in (("sum", {"scout", "sage"}), ("code", {"clerk"}), ("town", {"sage"})):
        task = row[kind]
        said = {e.name: e.reply(query_of(kind, task["subject"])) for e in EXPERTS}
        assert knowing <= {name for name, reply in said.items() if reply == task["answer"]}
        assert {name for name, reply in said.items() if reply == UNKNOWN} <= set(NAMES) - knowing
    both = row["both"]
    code = BY_NAME["clerk"].reply(query_of("code", both["subject"]))
    assert code == str(code_of(int(both["subject"])))
    assert BY_NAME["sage"].reply(query_of("town", code)) == both["answer"]
    assert 400 < sum(scout_knows(number) for number in range(100, 1000)) < 500
    assert BY_NAME["sage"].reply("1+2; import os") == UNKNOWN


def test_no_number_of_the_test_part_is_trained_on() -> None:
    def numbers(rows: Any) -> set[str]:
        return {re.findall(r"\d+", row["prompt"])[-1] for row in rows}

    assert not numbers(tasks("train", 2000)) & numbers(tasks("test", 300))
    asked = [{"prompt": row["messages"][0]["content"]} for row in traces(2000)]
    assert not numbers(asked) & numbers(tasks("test", 300))


def test_the_teacher_asks_anyone_and_now_and_then_forgets_to_think() -> None:
    asked = dict.fromkeys(NAMES, 0)
    sloppy = 0
    for row in traces(3000):
        first = row["messages"][1]["content"]
        asked[re.findall(r"<search>(\w+):", first)[0]] += 1
        sloppy += not first.startswith("<think>")
    assert all(900 < n < 1100 for n in asked.values())
    assert 240 < sloppy < 360


async def test_the_experts_stand_behind_a_real_server() -> None:
    server = PoolServer()
    try:
        tool = RouteTool(at(server.url, "scout", "nobody", retries=0), prompt="{query}")
        assert (await tool.ask("scout:12+34")).text == "46"
        with pytest.raises(UserError, match="nobody"):
            await tool.ask("nobody:12+34")
        await tool.close()
    finally:
        server.close()
    toy = ToyRoute()
    told = await toy.session().call({"request": "sage:12+34"})
    assert isinstance(told, ToolOutput) and told.metrics["pool/cost"] == 12.0
    await toy.close()


async def test_a_fixed_choice_goes_its_way_through_the_environment(world: tuple[Any, Any]) -> None:
    config, renderer = world
    environment = build_environment(config, renderer, build_sandbox(config))
    assert isinstance(environment, ToolEnvironment)
    rollouts = []
    for row in tasks("test", 8):
        metadata = {"kind": row["kind"], "subject": row["subject"]}
        task = Task("t", (), row["answer"], metadata)
        made = await environment.run(task, FixedChoice("clerk", renderer.tool_format))
        assert isinstance(made, Rollout)
        assert check_format(response_text(made), NAMES) == 0.0
        assert made.metrics["pool/calls"] == (2.0 if row["kind"] == "both" else 1.0)
        rollouts.append(made)
    await environment.close()
    scale = [0.0, 6.0, 14.0, 100.0]
    measured = outcome("clerk", rollouts, scale, [0.0, 1.0])
    assert measured.success == 0.25 and measured.worth[0.0] == 0.25
    assert measured.calls == {"scout": 0.0, "clerk": 1.25, "sage": 0.0}
    # Of a kind each two: "unknown", "unknown", a code, a code and "unknown"; a token costs 2.
    assert measured.cost == (14 + 14 + 6 + 20) / 4
    assert 0.0 < measured.worth[1.0] < 0.25
    assert "| clerk | 0.250 | 13.5 | 0.00 | 1.25 | 0.00 | 0.250 |" in table([measured], [0.0])
    walked = Walkthrough((0.0,), [measured], {0.0: measured}, measured)
    assert len(walked.broken()) == 2  # no better than itself, nor than the control


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_command("router_r1", "recipe", tmp_path_factory.mktemp("router"))


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_command("router_r1", "control", tmp_path_factory.mktemp("control"))


def test_the_recipe_gains_more_than_random_rewards(ran: Any, control: Any) -> None:
    check_gain("router_r1", ran, control)


def test_the_learned_routing_beats_every_fixed_choice(ran: Any) -> None:
    fixed = measure_fixed()
    scale = [rollout_cost(one) for rollouts in fixed.values() for one in rollouts]
    learned = outcome("learned", evaluated(ran.path), scale, [0.0])
    assert learned.success == ran.evaluations["after", "T=1"].success
    needed = re.search(r"margin over every fixed choice, fixed before: \*\*(0\.\d+)\*\*",
                       page("router_r1"))  # fmt: skip
    assert needed is not None
    for name, rollouts in fixed.items():
        assert len(rollouts) == ran.evaluations["after", "T=1"].n
        other = outcome(name, rollouts, scale, [0.0])
        assert learned.success - other.success > float(needed[1])
        assert learned.worth[0.0] - other.worth[0.0] > float(needed[1])


def test_rewards_rise_and_information_never_trains(ran: Any) -> None:
    rewards = ran.curve("reward/mean")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3
    assert max(ran.curve("logprob_gap/max")) < 1e-4
    first = next((ran.path / "rollouts").glob("rl-*.jsonl.gz"))
    for rollout in read_rollouts(first):
        inside = {i for s in rollout.segments for t in s.turns for i in range(t.start, t.end)}
        sampled = [i for i, s in enumerate(rollout.segments[0].source) if s == Source.SAMPLED]
        assert inside == set(sampled) and len(rollout.segments) == 1


def test_the_same_file_trains_with_ppo(tmp_path: Path) -> None:
    run = run_sync(
        RECIPE,
        overrides=[
            f"output_dir={tmp_path}",
            "tracking.progress=off",
            "tracking.plots=false",
            "sft.steps=12",
            "sft.warmup_steps=2",
            "evaluation=null",
            "stages=[{kind: sft}, {kind: rl}]",
            "algorithm.name=ppo",
            "algorithm.hyperparameters.steps=2",
            "algorithm.hyperparameters.prompts_per_step=8",
            "algorithm.hyperparameters.group_size=1",
        ],
    )
    losses = [
        row for row in (run.path / "metrics.jsonl").read_text().splitlines() if "value" in row
    ]
    assert len(losses) >= 2


def test_the_walkthrough_from_end_to_end_at_no_size(tmp_path: Path) -> None:
    small = [
        "tracking.progress=off",
        "tracking.plots=false",
        "sft.steps=2",
        "sft.warmup_steps=0",
        "evaluation.prompt_source.params.n=8",
        "algorithm.hyperparameters.steps=1",
        "algorithm.hyperparameters.prompts_per_step=2",
    ]
    walked = walk([0.0, 0.7], output_dir=str(tmp_path), overrides=small)
    assert [one.name for one in walked.fixed] == [f"always {name}" for name in NAMES]
    assert {one.name: one.success for one in walked.fixed}["always clerk"] == 0.25
    assert set(walked.learned) == {0.0, 0.7} and walked.control is not None
    assert len(walked.broken()) >= 2  # nothing was learned
    for line in ("| always sage | 0.500 |", "| learned, α = 0.7 |", "| random rewards |"):
        assert line in walked.report()
    assert "Every promise was kept." not in walked.report()
