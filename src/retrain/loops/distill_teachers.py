"""Stages that learn from teachers' log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from operator import length_hint
from pathlib import Path

from retrain.config.root import TrainingConfig
from retrain.config.teachers import LogitsDistillation, ModelTeacher, OnPolicyDistillation
from retrain.learner import LogitsObjective
from retrain.loops.context import RunContext
from retrain.loops.guidance import Guidance
from retrain.loops.rl import RLStage
from retrain.loops.sft import SFTStage, read_traces, steps_of
from retrain.loops.stored import FILE, StoredTops
from retrain.loops.teachers import build_guides
from retrain.loops.validation import hold_out
from retrain.loops.world import build_renderer
from retrain.models import Policy
from retrain.models.forward import unwrap
from retrain.models.load import check_origin

_OF_THE_REQUEST = {"name", "batch_tokens", "api_key_env", "timeout_s", "retries", "max_concurrency"}
"""Keys of a teacher that do not change what it says."""


def prepare_teachers(name: str, config: TrainingConfig, context: RunContext) -> SFTStage | RLStage:
    """RL with teachers beside the rewards, or SFT with their distributions as targets.

    Raises:
        UserError: bad data, a teacher that cannot be had, or one that does not fit the student.
    """
    if isinstance(config.distillation, OnPolicyDistillation):
        return _on_policy(name, config, config.distillation, context)
    assert isinstance(config.distillation, LogitsDistillation)
    return _logits(name, config, config.distillation, context)


def _on_policy(
    name: str, config: TrainingConfig, settings: OnPolicyDistillation, context: RunContext
) -> RLStage:
    stage = RLStage.prepare(name, config, context)
    guides = build_guides(
        settings.teachers,
        context.policy,
        stage.sampler.renderer,
        config,
        environment=stage.sampler.environment,
        same_tokenizer=settings.estimator == "top_k",
    )
    guides.check_tasks(stage.tasks.known())
    guidance = Guidance(
        guides,
        coefficient=settings.coefficient,
        task_reward=settings.task_reward,
        top_k=settings.top_k,
        vocab_size=_vocab_size(context.policy),
    )
    return replace(stage, guidance=guidance)


def _logits(
    name: str, config: TrainingConfig, settings: LogitsDistillation, context: RunContext
) -> SFTStage:
    guides = build_guides(
        settings.teachers,
        context.policy,
        build_renderer(config, context.policy),
        config,
        same_tokenizer=True,
    )
    said = [
        teacher.model_dump(mode="json", exclude=_OF_THE_REQUEST) for teacher in settings.teachers
    ]
    stored = StoredTops(
        guides,
        identity=json.dumps(said, sort_keys=True),
        k=settings.top_k,
        temperature=settings.temperature,
        vocab_size=_vocab_size(context.policy),
        keep_untaught=settings.cross_entropy > 0,
        path=None if settings.cache is None else Path(settings.cache).expanduser(),
    )

    def place(context: RunContext) -> None:
        stored.path = stored.path or context.run.path / FILE

    stage = SFTStage.of(
        name,
        config,
        context,
        settings,
        read_traces(config, settings),
        objective=LogitsObjective(settings.cross_entropy),
        attach=stored.attach,
    )
    return replace(stage, announce=place, let_go=guides.close)


def describe_teachers(config: TrainingConfig) -> Iterator[str]:
    """What `retrain check` says of teachers, and of traces where there are some; none is loaded.

    Raises:
        UserError: a model that is not there, or bad traces.
    """
    settings = config.distillation
    assert isinstance(settings, OnPolicyDistillation | LogitsDistillation)
    for index, teacher in enumerate(settings.teachers):
        local = isinstance(teacher, ModelTeacher)
        where = check_origin(teacher.model) if isinstance(teacher, ModelTeacher) else teacher.url
        when = "".join(f", for {column}: {value}" for column, value in teacher.when.items())
        yield (
            f"teacher {teacher.name or f'teacher{index}'}: "
            f"{'in this process' if local else teacher.type}, {where}{when}"
        )
    if isinstance(settings, OnPolicyDistillation):
        how = "of sampled tokens" if settings.top_k is None else f"over their top {settings.top_k}"
        yield f"reverse KL {how}, times {settings.coefficient:g}"
        rewards = f"times {settings.task_reward:g}" if settings.task_reward else "do not train"
        yield f"advantages of rewards: {rewards}"
        return
    traces, held_out = hold_out(settings, read_traces(config, settings))
    hint = length_hint(traces, -1)
    size = None if hint < 0 else hint
    yield f"traces: {'streamed' if size is None else size} from {settings.dataset}"
    if held_out:
        yield f"held out: {len(held_out)}, from {settings.validation or 'the same'}"
    yield (
        f"forward KL over the teachers' top {settings.top_k}, temperature {settings.temperature:g}"
    )
    if settings.cross_entropy:
        yield f"cross-entropy: {settings.cross_entropy:.0%} of the loss"
    yield f"{steps_of(settings, size)} steps of {settings.batch_size}, {settings.optimizer}"


def _vocab_size(policy: Policy) -> int:
    """Tokens that the policy gives a logit."""
    size: int = unwrap(policy.model).get_output_embeddings().weight.shape[0]
    return size
