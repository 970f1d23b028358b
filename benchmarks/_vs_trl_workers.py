"""One process of `vs_trl.py`: makes the model, or trains it with one system on one workload.

python benchmarks/_vs_trl_workers.py JOB.json RESULT.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPTS, GROUP = 16, 8
MAX_COMPLETION = 80
SFT = (("short", 160, 5e-3), ("a", 80, 2e-3), ("b", 30, 2e-3))
"""Name, steps and learning rate of each part."""
TASK_MODULE = Path(__file__).with_name("_vs_trl_task.py")


@dataclass(frozen=True)
class Job:
    """What to do: `make`, `retrain` or `trl`."""

    kind: str
    workload: str
    model: str
    """Directory that is loaded; that of all models for `make`."""
    directory: str
    """For whatever a run leaves behind."""
    steps: int
    threads: int
    seed: int
    learning_rate: float
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)
    """Over the system's own: dotted config keys of retrain, arguments of TRL's GRPOConfig."""


@dataclass(frozen=True)
class Step:
    generate_s: float
    train_s: float
    reward: float


@dataclass(frozen=True)
class Result:
    steps: list[Step]
    cpu_s: float
    """Of all threads, a step; loading and the last checkpoint are part of it."""
    peak_mb: float
    """Highest resident memory of this process."""
    loaded_mb: float
    """What it was after imports and loading, before the first step."""
    prompt_tokens: float
    """Mean over the first step's prompts."""
    prompts: str
    """Digest of the token ids of those prompts: equal for both systems."""


