"""Small whole runs: a config that takes a second, and an engine that writes down what it did."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrain.engines.base import Completion, GenerateRequest
from retrain.engines.torch_engine import TorchEngine
from retrain.envs import Environment, Step
from retrain.tracking.rollouts import read_rollouts
from retrain.tracking.run_dir import read_metrics
from retrain.types import Message, MessageType, Rollout, Task

TAGS = ("<code>", "</code>", "<interpreter>", "</interpreter>")


class RecordingEngine(TorchEngine):
    """The real engine; `log` holds every request and its completion, by session."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log: dict[str, list[tuple[GenerateRequest, Completion]]] = {}

    @property
    def model(self) -> Any:
        return self._model

    async def generate(self, request: GenerateRequest) -> Completion:
        completion = await super().generate(request)
        self.log.setdefault(str(request.session), []).append((request, completion))
        return completion


def corpus() -> Iterator[str]:
    yield from ("User:\nWhat is 12+34?\n\nAssistant:\n46", "0 1 2 3 4 5 6 7 8 9 + = ") * 20


def questions(n: int = 40, first: int = 10) -> Iterator[dict[str, Any]]:
    for a in range(first, first + n):
        yield {"prompt": f"What is {a}+{a + 1}?", "answer": str(2 * a + 1), "parity": str(a % 2)}


def traces(n: int = 320) -> Iterator[dict[str, Any]]:
    """Half with the tool, half without."""
    generator = random.Random(0)
    for _ in range(n):
        a = generator.randint(10, 49)
        question = {"role": "user", "content": f"What is {a}+{a + 1}?"}
        answer = {"role": "assistant", "content": str(2 * a + 1)}
        call = {"role": "assistant", "content": f"<code>{a}+{a + 1}</code>"}
        result = {"role": "tool", "name": "python", "content": str(2 * a + 1)}
        if generator.random() < 0.5:
            yield {"messages": [question, call, result, answer]}
        else:
            yield {"messages": [question, answer]}


def digits(rollout: Rollout) -> float:
    """Share of digits in what the model said: varied from the first step on."""
    text = rollout.completion
    return sum(c.isdigit() for c in text) / max(len(text), 1)


def model_section(model_type: str = "qwen3", **config: Any) -> dict[str, Any]:
    sizes = {
        "qwen3": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 192,
            "tie_word_embeddings": True,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 192},
    }[model_type]
    tokenizer = {"vocab_size": 300, "corpus": "runs:corpus", "special_tokens": list(TAGS)}
    spec = {"model_type": model_type, "config": {**sizes, **config}, "tokenizer": tokenizer}
    return {"from_scratch": spec}


def rl_config(output_dir: Path, **sections: Any) -> dict[str, Any]:
    """Two steps of GRPO on questions; sections given replace the ones here."""
    config: dict[str, Any] = {
        "experiment_name": "t",
        "output_dir": str(output_dir),
        "model": model_section(),
        "environment": {"type": "smolagent", "tools": ["python"], "max_steps": 2},
        "prompt_source": {"type": "python", "function": "runs:questions"},
        "reward_setup": {"rollout_reward_configs": {"digits": {"function": "runs:digits"}}},
        "algorithm": {"hyperparameters": hyperparameters()},
        "tracking": {"plots": False, "progress": "off"},
    }
    return config | sections


def hyperparameters(**changed: Any) -> dict[str, Any]:
    return {
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 3,
        "max_new_tokens": 6,
        "learning_rate": 1e-3,
    } | changed


def sft_section(**changed: Any) -> dict[str, Any]:
    return {
        "dataset": "runs:traces",
        "steps": 20,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "optimizer": "muon",
    } | changed


def rollouts_of(run: Path, stage: str = "rl") -> dict[int, list[Rollout]]:
    """The rollouts that a run wrote down, by step."""
    files = sorted((run / "rollouts").glob(f"{stage}-[0-9]*.jsonl.gz"))
    return {int(f.name.removesuffix(".jsonl.gz")[-6:]): list(read_rollouts(f)) for f in files}


def metrics_of(run: Path, stage: str = "rl") -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if row["stage"] == stage]


class Countdown(Environment):
    """A world of one's own: say a digit until `turns` are over; a digit earns a point."""

    def __init__(self, turns: int = 2) -> None:
        self.turns = turns
        self.left = 0

    async def reset(self, task: Task) -> list[Message]:
        self.left = self.turns
        return [*task.prompt, Message(f"{self.left} turns left", MessageType.MESSAGE)]

    async def step(self, rollout: Rollout, message: Message) -> Step:
        self.left -= 1
        reward = float(any(c.isdigit() for c in message.content))
        if self.left == 0:
            return Step(reward=reward, stop="environment")
        return Step([Message(f"{self.left} turns left", MessageType.MESSAGE)], reward)


class Broken(Environment):
    async def step(self, rollout: Rollout, message: Message) -> Step:
        raise ZeroDivisionError("no such world")


def raises(rollout: Rollout) -> float:
    raise KeyError("oops")


def raises_sometimes(rollout: Rollout) -> float:
    """For the first rollout of each group; the others get what `digits` gives."""
    if rollout.id.endswith("/0"):
        raise KeyError("oops")
    return digits(rollout)
