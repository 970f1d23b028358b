"""What the stages of one run share."""

from __future__ import annotations

import heapq
import shutil
from dataclasses import dataclass, field

from torch import nn

from retrain.config.root import TrainingConfig
from retrain.data import TaskSource
from retrain.data.sources import TaskStream
from retrain.engines.torch_engine import TorchEngine
from retrain.learner import Critic, NotFiniteError
from retrain.loops.build import UserModel
from retrain.models import Policy, save_policy
from retrain.rollout import Sampler
from retrain.sandbox import Sandbox
from retrain.tracking.progress import Progress
from retrain.tracking.report import EvaluationResult
from retrain.tracking.run_dir import RunDirectory
from retrain.types import Rollout, UserError

_PROMPTS_RENDERED = 16


@dataclass
class RunContext:
    """The one policy that the stages train in turn, and where its run is written down.

    `run` and `progress` are set once every stage is prepared: before that nothing is written.
    """

    policy: Policy
    engine: TorchEngine
    sandbox: Sandbox
    user_models: dict[str, UserModel] = field(default_factory=dict)
    """Models that play users, loaded once however many stages and modes use them."""
    critic: Critic | None = None
    """Of the last stage of RL, if it had one."""
    version: int = 0
    """Optimizer updates so far, over all stages."""
    results: list[EvaluationResult] = field(default_factory=list)
    last_metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    _run: RunDirectory | None = None
    _progress: Progress | None = None

    def begin(self, run: RunDirectory, progress: Progress) -> None:
        self._run, self._progress = run, progress

    @property
    def run(self) -> RunDirectory:
        assert self._run is not None
        return self._run

    @property
    def progress(self) -> Progress:
        assert self._progress is not None
        return self._progress

    async def weights_changed(self) -> None:
        self.version += 1
        await self.engine.update_weights(self.version)

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self.run.log_metrics(stage, step, metrics)
        self.progress.update(step, metrics)
        self.last_metrics = metrics

    def save_checkpoint(
        self,
        stage: str,
        config: TrainingConfig,
        step: int | None = None,
        *,
        critic: nn.Module | None = None,
    ) -> None:
        """Save the policy as checkpoints/<stage>, or checkpoints/<stage>-<step> on the way."""
        directory = self.run.directory("checkpoints")
        name = stage if step is None else f"{stage}-{step:06d}"
        saved = save_policy(
            self.policy, directory / name, merge_lora=config.checkpoint.merge_lora, critic=critic
        )
        self.checkpoint = str(saved)
        if step is not None:
            self._drop_old(stage, config.checkpoint.keep_last)

    def write_down(self, error: NotFiniteError, stage: str, step: int) -> UserError:
        """Save the batch of a loss that is not finite; the error then says where it is."""
        path = self.run.write_samples(f"not_finite/{stage}-{step:06d}", error.samples)
        return UserError(f"{stage} step {step}: {error.cause}; its batch: {path}", error.next_step)

    def _drop_old(self, stage: str, keep: int) -> None:
        directory = self.run.directory("checkpoints")
        old = sorted(directory.glob(f"{stage}-[0-9][0-9][0-9][0-9][0-9][0-9]"))[:-keep]
        for path in old:
            shutil.rmtree(path)


def check_prompts_fit(tasks: TaskSource, sampler: Sampler, place: str) -> None:
    """Render the longest prompts of a source, as far as it is known, against the context limit.

    Raises:
        UserError: a prompt leaves no room for an answer.
    """
    if isinstance(tasks, TaskStream):
        return
    longest = heapq.nlargest(
        _PROMPTS_RENDERED, tasks.epoch(0), key=lambda t: sum(len(m.content) for m in t.prompt)
    )
    limit = sampler.engine.context_limit
    for task in longest:
        rollout = Rollout(task=task)
        rollout.add_messages(*sampler.environment.opening(task))
        schemas = sampler.environment.tool_schemas
        tokens = len(sampler.renderer.prompt(rollout, schemas).token_ids)
        if tokens >= limit:
            raise UserError(
                f"{place}: the prompt of task {task.id} has {tokens} tokens; "
                f"the context limit is {limit}",
                "Shorten the prompt, or raise engine.context_limit if the model allows it.",
            )
