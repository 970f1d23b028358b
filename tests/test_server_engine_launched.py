"""Inference servers that the run starts, and the section of the config that describes servers."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from retrain.config import load_config
from retrain.types import UserError
from runs import rl_config
from serving import (
    alive,
    check,
    engine_over,
    knobs,
    launching,
    logs,
    pids,
    quickly,
    request,
    serving,
    shake,
    tiny_policy,
    until,
)
from tiny import tiny_llama

KINDS = ["vllm", "sglang"]


async def start(directory: Path, **section: Any) -> None:
    async with serving(tiny_policy(), directory, **section):
        pass


# Servers that the run starts


async def test_an_interpreter_that_is_none_or_has_no_server(tmp_path: Path) -> None:
    text = tmp_path / "python"
    text.write_text("#!/bin/sh\necho no python >&2\nexit 3\n")
    text.chmod(0o755)
    for python, env, said in (
        (str(tmp_path / "nowhere"), {}, "cannot be run: No such file"),
        (str(text), {}, "is no Python interpreter: no python"),
        (sys.executable, {"PYTHONPATH": ""}, "has no module vllm"),
    ):
        section = {**launching(python=python), "env": env}
        with pytest.raises(UserError, match=said) as raised:
            await start(tmp_path, **section)
        assert raised.value.cause.startswith(f"engine.python: {python} ")
        assert "that vllm is installed in" in raised.value.next_step


async def test_a_server_that_does_not_come_up_shows_its_last_words(tmp_path: Path) -> None:
    env = knobs(tmp_path / "knobs.json", exit_at_start=3)
    section = launching(env=env, replicas=2)
    with pytest.raises(UserError, match=r"did not start: .*told not to come up") as raised:
        await start(tmp_path, **section)
    log = Path(raised.value.next_step.removeprefix("Its log: "))
    assert log in logs(tmp_path)
    assert not (tmp_path / "engine" / "weights").exists()


async def test_start_timeout_s_is_how_long_it_may_take(tmp_path: Path) -> None:
    env = knobs(tmp_path / "knobs.json", start_delay_s=60)
    section = launching(env=env, start_timeout_s=0.5)
    async with asyncio.timeout(20):
        with pytest.raises(UserError, match=r"not well within 0\.5 s \(engine\.start_timeout_s\)"):
            await start(tmp_path, **section)


async def test_what_the_config_says_reaches_the_servers(tmp_path: Path) -> None:
    """replicas, devices, args, env, context_limit; all of them end with the engine."""
    section = launching(
        env=quickly() | {"MARK": "x"},
        replicas=2,
        devices=["1", "2,3"],
        args=["--seed", "5", "--enforce-eager"],
        context_limit=120,
    )
    policy = tiny_policy()
    async with serving(policy, tmp_path, **section) as engine:
        started = pids(tmp_path)
        for number, pid in enumerate(started):
            given = Path(f"/proc/{launched_by(tmp_path, number)}")
            command = (given / "cmdline").read_bytes().decode().split("\0")
            at = command.index("--seed")
            assert command[at : at + 3] == ["--seed", "5", "--enforce-eager"]
            assert command[command.index("--max-model-len") + 1] == "120"
            variables = (given / "environ").read_bytes().decode().split("\0")
            assert f"CUDA_VISIBLE_DEVICES={['1', '2,3'][number]}" in variables
            assert {"MARK=x", "VLLM_SERVER_DEV_MODE=1"} <= set(variables)
            assert alive(pid)
        models = {1: shake(policy, 1)}
        await engine.update_weights(1)
        got = await asyncio.gather(*(engine.generate(request(seed=i)) for i in range(4)))
        for completion in got:
            check(models, request(), completion)
    assert len(started) == 2
    await until(lambda: not any(map(alive, started)))


def launched_by(directory: Path, number: int) -> int:
    """The process that the keeper of a replica started, whose log it writes to."""
    log = str(directory / "engine" / f"vllm-{number}.log")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            if b"vllm.entrypoints.openai.api_server" not in command or b"-I" in command:
                continue
            if str((process / "fd" / "1").resolve()) == log:
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no process writes to {log}")


@pytest.mark.parametrize("kind", KINDS)
async def test_an_adapter_at_servers_that_the_run_starts(kind: Any, tmp_path: Path) -> None:
    """The base is written where no place has it; the rank is what the adapter has."""
    policy = tiny_policy(lora=True)
    async with serving(policy, tmp_path, **launching(kind, env=quickly())) as engine:
        assert (tmp_path / "engine" / "weights" / "base" / "config.json").exists()
        models = {1: shake(policy, 1)}
        await engine.update_weights(1)
        check(models, request(), await engine.generate(request()))


# The section of the config


def refused(**section: Any) -> str:
    with pytest.raises(UserError) as raised:
        load_config(rl_config(Path("runs"), engine=section))
    return str(raised.value)


def test_a_section_that_contradicts_itself_is_refused() -> None:
    url, python = "http://127.0.0.1:1", "/usr/bin/python3"
    for kind in KINDS:
        assert "set python" in refused(type=kind)
        assert "not both" in refused(type=kind, python=python, urls=[url])
        assert "urls has one server twice" in refused(type=kind, urls=[url, f"{url}/v1"])
        assert "is not a web address" in refused(type=kind, urls=["127.0.0.1:1"])
        visible = {"CUDA_VISIBLE_DEVICES": "0"}
        both = refused(type=kind, python=python, devices=["1"], env=visible)
        assert "CUDA_VISIBLE_DEVICES does nothing beside devices" in both
        for flag in ("--port", "--host=0.0.0.0", "--logprobs-mode", "--max_model_len"):
            assert "is set by the run" in refused(type=kind, python=python, args=[flag, "1"])
        for key, value in (
            ("replicas", 2),
            ("devices", ["0"]),
            ("args", ["-v"]),
            ("env", {"A": "b"}),
            ("start_timeout_s", 5),
        ):
            assert f"{key}: nothing to act on" in refused(type=kind, urls=[url], **{key: value})
        devices = refused(type=kind, python=python, replicas=3, devices=["0", "1"])
        assert "devices has 2 entries for 3 replicas" in devices
        assert "nccl is not built" in refused(type=kind, urls=[url], weights="nccl")
    assert "openai gives text only" in refused(type="openai", url=url)
    assert "max_slots" in refused(type="vllm", urls=[url], max_slots=3)
    assert "python" in refused(type="torch", python=python)


def test_what_does_nothing_for_this_model_is_refused() -> None:
    section = {"type": "vllm", "urls": ["http://127.0.0.1:1"]}
    with pytest.raises(UserError, match="weights: lora needs an adapter"):
        engine_over(tiny_policy(), **section, weights="lora")
    with pytest.raises(UserError, match="untie_embeddings does nothing here: only an adapter"):
        engine_over(tiny_policy(lora=True), **section, untie_embeddings=True)
    with pytest.raises(UserError, match="untie_embeddings does nothing here: the embeddings are"):
        engine_over(tiny_policy(tiny_llama), **section, untie_embeddings=True)
    engine_over(tiny_policy(lora=True), **section, weights="full", untie_embeddings=True)
