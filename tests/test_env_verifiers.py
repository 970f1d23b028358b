"""verifiers: environments on its own classes run as they are, and the policy's turns are exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verifiers.v1")

import retrain
from adapting import built, check_exact, train, weights_changed
from retrain.engines.base import SamplingParams
from retrain.envs.adapters.verifiers import VerifiersEnvironment, tasks
from retrain.rollout import Sampler, to_samples
from retrain.types import InfrastructureError, MessageType, Rollout, UserError
from runs import rl_config
from scripted import ScriptedEngine, check_ledger, plain_renderer, tag_renderer, tokenizer
from verifiers_worlds import block

TESTS = Path(__file__).parent
END = "<|im_end|>"
TAGS = ("<code>", "</code>", "<interpreter>", "</interpreter>")


async def play(
    turns: Sequence[str | Sequence[int]],
    env: dict[str, Any],
    *,
    tags: bool = False,
    retries: int = 0,
) -> tuple[Rollout, ScriptedEngine]:
    """A rollout of the scripted policy in the first task."""
    renderer = tag_renderer("chatml", *TAGS) if tags else plain_renderer("chatml")
    engine = ScriptedEngine(renderer.codec, turns)
    world = VerifiersEnvironment(renderer, env=env)
    (task,) = tasks(env, limit=1)
    try:
        sampler = Sampler(world, engine, renderer, SamplingParams(), retries=retries)
        (rollout,) = await sampler.episode(task)
    finally:
        await world.close()
    return rollout, engine


def texts(rollout: Rollout) -> list[str]:
    return [message.content for message in rollout.messages]


def test_the_taskset_is_a_prompt_source() -> None:
    made = list(tasks(block()))
    assert [m.content for m in made[0].prompt] == ["Be brief.", "Say 1."]
    assert len({task.id for task in made}) == 4
    assert [task.metadata["verifiers"]["digit"] for task in made] == list("1234")
    assert [task.id for task in tasks(block(), limit=2)] == [task.id for task in made[:2]]


async def test_one_turn() -> None:
    rollout, engine = await play([f"it is 1{END}"], block())
    assert texts(rollout) == ["Be brief.", "Say 1.", "it is 1"]
    check_ledger(rollout, engine)
    assert (rollout.env_rewards, rollout.stop_reason) == ([1.5], "answered")
    assert rollout.metrics == {
        "verifiers/a_digit": 1.0, "verifiers/the_digit": 1.0, "verifiers/length": 7.0,
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_goes_on_from_the_sampled_tokens(stream: bool) -> None:
    """The harness sends text back; the ledger stays one segment, without a token encoded anew."""
    made = tokenizer("chatml")
    apart = [t for c in "print(" for t in made.encode(c)]
    assert apart != made.encode("print("), "it would be encoded otherwise"
    said = [[*apart, made.convert_tokens_to_ids(END)], f"<think>hm</think>\n\n2{END}", f"1{END}"]
    rollout, engine = await play(said, block(turns=3, stream=stream))
    assert texts(rollout) == [
        "Be brief.", "Say 1.", "print(", "Again.", "<think>hm</think>\n\n2", "Again.", "1",
    ]  # fmt: skip
    check_ledger(rollout, engine)
    assert len(rollout.segments) == 1 and rollout.num_forks == 0
    assert rollout.env_rewards == [0.0, 0.0, 1.5]


async def test_an_edited_history_forks() -> None:
    """What was said before is context there; each sampled token trains once."""
    rollout, engine = await play([f"5{END}", f"1{END}"], block(turns=2, history="edited"))
    assert texts(rollout)[2:] == ["5", "Be brief.", "Say 1. (0)", "5", "Again.", "1"]
    assert [m.type for m in rollout.messages].count(MessageType.MODEL) == 2
    first, second = rollout.segments
    assert (second.parent, rollout.num_forks) == (0, 1) and 0 < second.prefix_len < len(first)
    check_ledger(rollout, engine)
    trained = [sum(sample.loss_mask) for sample in to_samples(rollout)]
    assert trained == [len(c.token_ids) for c in engine.completions]
    assert rollout.env_rewards == [0.0, 1.5]


async def test_a_question_asked_again_draws_other_numbers() -> None:
    rollout, engine = await play([f"5{END}", f"1{END}"], block(turns=2, history="repeated"))
    check_ledger(rollout, engine)
    assert engine.requests[0].prompt_ids == engine.requests[1].prompt_ids
    assert engine.requests[0].seed != engine.requests[1].seed
    assert rollout.segments[1].prefix_len == len(engine.requests[0].prompt_ids)


async def test_tools_are_called_in_the_renderers_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    rollout, engine = await play(
        ["<code>tea</code>", f"1{END}"], block(tools=True, turns=2), tags=True
    )
    assert texts(rollout)[2:] == ["<code>tea</code>", "3 euros", "1"]
    assert rollout.messages[3].type is MessageType.TOOL
    check_ledger(rollout, engine)
    assert len(rollout.segments) == 1 and rollout.env_rewards == [0.0, 1.5]
    with pytest.raises(UserError, match=r"environment\.tool_format does not say"):
        await play([f"1{END}"], block(tools=True))


async def test_limits_of_the_environment_end_it() -> None:
    env = block(turns=5)
    env["agent"]["max_turns"] = 2
    rollout, _ = await play([f"5{END}", f"1{END}"], env)
    assert (rollout.env_rewards, rollout.stop_reason) == ([0.0, 1.5], "max_steps")


async def test_a_turn_that_is_cut_is_told_so() -> None:
    rollout, _ = await play(["1"], block())
    assert (rollout.env_rewards, rollout.stop_reason) == ([1.5], "length")


async def test_whose_fault_it_is() -> None:
    with pytest.raises(UserError, match=r"TaskError.*no such world"):
        await play([f"1{END}"], block(task={"broken": True}))
    rollout, engine = await play([f"1x{END}"], block(stop="x"))
    assert engine.requests[0].params.stop == ("x",)
    rollout, _ = await play([], block(crash=True))
    assert rollout.failures[0].kind == "environment" and "fell over" in (rollout.error or "")
    with pytest.raises(UserError, match="did not ask the policy"):
        await play([], block(turns=0))


async def test_an_engine_that_fails_masks_the_rollout() -> None:
    class Failing(ScriptedEngine):
        async def generate(self, request: Any) -> Any:
            raise InfrastructureError("away")

    renderer = plain_renderer("chatml")
    world = VerifiersEnvironment(renderer, env=block())
    (task,) = tasks(block(), limit=1)
    engine = Failing(renderer.codec, [])
    try:
        sampler = Sampler(world, engine, renderer, SamplingParams(), retries=1, backoff_s=0.0)
        (rollout,) = await sampler.episode(task)
    finally:
        await world.close()
    assert [f.kind for f in rollout.failures] == ["engine", "engine"]


async def test_the_endpoint_knows_its_callers() -> None:
    import httpx

    world = VerifiersEnvironment(plain_renderer("chatml"), env=block())
    try:
        await world._service.start()
        async with httpx.AsyncClient(base_url=f"{world._service.server.url}/v1") as client:
            assert (await client.post("/chat/completions", json={})).status_code == 401
            key = {"x-api-key": world._service.traces.key}
            assert (await client.post("/chat/completions", json={}, headers=key)).status_code == 404
    finally:
        await world.close()


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({}, "exactly one of env and path"),
        ({"env": block(), "params": {"turns": 1}}, "params are those of path"),
        ({"env": {"taskset": {"id": "no-such-taskset"}}}, "'no-such-taskset' not found"),
        ({"path": "verifiers_worlds:nothing"}, "gave str, not a verifiers.v1.Env"),
        ({"path": "verifiers_worlds:environment"}, "makes no environment: TypeError"),
    ],
)
def test_what_is_no_environment_is_refused(
    keys: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    environment = {"type": "verifiers", **keys}
    with pytest.raises(UserError, match=fault):
        retrain.run_sync(rl_config(tmp_path, environment=environment, reward_setup={}))


def test_every_key_reaches_the_environment() -> None:
    """`tool_format` is the renderer's: see the training step with tools."""
    renderer = plain_renderer("chatml")
    made, line = built(renderer, type="verifiers", env=block(turns=3))
    assert isinstance(made, VerifiersEnvironment) and line == "SingleAgentEnv of Digits"
    assert made.env.config.agent.harness.turns == 3
    path = "verifiers_worlds:environment"
    made, _ = built(renderer, type="verifiers", path=path, params={"turns": 2})
    assert isinstance(made, VerifiersEnvironment)
    assert made.env.config.agent.harness.turns == 2


