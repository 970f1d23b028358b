"""What the tests of environments of other packages share: a trained run, and the ledger held
against what the engine sampled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import retrain
from retrain.config import load_config
from retrain.envs import Environment
from retrain.loops.adapters import build_adapter, describe_adapter
from retrain.loops.run import RunResult
from retrain.rendering import Renderer
from retrain.types import Rollout, Source
from runs import RecordingEngine, hyperparameters, rl_config, rollouts_of, sft_section


@dataclass(frozen=True)
class Adapted:
    result: RunResult
    engine: RecordingEngine
    rollouts: list[Rollout]


def train(output_dir: Path, *, sft: str, environment: dict[str, Any], **sections: Any) -> Adapted:
    """SFT on short answers, so that turns end by themselves, then two steps of GRPO in the
    environment, whose own rewards are all there is."""
    engines: list[RecordingEngine] = []

    def build(config: Any, policy: Any) -> RecordingEngine:
        engines.append(RecordingEngine(policy.model, tokenizer=policy.tokenizer, max_slots=8))
        return engines[-1]

    config = rl_config(
        output_dir,
        sft=sft_section(dataset=sft, steps=40),
        environment=environment,
        algorithm={"hyperparameters": hyperparameters(group_size=4, max_new_tokens=12)},
        reward_setup={},
        rollout={"retries": 0},
        stages=[{"kind": "sft"}, {"kind": "rl"}],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrain.loops.run.build_engine", build)
        result = retrain.run_sync(config | sections)
    rollouts = [r for step in rollouts_of(result.path).values() for r in step]
    return Adapted(result, engines[0], rollouts)


def built(renderer: Renderer, **environment: Any) -> tuple[Environment, str]:
    """The environment of a config's section, and what `retrain check` says of it."""
    config = load_config(rl_config(Path("runs"), environment=environment, reward_setup={}))
    section: Any = config.environment
    return build_adapter(section, renderer), describe_adapter(section)


def check_exact(adapted: Adapted) -> None:
    """Every sampled token of the ledger is one that the engine gave, at its place and with its
    log-probability, after the very prompt that the engine was given; and every reward is the
    environment's."""
    assert len(adapted.rollouts) == 2 * 2 * 4
    for rollout in adapted.rollouts:
        assert rollout.error is None
        check_ledger(rollout, adapted.engine)
        check_provenance(rollout)


def check_ledger(rollout: Rollout, engine: RecordingEngine) -> None:
    made = list(engine.log[rollout.id])
    for index, segment in enumerate(rollout.segments):
        full = list(rollout.full_token_ids(index))
        for span in segment.turns:
            start = segment.prefix_len + span.start
            end = segment.prefix_len + span.end
            found = [
                (request, completion)
                for request, completion in made
                if request.prompt_ids == full[:start]
                and list(completion.token_ids) == full[start:end]
            ]
            assert found, f"{rollout.id}: no request for message {span.message}"
            assert segment.logprobs[span.start : span.end] == found[0][1].logprobs
            made.remove(found[0])
    assert made == [], "the engine sampled what the ledger does not hold"
    sampled = sum(s == Source.SAMPLED for segment in rollout.segments for s in segment.source)
    assert sampled == sum(len(c.token_ids) for _, c in engine.log[rollout.id])


def check_provenance(rollout: Rollout) -> None:
    assert len(rollout.env_rewards) == len(rollout.model_messages)
    assert rollout.reward == pytest.approx(sum(rollout.env_rewards))
    expected = [(turn, value) for turn, value in enumerate(rollout.env_rewards)]
    if any(rollout.env_rewards):
        assert [(p.turn, p.value) for p in rollout.reward_parts] == expected
        assert {(p.name, p.kind) for p in rollout.reward_parts} == {("environment", "environment")}
    else:
        assert rollout.reward_parts == []


def weights_changed(adapted: Adapted) -> bool:
    """Whether the last step of GRPO moved the policy."""
    from runs import metrics_of

    return any(row.get("grad_norm", 0.0) > 0 for row in metrics_of(adapted.result.path))
