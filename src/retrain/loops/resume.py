"""Which run to go on with, and whether a config may go on with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from retrain.config.load import load_config
from retrain.config.root import StageKind, TrainingConfig
from retrain.loops.checkpoint import Saved, read_saved
from retrain.loops.repeatable import circumstances
from retrain.tracking.checkpoints import Checkpoints
from retrain.tracking.run_dir import CONFIG_FILE, RunDirectory, newest_run
from retrain.types import UserError

FREE = (
    r"output_dir|logging_level",
    r"tracking\..*",
    r"(stages\.\d+\.)?monitors\..*",
    r"(stages\.\d+\.)?checkpoint\.(every_steps|keep_last|keep_best.*)",
)
"""Keys that may change when a run is resumed: nothing that trains depends on them."""

AT_A_COST = (
    r"engine\..*",
    r"sandbox\.max_concurrency",
    r"(stages\.\d+\.)?rollout\..*",
    r"(stages\.\d+\.)?environment\.tool_(timeout_s|retries)",
    r"(.*\.)?(micro_batch_tokens|share_prefixes)",
    r"(stages\.\d+\.)?(sft|distillation|algorithm\.hyperparameters)\.steps",
    r"model\.(device|gradient_checkpointing|attn_implementation)",
)
"""Keys that may change too; the run then goes on, but not to the bits that it would have had."""

ABSENT = "(nothing)"


@dataclass(frozen=True)
class Change:
    """A key that has another value than in the run."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} in the run, {self.now!r} now"


def find_run(config: TrainingConfig, which: str) -> RunDirectory | None:
    """The run to go on with: `latest` the newest of this experiment, `auto` that one if it is not
    complete, else none; anything else is the path of a run directory.

    Raises:
        UserError: there is none, or it is complete.
    """
    if which not in ("latest", "auto"):
        found: Path | None = Path(which)
        if not (Path(which) / CONFIG_FILE).is_file():
            raise UserError(
                f"--resume {which}: there is no run directory, with a {CONFIG_FILE}, at that path",
                "Give the path of one, or `latest`, or `auto`.",
            )
    else:
        found = newest_run(config.output_dir, config.experiment_name)
    if found is None:
        if which == "auto":
            return None
        raise UserError(
            f"there is no run of {config.experiment_name} in {config.output_dir} to resume",
            "Start one without --resume, or name its directory: --resume PATH.",
        )
    run = RunDirectory(found)
    if run.about().get("status") == "completed":
        if which == "auto":
            return None
        raise UserError(
            f"{found} is complete: there is nothing to resume",
            "Start a new run; name the checkpoint as model.name_or_path to train it further.",
        )
    return run


def check_config(config: TrainingConfig, run: RunDirectory) -> list[Change]:
    """Compare a config with that of the run, key by key; the changes that are allowed.

    Raises:
        UserError: names every key that may not change, with both values.
    """
    before = load_config(run.path / CONFIG_FILE)
    changes = list(differences(before.model_dump(mode="json"), config.model_dump(mode="json")))
    refused = [change for change in changes if not _is_one(change.key, FREE + AT_A_COST)]
    if refused:
        lines = "\n".join(f"  {change}" for change in refused)
        raise UserError(
            f"{run.path} was begun with another config:\n{lines}",
            "Give the config, and the --set, of the run; or start a new run without --resume.",
        )
    return changes


def differences(before: Any, now: Any, key: str = "") -> Iterator[Change]:
    """The leaves in which two nested structures differ, in the order of the first."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in [*before, *(name for name in now if name not in before)]:
            below = f"{key}.{name}" if key else str(name)
            yield from differences(before.get(name, ABSENT), now.get(name, ABSENT), below)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{key}.{number}")
    elif before != now:
        yield Change(key, before, now)


def _is_one(key: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)


@dataclass(frozen=True)
class Resumption:
    """A run that is to be gone on with."""

    saved: Saved | None
    """Its newest checkpoint that is whole; None begins again from the start."""
    damaged: Sequence[str]
    """What is wrong with newer ones."""
    changes: Sequence[Change]
    begun_with: Mapping[str, object]
    """What run.json says of the circumstances that it began in."""

    def clear_away(self, run: RunDirectory) -> None:
        """Take back what the run wrote after the checkpoint: it will be written again."""
        run.cut_back({} if self.saved is None else self.saved.state.sizes)

    def say(self, deterministic: bool | None) -> Iterator[str]:
        """Where it goes on, and all that a user should know of it, a line each."""
        yield from (f"damaged, so not used: {problem}" for problem in self.damaged)
        if self.saved is None:
            yield "resuming: there is no checkpoint, so from the start"
        else:
            state = self.saved.state
            where = "after its end" if state.finished else f"after step {state.step}"
            yield f"resuming {state.stage} {where}, from {self.saved.path}"
        yield from (f"changed: {change}" for change in self.changes)
        reasons = list(self._not_exact(deterministic))
        if reasons:
            yield f"not bit for bit what it would have been: {'; '.join(reasons)}"

    def _not_exact(self, deterministic: bool | None) -> Iterator[str]:
        yield from (change.key for change in self.changes if _is_one(change.key, AT_A_COST))
        if deterministic is False:
            yield "the engine is not deterministic"
        for name, now in circumstances().items():
            before = self.begun_with.get(name, now)
            if before != now:
                yield f"{name} was {before}, is {now}"


def read_resumption(
    config: TrainingConfig, run: RunDirectory, only: StageKind | None
) -> Resumption:
    """What there is to go on from, once the config is known to fit.

    Raises:
        UserError: the config, or the kind of stages, is not that of the run.
    """
    about = run.about()
    if about.get("only", only) != only:
        raise UserError(
            f"{run.path} was begun with the stages {about['only'] or 'of every kind'} only",
            "Resume it with the same command.",
        )
    changes = check_config(config, run)
    checkpoints = Checkpoints(run.path / "checkpoints")
    checkpoints.sweep()
    checkpoint, damaged = checkpoints.newest_good()
    if checkpoint is None and damaged:
        raise UserError(
            f"no checkpoint of {run.path} is whole: {'; '.join(damaged)}",
            "Put one back as it was, or start a new run without --resume; model.name_or_path may "
            "name a checkpoint whose weights are whole.",
        )
    saved = None if checkpoint is None else read_saved(checkpoint)
    return Resumption(saved, damaged, changes, about)


S = TypeVar("S")


def stages_left(
    stages: Sequence[tuple[str, StageKind, S]], going_on: Resumption | None
) -> Sequence[tuple[str, StageKind, S]]:
    """The stages that are not done."""
    if going_on is None or going_on.saved is None:
        return stages
    state = going_on.saved.state
    number = [name for name, _, _ in stages].index(state.stage)
    return stages[number + state.finished :]
