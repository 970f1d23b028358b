"""Stages of kind `distill`: which of its kinds a config asks for."""

from __future__ import annotations

from collections.abc import Iterator

from retrain.config.root import TrainingConfig
from retrain.config.traces import TracesDistillation
from retrain.loops.context import RunContext
from retrain.loops.distill_teachers import describe_teachers, prepare_teachers
from retrain.loops.distill_traces import describe_traces, prepare_traces
from retrain.loops.rl import RLStage
from retrain.loops.sft import SFTStage


def prepare_distillation(
    name: str, config: TrainingConfig, context: RunContext
) -> SFTStage | RLStage:
    """Read and check everything that the stage needs.

    Raises:
        UserError: bad data, a teacher that cannot be had, or one that does not fit the student.
    """
    if isinstance(config.distillation, TracesDistillation):
        return prepare_traces(name, config, context)
    return prepare_teachers(name, config, context)


def describe_distillation(config: TrainingConfig) -> Iterator[str]:
    """What `retrain check` says of such a stage, a line each.

    Raises:
        UserError: as far as nothing is loaded, what the stage would stop at.
    """
    if isinstance(config.distillation, TracesDistillation):
        return describe_traces(config)
    return describe_teachers(config)