def source(**params: Any) -> dict[str, Any]:
    function = "retrain.envs.adapters.verifiers:tasks"
    return {"type": "python", "function": function, "params": params}


@pytest.mark.parametrize("turns", [1, 2])
def test_a_training_step(turns: int, tmp_path: Path) -> None:
    env = {"path": "verifiers_worlds:environment", "params": {"turns": turns}}
    trained = train(
        tmp_path,
        sft="verifiers_worlds:traces",
        environment={"type": "verifiers", **env},
        prompt_source=source(**env),
    )
    check_exact(trained)
    assert weights_changed(trained)
    ended = [r for r in trained.rollouts if r.stop_reason == "answered"]
    assert ended and all(len(r.model_messages) == turns for r in ended)
    assert all(r.env_rewards[-1] in (0.0, 0.5, 1.5) for r in trained.rollouts)
    assert any(r.env_rewards[-1] > 0 for r in trained.rollouts)


def test_a_training_step_with_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    env = block(tools=True, turns=2)
    trained = train(
        tmp_path,
        sft="verifiers_worlds:shop_traces",
        environment={"type": "verifiers", "env": env, "tool_format": {"type": "tags"}},
        prompt_source=source(env=env),
    )
    check_exact(trained)
    told = [m.content for r in trained.rollouts for m in r.messages if m.type is MessageType.TOOL]
    assert any(text.endswith("euros") for text in told)