def memory_mb(key: str) -> float:
    """`VmHWM` or `VmRSS` of this process. Unlike `ru_maxrss`, they start anew at exec."""
    status = Path("/proc/self/status").read_text()
    line = next(row for row in status.splitlines() if row.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def task_module() -> Any:
    sys.path.insert(0, str(TASK_MODULE.parent))
    import _vs_trl_task

    return _vs_trl_task


def rows(job: Job) -> list[dict[str, str]]:
    found: list[dict[str, str]] = task_module().tasks(PROMPTS * job.steps, job.seed)
    return found


# The model -------------------------------------------------------------------------------------


def make(job: Job) -> None:
    """The untrained model and its tokenizer, then SFT in three parts: on the conversations alone,
    then after the description of one tool, then after that of five. Each part's model is kept."""
    import retrain

    start = Path(job.model) / "untrained"
    _save_untrained(start, job.seed)
    for name, steps, learning_rate in SFT:
        common = _common(dataclasses.replace(job, workload=name), str(start))
        short = name == "short"
        config = {
            **common,
            "environment": {"type": "qa"} if short else common["environment"],
            "experiment_name": f"sft-{name}",
            "sft": {
                "dataset": f"{TASK_MODULE}:traces",
                "params": {"n": 32 * steps, "seed": len(name), "as_text": short},
                "steps": steps,
                "batch_size": 16 if name == "b" else 32,
                "learning_rate": learning_rate,
                "optimizer": "muon",
                "schedule": "cosine",
                "warmup_steps": 10,
            },
            "stages": [{"kind": "sft"}],
        }
        result = retrain.run_sync(config)
        assert result.checkpoint is not None
        start = result.checkpoint.rename(Path(job.model) / name)


def _save_untrained(directory: Path, seed: int) -> None:
    import torch
    from transformers import AddedToken, Qwen3Config, Qwen3ForCausalLM

    from retrain.models.tokenizer import train_tokenizer

    task = task_module()
    size = 1024 - len(task.CALL_TOKENS)
    tokenizer = train_tokenizer(
        task.corpus(), vocab_size=size, special_tokens=list(task.SPECIAL_TOKENS)
    )
    tokenizer.add_tokens([AddedToken(token, special=False) for token in task.CALL_TOKENS])
    tokenizer.eos_token = task.SPECIAL_TOKENS[1]
    tokenizer.chat_template = task.CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# retrain ---------------------------------------------------------------------------------------


def _common(job: Job, model: str) -> dict[str, Any]:
    tools = [f"{TASK_MODULE}:{name}" for name in task_module().TOOLS.get(job.workload, ())]
    return {
        "seed": job.seed,
        "output_dir": job.directory,
        "model": {"name_or_path": model, "torch_dtype": job.dtype},
        "environment": {
            "type": "smolagent",
            "tools": tools,
            "tool_format": {"type": "native"},
            "max_steps": 2,
        },
        "engine": {"num_threads": 1, "deterministic": False},
        "tracking": {"rollouts": False, "plots": False, "progress": "off"},
    }


def run_retrain(job: Job) -> Result:
    import retrain

    config = {
        **_common(job, job.model),
        "experiment_name": "retrain",
        "prompt_source": {
            "type": "python",
            "function": f"{TASK_MODULE}:tasks",
            "params": {"n": PROMPTS * job.steps, "seed": job.seed},
            "shuffle": False,
        },
        "reward_setup": {
            "rollout_reward_configs": {"right": {"function": f"{TASK_MODULE}:reward_of_rollout"}}
        },
        "algorithm": {
            "name": "grpo",
            "hyperparameters": {
                "steps": job.steps,
                "prompts_per_step": PROMPTS,
                "group_size": GROUP,
                "max_new_tokens": MAX_COMPLETION,
                "learning_rate": job.learning_rate,
                "betas": [0.9, 0.999],
                "aggregation": "token_mean",
            },
        },
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in job.settings.items()]
    loaded, started = memory_mb("VmRSS"), time.process_time()
    result = retrain.run_sync(config, overrides=overrides)
    lines = (result.path / "metrics.jsonl").read_text().splitlines()
    steps = [
        Step(row["seconds/generate"], row["seconds/train"], row["reward/mean"])
        for row in map(json.loads, lines)
        if "seconds/generate" in row
    ]
    cpu_s = (time.process_time() - started) / job.steps
    return _result(job, steps, cpu_s, loaded, _retrain_prompts(config))


def _retrain_prompts(config: dict[str, Any]) -> list[list[int]]:
    """What the renderer gives the engine, asked of the library's own parts."""
    from retrain.config.load import load_config
    from retrain.loops.agents import make_tools
    from retrain.loops.world import build_renderer
    from retrain.models import load_policy
    from retrain.tools import tool_schema
    from retrain.types import Message, MessageType, Rollout

    checked = load_config(config)
    renderer = build_renderer(checked, load_policy(checked.model))
    schemas = [tool_schema(tool) for tool in make_tools(checked.environment.tool_list(), None)[0]]  # type: ignore[arg-type]
    prompts = []
    for row in task_module().tasks(PROMPTS, checked.seed):
        rollout = Rollout()
        rollout.add_messages(Message(row["prompt"], MessageType.MESSAGE))
        prompts.append(renderer.prompt(rollout, schemas).token_ids)
    return prompts


# TRL -------------------------------------------------------------------------------------------


def run_trl(job: Job) -> Result:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]
    from trl.chat_template_utils import qwen3_template

    steps: list[Step] = []

    class TimedTrainer(GRPOTrainer):
        generate_s = 0.0
        first_prompts: list[list[int]] | None = None

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            started = time.perf_counter()
            scored = super()._generate_and_score_completions(inputs)
            self.generate_s += time.perf_counter() - started
            return scored

        def _tokenize_prompts(self, prompts: Any) -> Any:
            tokenized = super()._tokenize_prompts(prompts)
            if self.first_prompts is None:
                self.first_prompts = tokenized[0][::GROUP]
            return tokenized

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            trainer.generate_s = 0.0
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            total = time.perf_counter() - self.started
            reward = trainer._metrics["train"]["reward"][-1]
            steps.append(Step(trainer.generate_s, total - trainer.generate_s, reward))

    task = task_module()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.response_template = qwen3_template
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    arguments = {
        "output_dir": job.directory,
        "max_steps": job.steps,
        "seed": job.seed,
        "num_generations": GROUP,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": PROMPTS * GROUP // 16,
        "max_completion_length": MAX_COMPLETION,
        "max_tool_calling_iterations": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "loss_type": "dapo",
        "shuffle_dataset": False,
        "bf16": job.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **job.settings,
    }
    problems = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
        for row in rows(job)
    ]
    trainer = TimedTrainer(
        model=model,
        args=GRPOConfig(**arguments),
        reward_funcs=task.reward_of_completions,
        train_dataset=datasets.Dataset.from_list(problems),
        processing_class=tokenizer,
        tools=[getattr(task, name) for name in task.TOOLS[job.workload]],
        callbacks=[Clock()],
    )
    loaded, cpu_started = memory_mb("VmRSS"), time.process_time()
    trainer.train()
    cpu_s = (time.process_time() - cpu_started) / job.steps
    assert trainer.first_prompts is not None
    return _result(job, steps, cpu_s, loaded, trainer.first_prompts)


def _result(
    job: Job, steps: list[Step], cpu_s: float, loaded: float, prompts: Sequence[list[int]]
) -> Result:
    assert len(steps) == job.steps
    ids = [[int(token) for token in prompt] for prompt in prompts]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]
    mean = sum(map(len, ids)) / len(ids)
    return Result(steps, cpu_s, memory_mb("VmHWM"), loaded, mean, digest)


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    import torch

    torch.set_num_threads(job.threads)
    if job.kind == "make":
        make(job)
        return
    result = {"retrain": run_retrain, "trl": run_trl}[job.kind](job)
    Path(sys.argv[2]).write_text(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
