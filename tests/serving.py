"""Tiny policies, and engines over servers that follow them."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import copy
import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from engine_servers.knobs import VARIABLE
from engine_servers.launch import FAKE
from engine_servers.server import EngineServer
from engine_servers.warm import warm
from retrain.config import load_config
from retrain.engines.base import Completion, GenerateRequest, SamplingParams
from retrain.engines.server.engine import ServerEngine
from retrain.loops.engines import build_engine
from retrain.models import Policy
from retrain.models.scores import selected_logprobs
from runs import model_section, rl_config
from tiny import byte_tokenizer, tiny_qwen3

PROMPT = list(range(40, 60))


def tiny_policy(make: Callable[..., Any] = tiny_qwen3, *, lora: bool = False) -> Policy:
    model = make(0)
    if lora:
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config).eval()
    policy = Policy(model, byte_tokenizer(special=("<eos>", "<stop>")))
    shake(policy, 0)
    return policy


def shake(policy: Policy, seed: int) -> Any:
    """Change what trains; a copy of the model as it is then."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return copy.deepcopy(policy.model)


def saved(policy: Policy, directory: Path, seed: int = 9) -> Path:
    """The directory of a model of the same make with other weights, for servers that run
    already; of the base of an adapter, since that does not train."""
    model: Any = copy.deepcopy(policy.model)
    if hasattr(model, "unload"):
        model = model.unload()
    else:
        shake(other := Policy(model, policy.tokenizer), seed)
        model = other.model
    model.save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)
    return directory


def engine_over(policy: Policy, **section: Any) -> ServerEngine:
    """As a run builds it from its config."""
    lora = hasattr(policy.model, "peft_config")
    model = model_section() | ({"peft": {"r": 4}} if lora else {})
    engine = build_engine(load_config(rl_config(Path("runs"), engine=section, model=model)), policy)
    assert isinstance(engine, ServerEngine)
    return engine


@asynccontextmanager
async def serving(policy: Policy, directory: Path, **section: Any) -> AsyncIterator[ServerEngine]:
    """An engine that has version 0."""
    engine = engine_over(policy, **section)
    try:
        await engine.prepare()
        await engine.start(directory)
        await engine.update_weights(0)
        yield engine
    finally:
        await engine.close()


@functools.cache
def quickly() -> dict[str, str]:
    """Variables that spare servers their imports."""
    kept = contextlib.ExitStack()
    atexit.register(kept.close)
    return kept.enter_context(warm())


def launching(kind: str = "vllm", /, *, env: dict[str, str] | None = None, **section: Any) -> Any:
    """The section of servers that the run starts."""
    path = {"PYTHONPATH": str(FAKE), "OMP_NUM_THREADS": "1"}
    return {"type": kind, "python": sys.executable, "env": path | (env or {})} | section


def knobs(path: Path, **values: Any) -> dict[str, str]:
    """Variables of servers that misbehave as this file says."""
    path.write_text(json.dumps(values))
    return quickly() | {VARIABLE: str(path)}


def request(
    prompt: list[int] = PROMPT,
    count: int = 8,
    seed: int = 0,
    *,
    session: str | None = None,
    group: str | None = None,
    **params: Any,
) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(count, **params), seed, session, group)


def logprobs(model: Any, ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Of each token given those before it [T]; 0 for the first."""
    tokens = torch.tensor([list(ids)])
    mask = torch.arange(len(ids)).unsqueeze(0) > 0
    with torch.no_grad():
        return selected_logprobs(model, tokens, torch.tensor([len(ids)]), mask, temperature)[0]


def check(models: dict[int, Any], asked: GenerateRequest, got: Completion) -> None:
    """Each token's log-probability is that of the model of its version, given all before it."""
    versions = torch.tensor(got.versions)
    assert len(got.token_ids) == len(got.logprobs) == len(got.versions)
    assert (versions[1:] >= versions[:-1]).all()
    found = torch.tensor(got.logprobs)
    for version in set(got.versions):
        sequence = [*asked.prompt_ids, *got.token_ids]
        of_model = logprobs(models[version], sequence, asked.params.temperature or 1.0)
        own = versions == version
        expected = of_model[len(asked.prompt_ids) :][own]
        torch.testing.assert_close(found[own], expected, atol=1e-4, rtol=0)


async def until(true: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.01)


def logs(directory: Path) -> list[Path]:
    return sorted((directory / "engine").glob("*.log"))


def pids(directory: Path) -> list[int]:
    """Of all servers that an engine with this directory ever started, in order, by replica."""
    said = "".join(log.read_text() for log in logs(directory))
    return [int(pid) for pid in re.findall(r", pid (\d+)$", said, re.MULTILINE)]


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)


@contextmanager
def several(directory: Path, count: int, **options: Any) -> Iterator[list[EngineServer]]:
    servers = [EngineServer(directory, **options).__enter__() for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            server.__exit__()


def over(*servers: EngineServer, **section: Any) -> dict[str, Any]:
    return {"type": "vllm", "urls": [server.url for server in servers], **section}
