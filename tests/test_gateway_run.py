"""`retrain gateway`: a real command, in front of an endpoint and of the model of a config."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from engine_servers.chat import ChatServer
from retrain.config.load import load_config
from retrain.tracking.rollouts import read_rollouts
from retrain.types import Source, UserError

KEY = "sk-upstream-secret"
MODEL = {
    "from_scratch": {
        "model_type": "qwen3",
        "config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
        },
        "tokenizer": {"vocab_size": 300, "corpus": "runs:corpus"},
    }
}

AGENT = """
import os, sys
from openai import OpenAI

client = OpenAI()
talk = [{"role": "user", "content": sys.argv[1]}]
for _ in range(2):
    reply = client.chat.completions.create(model="any", messages=talk)
    talk += [{"role": "assistant", "content": reply.choices[0].message.content},
             {"role": "user", "content": "and?"}]
import urllib.request, json
body = json.dumps({"reward": 0.5, "metadata": {"answer": 7}}).encode()
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
request = urllib.request.Request(os.environ["RETRAIN_REWARD_URL"], body, headers)
urllib.request.urlopen(request).read()
sys.exit(int(sys.argv[2]))
"""


def config(tmp_path: Path, **gateway: Any) -> Path:
    path = tmp_path / "gateway.yaml"
    section = {"port": 0, "records": str(tmp_path / "records.jsonl"), **gateway}
    hyper = {"max_new_tokens": 8}
    given = {"model": MODEL, "gateway": section, "algorithm": {"hyperparameters": hyper}}
    path.write_text(json.dumps(given))
    return path


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parent)
    code = "from retrain.cli import main; main()"
    paths = os.pathsep.join([tests, *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code, "gateway", *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def start(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    code = "from retrain.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "gateway", *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables},
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come about")


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]


def test_an_agent_is_recorded_in_front_of_an_endpoint(tmp_path: Path) -> None:
    """The model of the config is not even loaded: it does not exist."""
    agent = tmp_path / "agent.py"
    agent.write_text(AGENT)
    with ChatServer(lambda messages: f"heard {len(messages)}", api_key=KEY) as upstream:
        asked = {"url": upstream.url, "model": "small", "api_key_env": "UPSTREAM_KEY"}
        path = config(tmp_path, upstream=asked)
        path.write_text(path.read_text().replace("runs:corpus", "nothing:there"))
        command = ["--", sys.executable, str(agent), "hello", "3"]
        done = run(str(path), *command, UPSTREAM_KEY=KEY)
    assert done.returncode == 3, done.stderr
    assert "served 2 answers in 1 sessions" in done.stderr
    first, second, session = records(tmp_path)
    assert first["messages"] == [{"role": "user", "content": "hello"}]
    assert (first["reply"]["content"], second["reply"]["content"]) == ("heard 1", "heard 3")
    assert second["messages"] == [{"role": "user", "content": "and?"}]
    assert second["conversation"] == first["conversation"] and first["parent"] is None
    assert first["model"] == "small" and first["usage"]["completion_tokens"] > 0
    assert (session["reward"], session["metadata"]) == (0.5, {"answer": 7})
    assert session["session"] == first["session"]
    everything = done.stderr + done.stdout + (tmp_path / "records.jsonl").read_text()
    assert KEY not in everything and "rk-" not in everything


def test_the_model_of_the_config_keeps_its_tokens(tmp_path: Path) -> None:
    agent = tmp_path / "agent.py"
    agent.write_text(AGENT)
    path = config(tmp_path, rollouts=str(tmp_path / "rollouts.jsonl.gz"))
    done = run(str(path), "--", sys.executable, str(agent), "12+34?", "0")
    assert done.returncode == 0, done.stderr
    assert "served 2 answers in 1 sessions; 1 rollouts" in done.stderr
    (rollout,) = read_rollouts(tmp_path / "rollouts.jsonl.gz")
    replies = [line["reply"]["content"] for line in records(tmp_path) if "reply" in line]
    assert [rollout.messages[i].content.strip() for i in rollout.model_messages] == [
        reply.strip() for reply in replies
    ]
    assert (rollout.reward, rollout.env_rewards) == (0.5, [0.0, 0.5])
    assert rollout.metrics["reward_given"] == 1.0
    assert rollout.task is not None and rollout.task.metadata == {"answer": 7}
    (segment,) = rollout.segments
    sampled = [s == Source.SAMPLED for s in segment.source]
    assert 2 <= sum(sampled) <= 16
    assert all((p < 0) == s for p, s in zip(segment.logprobs, sampled, strict=True))


TOOL_AGENT = """
from openai import OpenAI

function = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
tools = [{"type": "function", "function": function}]
talk = [{"role": "user", "content": "12?"}]
OpenAI().chat.completions.create(model="any", messages=talk, tools=tools)
"""


def test_tools_are_called_in_the_gateways_own_format(tmp_path: Path) -> None:
    agent = tmp_path / "agent.py"
    agent.write_text(TOOL_AGENT)
    rollouts = str(tmp_path / "rollouts.jsonl.gz")
    path = config(tmp_path, rollouts=rollouts)
    done = run(str(path), "--", sys.executable, str(agent))
    assert done.returncode == 1 and "environment.tool_format" in done.stderr
    form = {"type": "tags", "tool_start": "<use>", "tool_end": "</use>"}
    path = config(tmp_path, rollouts=rollouts, tool_format=form)
    done = run(str(path), "--", sys.executable, str(agent))
    assert done.returncode == 0, done.stderr
    (rollout,) = read_rollouts(rollouts)
    assert "look" in rollout.messages[0].content and "<use>" in rollout.messages[0].content


def test_it_serves_until_it_is_stopped(tmp_path: Path) -> None:
    """Keys are asked for; sessions that are silent end."""
    rollouts = str(tmp_path / "rollouts.jsonl.gz")
    settings = {"keys_env": "CALLERS", "idle_s": 0.1, "rollouts": rollouts}
    path = config(tmp_path, host="0.0.0.0", max_body_mb=0.001, **settings)
    server = start(str(path), CALLERS="one, two")
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        url = line.split()[1]
        assert url.startswith("http://127.0.0.1:"), line
        body: dict[str, Any] = {"model": "x", "messages": [{"role": "user", "content": "1+1?"}]}
        for key, status in (("one", 200), ("two", 200), ("three", 401), ("", 401)):
            bearer = {"Authorization": f"Bearer {key}"} if key else {}
            answer = httpx2.post(f"{url}/v1/chat/completions", json=body, headers=bearer)
            assert answer.status_code == status, answer.text
        body["messages"][0]["content"] = "x" * 2000
        bearer = {"Authorization": "Bearer one"}
        answer = httpx2.post(f"{url}/v1/chat/completions", json=body, headers=bearer)
        assert answer.status_code == 413
        listed = httpx2.get(f"{url}/v1/models", headers=bearer).json()["data"]
        assert [model["id"] for model in listed] == ["policy"]
        written = tmp_path / "rollouts.jsonl.gz"
        wait_for(lambda: len(list(read_rollouts(written))) == 2)
        body["messages"][0]["content"] = "1+1?"
        httpx2.post(f"{url}/v1/chat/completions", json=body, headers=bearer)
        wait_for(lambda: len(list(read_rollouts(written))) == 3)
        server.send_signal(signal.SIGINT)
        rest = server.communicate(timeout=60)[1]
    finally:
        server.kill()
    assert "served 3 answers in 3 sessions; 3 rollouts" in rest
    assert "three" not in rest and server.returncode == 0
    rollouts_of_it = list(read_rollouts(written))
    one = f"key-{hashlib.sha256(b'one').hexdigest()[:16]}"
    ids = [rollout.id for rollout in rollouts_of_it]
    assert len(set(ids)) == 3 and ids[2] == f"{one}~2" and one in ids
    assert [rollout.metrics["reward_given"] for rollout in rollouts_of_it] == [0.0] * 3


def test_a_command_that_is_killed_says_so_by_its_exit_code(tmp_path: Path) -> None:
    path = config(tmp_path, upstream={"url": "http://127.0.0.1:9"})
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run(str(path), "--", sys.executable, "-c", script).returncode == 128 + signal.SIGKILL


def test_the_gateway_stops_its_command_when_it_is_stopped(tmp_path: Path) -> None:
    """Also one that does not listen."""
    path = config(tmp_path, upstream={"url": "http://127.0.0.1:9"})
    script = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'ready'); time.sleep(60)"
    )
    server = start(str(path), "--", sys.executable, "-c", script, cwd=tmp_path)
    try:
        wait_for((tmp_path / "ready").exists)
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "ready").read_text()), 0)


@pytest.mark.parametrize(
    ("gateway", "fault"),
    [
        ({"host": "0.0.0.0"}, "callers need keys: set keys_env"),
        ({"upstream": {"url": "http://x"}, "rollouts": "r"}, "rollouts does nothing with upstream"),
        (
            {"upstream": {"url": "http://x"}, "tool_format": {"type": "tags"}},
            "tool_format does nothing with upstream",
        ),
        ({"keys_env": "sk-1 2"}, "not the name of an environment variable"),
        ({"upstream": {"url": "http://x", "api_key_env": "sk-1"}}, "not the name of"),
    ],
)
def test_what_a_config_cannot_say(gateway: dict[str, Any], fault: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=fault):
        load_config(config(tmp_path, **gateway), runs=False)


def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    path = config(tmp_path, upstream={"url": "http://127.0.0.1:9", "api_key_env": "NO_SUCH"})
    done = run(str(path))
    assert done.returncode == 2 and "NO_SUCH" in done.stderr
    (tmp_path / "file").touch()
    path = config(tmp_path, rollouts=str(tmp_path / "file" / "below"))
    path.write_text(path.read_text().replace("runs:corpus", "nothing:there"))
    done = run(str(path))
    assert done.returncode == 2 and "gateway.rollouts" in done.stderr, "told before the model is"
    path = config(tmp_path, upstream={"url": "http://127.0.0.1:9"})
    done = run(str(path), "--", "no-such-program")
    assert done.returncode == 2 and "no-such-program cannot be started" in done.stderr
