"""Whole runs inside programs of the user's, `retrain check` of them, and the page about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import retrain
from adapting import check_exact, train, weights_changed
from outside import program
from retrain.config import load_config
from retrain.config.load import merge
from retrain.envs.external import ExternalEnvironment
from retrain.loops.check import check
from retrain.loops.external import build_external
from retrain.loops.world import build_renderer
from retrain.types import UserError
from runs import metrics_of, rl_config, rollouts_of
from scripted import plain_renderer
from test_docs import TINY_MODEL, parse, unpack

WITH_SDK = '''
from openai import OpenAI

def agent(task):
    """Two turns, by OpenAI's own client."""
    client, messages = OpenAI(), [{"role": "user", "content": task["prompt"]}]
    said = ""
    for _ in range(2):
        made = client.chat.completions.create(model="any", messages=messages)
        said = made.choices[0].message.content
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "On."}]
    return {"reward": float(any(c.isdigit() for c in said)), "length": len(said)}
'''

BY_COMMAND = """
said = ask(sys.argv[1])["content"]
reward(sum(c.isdigit() for c in said) / max(len(said), 1), level=int(sys.argv[2]))
"""


def questions() -> Any:
    for n in range(4):
        yield {"prompt": "Say 1.", "level": n, "number": n}


def traces() -> Any:
    from verifiers_worlds import traces as short

    for trace in short():
        yield {"messages": trace["messages"][1:]}


SOURCE = {"type": "python", "function": "test_env_external_run:questions"}


@pytest.mark.parametrize("kind", ["function", "command"])
def test_a_training_run_inside_a_program(kind: str, tmp_path: Path) -> None:
    """The rewards are the program's, every sampled token is in the ledger, and the policy moves."""
    environment: dict[str, Any] = {"type": "external", "working_dir": str(tmp_path)}
    if kind == "function":
        pytest.importorskip("openai")
        program(tmp_path, WITH_SDK)
        environment["function"] = f"{tmp_path}/agent.py:agent"
    else:
        command = program(tmp_path, BY_COMMAND)
        environment["command"] = [*command, "{prompt}", "{level}"]
    trained = train(
        tmp_path / "runs",
        sft="test_env_external_run:traces",
        environment=environment,
        prompt_source=SOURCE,
    )
    check_exact(trained)
    assert weights_changed(trained)
    turns = 2 if kind == "function" else 1
    assert all(len(r.model_messages) == turns for r in trained.rollouts)
    assert any(r.reward > 0 for r in trained.rollouts)
    said = "external/length" if kind == "function" else "external/level"
    assert all(r.metrics["external/turns"] == turns and said in r.metrics for r in trained.rollouts)


def test_rewards_of_the_config_see_its_rollouts(tmp_path: Path) -> None:
    """Beside the program's own, or alone."""
    command = program(tmp_path, "ask(sys.argv[1])\nif sys.argv[2] != '0':\n    reward(5)\n")
    environment = {"command": [*command, "{prompt}", "{level}"], "working_dir": str(tmp_path)}
    config = rl_config(
        tmp_path / "runs",
        environment={"type": "external", **environment},
        prompt_source=SOURCE,
        evaluation={"prompt_source": SOURCE, "every_steps": 2},
    )
    result = retrain.run_sync(config)
    rollouts = [r for step in rollouts_of(result.path).values() for r in step]
    assert len(rollouts) == 12
    for rollout in rollouts:
        assert rollout.task is not None
        own = 5.0 if rollout.task.metadata["level"] else 0.0
        digits = sum(p.value for p in rollout.reward_parts if p.name == "digits")
        assert rollout.env_rewards == [own]
        assert rollout.reward == pytest.approx(own + digits)
    assert all(row.get("rollouts/masked", 0) == 0 for row in metrics_of(result.path))


def test_a_program_that_fails_at_once_stops_the_run(tmp_path: Path) -> None:
    command = program(tmp_path, "sys.exit('no such database')")
    environment = {"type": "external", "command": command, "working_dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"(?s)exit code 1.*no such database"):
        retrain.run_sync(
            rl_config(tmp_path / "runs", environment=environment, prompt_source=SOURCE)
        )


def external(**keys: Any) -> dict[str, Any]:
    return rl_config(Path("runs"), environment={"type": "external", **keys}, reward_setup={})


def test_every_key_reaches_the_environment(tmp_path: Path) -> None:
    keys = {
        "function": f"{program(tmp_path, 'def agent(task): ...')[1]}:agent",
        "preload": False,
        "working_dir": ".",
        "env": {"A": "1"},
        "pass_answer": True,
        "timeout_s": 7.0,
        "kill_after_s": 0.5,
        "ends_on_reward": True,
        "on_failure": "score",
        "output_dir": "kept",
        "describe_tools": True,
        "tool_format": {"type": "fenced"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        config: Any = load_config(external(**keys))
        made = build_external(config.environment, plain_renderer("chatml"))
    assert isinstance(made, ExternalEnvironment)
    assert (made.pass_answer, made.timeout_s, made.ends_on_reward) == (True, 7.0, True)
    assert (made.on_failure, str(made.output_dir), made.describe_tools) == ("score", "kept", True)
    service = made.service
    assert service.function == f"{tmp_path}/agent.py:agent"
    assert (service.preload, service.directory, service.kill_after_s) == (False, tmp_path, 0.5)
    assert service.variables["A"] == "1"


def test_the_tool_format_is_the_renderers(tmp_path: Path) -> None:
    from retrain.models import load_policy

    made = external(command=["true"], tool_format={"type": "fenced", "language": "sh"})
    config = load_config(made)
    form = build_renderer(config, load_policy(config.model)).tool_format
    assert form is not None and form.opening == "```sh"


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({}, "set exactly one of command and function"),
        ({"command": ["a"], "function": "a:b"}, "set exactly one of command and function"),
        ({"command": []}, "at least 1 item"),
        ({"command": ["a"], "preload": False}, "preload: false does nothing with command"),
        ({"function": "a:b", "describe_tools": True}, "describe_tools needs a tool_format"),
        (
            {"function": "a:b", "describe_tools": True, "tool_format": {"type": "native"}},
            "describe_tools needs a tool_format",
        ),
        ({"function": "a:b", "timeout_s": 0}, "greater than 0"),
    ],
)
def test_refusals(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        load_config(external(**keys))


def test_check_looks_for_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function is imported elsewhere, and not called."""
    monkeypatch.chdir(tmp_path)
    program(tmp_path, "open('imported', 'a').write('x')\ndef agent(task):\n    1 / 0\n")
    told = check(load_config(external(function="agent.py:agent", timeout_s=30)))
    assert "agent.py:agent; at most 30 s; failures: mask" in told
    assert "not bit for bit: a program of your own asks the model" in told
    assert (tmp_path / "imported").read_text() == "x"
    assert "failures: score" in check(load_config(external(command=["true"], on_failure="score")))
    for keys, fault in (
        ({"function": "agent.py:agnet"}, "does not define 'agnet'"),
        ({"function": "agent.py:agnet", "preload": False}, "does not define 'agnet'"),
        ({"command": ["no-such-program-here"]}, "there is no program"),
    ):
        with pytest.raises(UserError, match=fault):
            check(load_config(external(**keys)))


def test_the_page_s_agent_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    monkeypatch.chdir(unpack("docs/external_agents.md", tmp_path))
    config = merge(parse(Path("agent.yaml").read_text()), parse(TINY_MODEL))
    config |= {"model": parse(TINY_MODEL)["model"], "tracking": {"plots": False}}
    assert "my_agent.py:solve" in check(load_config(config))
    result = retrain.run_sync(config)
    rollouts = [r for step in rollouts_of(result.path).values() for r in step]
    assert len(rollouts) == 2 and not any(r.error for r in rollouts)
    for rollout in rollouts:
        assert rollout.metrics["external/attempts"] == len(rollout.model_messages)
        assert json.loads(json.dumps(rollout.env_rewards))[-1] in (0.0, 0.1, 1.1)


def test_the_pages_other_configs_load(tmp_path: Path) -> None:
    from test_docs import blocks

    parts = [b.text for b in blocks("docs/external_agents.md") if b.language == "yaml"]
    assert len(parts) == 2
    load_config(rl_config(tmp_path, **parse(parts[1])))
