"""Keys that no stage of a pipeline would read, which one stage or section cannot know by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from retrain.config.algorithm import CLIPPED_LOSSES, TOKEN_ADVANTAGES
from retrain.config.environment import (
    DialogueConfig,
    PythonEnvironmentConfig,
    QAConfig,
    ToolEnvironmentConfig,
)
from retrain.config.monitors import MonitorsConfig
from retrain.config.root import (
    StageKind,
    TrainingConfig,
    evaluates,
    generates,
    rewards_train,
    rolls_out,
)
from retrain.config.tracking import TrackingConfig

_OF_ROLLOUTS = ("rollouts_logged", "rollouts_logged_every")

Stages = Sequence[tuple[str, StageKind, TrainingConfig]]


def idle_keys(config: TrainingConfig, stages: Stages) -> Iterator[tuple[str, str]]:
    """(what does nothing in any of the stages, what to do about it).

    Args:
        stages: the whole pipeline, resolved.
    """
    kinds = {_acts_as(kind, stage) for _, kind, stage in stages}
    if kinds == {"eval"} and any(evaluates(stage) for *_, stage in stages):
        yield (
            "evaluation.every_steps does nothing: it evaluates during stages that train, and "
            "there is none",
            "Remove it; a stage of kind eval evaluates where it stands.",
        )
    transcripts = config.tracking.transcripts
    if config.tracking.changed("transcripts") and transcripts and "eval" not in kinds:
        yield (
            f"tracking.transcripts {transcripts} does nothing: no stage of kind eval writes any",
            "Remove it, or add section evaluation (and a stage of kind eval where stages are "
            "listed).",
        )
    acts = any(generates(kind, stage) for _, kind, stage in stages)
    yield from _idle_tracking(config.tracking, kinds, acts=acts)
    yield from _unrated_checkpoints(stages)
    yield from _idle_monitors(stages)
    last_only = [
        stage
        for _, kind, stage in stages
        if rolls_out(kind, stage) and stage.algorithm.hyperparameters.train_turns == "last"
    ]
    if last_only and all(map(_has_one_turn, last_only)):
        yield (
            "algorithm.hyperparameters.train_turns: last does nothing: rollouts have one turn, "
            "which trains either way",
            "Remove it, or let rollouts have more (environment.tools and max_steps, or max_turns).",
        )


def _acts_as(kind: StageKind, config: TrainingConfig) -> StageKind:
    """What a stage of distillation is like."""
    if kind != "distill":
        return kind
    return "rl" if rolls_out(kind, config) else "sft"


def _idle_tracking(
    section: TrackingConfig, kinds: set[StageKind], *, acts: bool
) -> Iterator[tuple[str, str]]:
    """Of what trackers are sent; `acts`: some stage makes rollouts."""
    if not acts and (idle := section.changed(*_OF_ROLLOUTS)):
        yield (
            f"tracking.{' and tracking.'.join(idle)}: no stage makes rollouts",
            "Remove it, set evaluation.every_steps, or add a stage of kind rl or eval.",
        )
    elif "rl" not in kinds and section.changed("rollouts_logged_every"):
        yield (
            "tracking.rollouts_logged_every does nothing: it counts steps of RL, and no stage is "
            "of kind rl",
            "Remove it, or add a stage of kind rl.",
        )
    if kinds == {"eval"} and section.artifacts:
        yield (
            "tracking.artifacts does nothing: no stage trains, so there is no checkpoint",
            "Remove it, or add a stage of kind sft or rl.",
        )


def _unrated_checkpoints(stages: Stages) -> Iterator[tuple[str, str]]:
    """Those that are to be kept by an evaluation that is never made during a stage. Beside a stage
    that learns from rollouts one that learns from traces may go without."""
    any_rolls_out = any(rolls_out(kind, stage) for _, kind, stage in stages)
    for name, kind, stage in stages:
        best, evaluation = stage.checkpoint.keep_best, stage.evaluation
        if kind == "eval" or (any_rolls_out and not rolls_out(kind, stage)):
            continue
        if best is None or not best.metric.startswith("eval/"):
            continue
        during = evaluation is not None and evaluation.every_steps is not None
        modes = [mode.name for mode in evaluation.modes] if evaluation and during else []
        if not any(best.metric.startswith(f"eval/{mode}/") for mode in modes):
            yield (
                f"checkpoint.keep_best.metric {best.metric}: no evaluation during stage {name} "
                "gives it",
                f"Modes that are evaluated then: {', '.join(modes)}."
                if modes
                else "Set evaluation.every_steps.",
            )


def _idle_monitors(stages: Stages) -> Iterator[tuple[str, str]]:
    for name in MonitorsConfig.model_fields:
        asking = [
            (kind, stage)
            for _, kind, stage in stages
            if stage.monitors.changed(name) and getattr(stage.monitors, name) is not None
        ]
        needed, acts = _NEEDS.get(name, ("a stage of kind rl", _always))
        if asking and not any(
            rolls_out(kind, stage)
            and acts(stage)
            and (needed != _GROUPS or rewards_train(kind, stage))
            for kind, stage in asking
        ):
            yield f"monitors.{name} does nothing: it needs {needed}", "Remove it, or set that."


def _always(config: TrainingConfig) -> bool:
    return True


def _has_tools(config: TrainingConfig) -> bool:
    """An environment of the user's own may count calls, too."""
    environment = config.environment
    if isinstance(environment, ToolEnvironmentConfig):
        return bool(environment.tools)
    return isinstance(environment, PythonEnvironmentConfig)


def _has_one_turn(config: TrainingConfig) -> bool:
    environment = config.environment
    if isinstance(environment, ToolEnvironmentConfig):
        return not environment.tools or environment.max_steps == 1
    if isinstance(environment, DialogueConfig):
        return environment.max_turns == 1
    return isinstance(environment, QAConfig)


def _has_ratio(config: TrainingConfig) -> bool:
    return config.algorithm.hyperparameters.updates > 1


def _clips(config: TrainingConfig) -> bool:
    return _has_ratio(config) and config.algorithm.hyperparameters.loss in CLIPPED_LOSSES


def _on_policy(config: TrainingConfig) -> bool:
    return config.algorithm.hyperparameters.max_staleness == 0


def _compares_groups(config: TrainingConfig) -> bool:
    return config.algorithm.hyperparameters.advantage not in TOKEN_ADVANTAGES


def _has_reference(config: TrainingConfig) -> bool:
    return config.algorithm.hyperparameters.kl is not None


_UPDATES = "several updates a step (algorithm.hyperparameters.epochs or mini_batches above 1)"
_TOOLS = "tools (environment.tools)"
_GROUPS = "an algorithm.hyperparameters.advantage that compares groups, and rewards that train"
_NEEDS: dict[str, tuple[str, Callable[[TrainingConfig], bool]]] = {
    "ratio": (_UPDATES, _has_ratio),
    "approx_kl": (_UPDATES, _has_ratio),
    "clip_fraction": (f"{_UPDATES} and a loss that clips", _clips),
    "logprob_gap": ("algorithm.hyperparameters.max_staleness: 0", _on_policy),
    "kl": ("algorithm.hyperparameters.kl", _has_reference),
    "tool_calls": (_TOOLS, _has_tools),
    "tool_failures": (_TOOLS, _has_tools),
    "invalid_calls": (_TOOLS, _has_tools),
    "zero_variance": (_GROUPS, _compares_groups),
    "flat_reward_steps": (_GROUPS, _compares_groups),
}
"""What a monitor needs in order to measure anything, where that is more than a stage of RL."""
