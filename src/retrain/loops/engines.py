"""From the section `engine` to the engine that samples from the policy."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from retrain.config.engine import (
    ServerEngineConfig,
    SGLangEngineConfig,
    TorchEngineConfig,
    VLLMEngineConfig,
)
from retrain.config.root import TrainingConfig
from retrain.engines import PolicyEngine
from retrain.engines.server.dialect import Dialect
from retrain.engines.server.engine import ServerEngine
from retrain.engines.server.http import Server
from retrain.engines.server.replica import Launcher, Replica
from retrain.engines.server.sglang import SGLang
from retrain.engines.server.source import PolicySource
from retrain.engines.server.vllm import VLLM
from retrain.engines.server.weights import Weights
from retrain.engines.torch_engine import TorchEngine
from retrain.loops.pipeline import overlapping
from retrain.models import Policy
from retrain.models.forward import architecture_setting, unwrap
from retrain.types import UserError

DIALECTS: dict[type[ServerEngineConfig], type[Dialect]] = {
    VLLMEngineConfig: VLLM,
    SGLangEngineConfig: SGLang,
}

EXACT_TOLERANCE, LOOSE_TOLERANCE = 1e-3, 0.1
"""Nats between two engines on one model, in float32 and in shorter types."""


def build_engine(config: TrainingConfig, policy: Policy) -> PolicyEngine:
    """The engine that samples from the policy. Nothing starts yet.

    Raises:
        UserError: a context limit that the model does not have, or weights that it has not.
    """
    section = config.engine
    limit = section.context_limit
    most = architecture_setting(policy.model, "max_position_embeddings")
    if limit is not None and most is not None and limit > most:
        raise UserError(
            f"engine.context_limit is {limit}; the model's own limit is {most}",
            "Lower it, or leave it out.",
        )
    if isinstance(section, TorchEngineConfig):
        ahead = bool(overlapping(config))
        exact = section.deterministic
        return TorchEngine(
            policy.model,
            tokenizer=policy.tokenizer,
            max_slots=section.max_slots,
            context_limit=limit,
            num_threads=section.num_threads,
            deterministic=False if ahead and exact is None else exact,
            own_weights=ahead,
        )
    if (limit or most) is None:
        raise UserError(
            f"{type(unwrap(policy.model)).__name__} names no context limit",
            "Set engine.context_limit.",
        )
    return _build_server_engine(section, config, policy, int(limit or most))


def _build_server_engine(
    section: ServerEngineConfig, config: TrainingConfig, policy: Policy, context_limit: int
) -> ServerEngine:
    dialect = DIALECTS[type(section)]()
    dtype = next(policy.model.parameters()).dtype
    exact = EXACT_TOLERANCE if dtype == torch.float32 else LOOSE_TOLERANCE
    rows = unwrap(policy.model).get_output_embeddings().weight.shape[0]
    source = _source(section, config, policy)
    return ServerEngine(
        dialect,
        _replicas(section, dialect, dtype, _lora_rank(config) if source.adapter else None),
        Weights(source, min(rows, len(policy.tokenizer)), context_limit),
        context_limit=context_limit,
        tokenizer=policy.tokenizer,
        vocab_size=rows,
        tolerance=exact if section.probe_tolerance is None else section.probe_tolerance,
        most_each=section.max_concurrency,
        load_timeout_s=section.load_timeout_s,
        health_timeout_s=section.health_timeout_s,
        max_restarts=section.max_restarts,
        weights_dir=None if section.weights_dir is None else Path(section.weights_dir).expanduser(),
    )


def check_interpreter(python: str) -> None:
    """
    Raises:
        UserError: there is no such program.
    """
    if shutil.which(Path(python).expanduser()) is None:
        raise UserError(
            f"engine.python: there is no program {python}",
            "Give the interpreter of an environment that has the server; docs/engines.md says how "
            "to make one.",
        )


def _source(section: ServerEngineConfig, config: TrainingConfig, policy: Policy) -> PolicySource:
    source = PolicySource(
        policy,
        adapter=config.model.peft is not None and section.weights != "full",
        untie=section.untie_embeddings,
    )
    if section.untie_embeddings and not source.tied:
        raise UserError(
            "engine.untie_embeddings does nothing here: the embeddings are not tied",
            "Remove it.",
        )
    return source


def _lora_rank(config: TrainingConfig) -> int | None:
    return None if config.model.peft is None else config.model.peft.r


def _replicas(
    section: ServerEngineConfig, dialect: Dialect, dtype: torch.dtype, lora_rank: int | None
) -> list[Replica]:
    if section.python is None:
        return [Replica(server=Server(url)) for url in section.urls]
    python = str(Path(section.python).expanduser())
    return [
        Replica(
            launcher=Launcher(
                dialect,
                python,
                str(dtype).removeprefix("torch."),
                lora_rank=lora_rank,
                args=section.args,
                variables=section.env
                | ({"CUDA_VISIBLE_DEVICES": section.devices[n]} if section.devices else {}),
                start_timeout_s=section.start_timeout_s,
            )
        )
        for n in range(section.replicas)
    ]
