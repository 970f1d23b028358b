"""What the stages of one run share."""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from retrain.config.root import TrainingConfig
from retrain.data import TaskSource
from retrain.engines import PolicyEngine
from retrain.learner import Critic, NotFiniteError
from retrain.loops.checkpoint import RunState, Saved, Training, backbone, generators, write_state
from retrain.loops.interrupt import Interrupted, Stop
from retrain.loops.players import LoadedModel
from retrain.models import Policy, save_policy
from retrain.rollout import Sampler
from retrain.sandbox import Sandbox
from retrain.tracking.checkpoints import Checkpoints
from retrain.tracking.progress import Progress
from retrain.tracking.report import EvaluationResult
from retrain.tracking.run_dir import RunDirectory
from retrain.tracking.trackers import Trackers
from retrain.types import Rollout, UserError

logger = logging.getLogger(__name__)

_PROMPTS_RENDERED = 16


@dataclass
class RunContext:
    """The one policy that the stages train in turn, and where its run is written down.

    `run`, `progress` and `stop` are set once every stage is prepared: before that nothing is
    written.
    """

    policy: Policy
    engine: PolicyEngine
    sandbox: Sandbox
    trackers: Trackers = field(default_factory=Trackers)
    user_models: dict[str, LoadedModel] = field(default_factory=dict)
    """Models that play users and agents, loaded once however many stages and modes use them."""
    critic: Critic | None = None
    """Of the present stage of RL, or the last one, if it had one."""
    version: int = 0
    """Optimizer updates so far, over all stages."""
    results: list[EvaluationResult] = field(default_factory=list)
    last_metrics: dict[str, float] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)
    """Each metric's latest value, of training and of evaluation."""
    checkpoint: str | None = None
    resumed: Saved | None = None
    """What the run goes on from, until its stage has taken it."""
    _saved_at: tuple[str, int, bool] | None = None
    _run: RunDirectory | None = None
    _progress: Progress | None = None
    _stop: Stop | None = None

    def begin(self, run: RunDirectory, progress: Progress, stop: Stop) -> None:
        self._run, self._progress, self._stop = run, progress, stop
        self.latest = run.latest_metrics()
        if self.resumed is not None:
            rows = run.metrics_of(self.resumed.state.stage)
            self.last_metrics = rows[-1] if rows else {}
            self.resumed.state.put_generators()
            if self.resumed.state.finished:
                self.resumed = None

    @property
    def run(self) -> RunDirectory:
        assert self._run is not None
        return self._run

    @property
    def progress(self) -> Progress:
        assert self._progress is not None
        return self._progress

    @property
    def stop(self) -> Stop:
        assert self._stop is not None
        return self._stop

    def go_on_from(self, saved: Saved) -> None:
        """Put the policy, and all that stages share, to where a checkpoint left them."""
        saved.put_policy(self.policy)
        self.critic = saved.critic(self.policy)
        self.version = saved.state.version
        self._saved_at = _place(saved.state)
        self.results = [EvaluationResult.from_dict(result) for result in saved.state.results]
        self.checkpoint = str(saved.path)
        self.resumed = saved

    def take_resumed(self, stage: str) -> Saved | None:
        """What a training stage goes on from, if it was under way; the first one to ask."""
        saved, self.resumed = self.resumed, None
        return saved if saved and saved.state.stage == stage else None

    def weights_changed(self) -> None:
        self.version += 1

    async def bring_weights(self) -> None:
        """Have the engine sample from the policy as it is now."""
        if self.engine.version != self.version:
            await self.engine.update_weights(self.version)

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Write a training step's metrics down, and show them."""
        self.note(stage, step, metrics)
        self.progress.update(step, metrics)
        self.last_metrics = metrics

    def note(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Write metrics down."""
        self.run.log_metrics(stage, step, metrics)
        self.trackers.log_metrics(stage, step, metrics)
        self.latest |= {name: value for name, value in metrics.items() if math.isfinite(value)}

    def stand(self, state: RunState) -> RunState:
        """A stage's state with what the context knows."""
        return replace(
            state,
            version=self.version,
            critic=backbone(self.critic),
            results=[asdict(result) for result in self.results],
            sizes=self.run.sizes(),
            generators=generators(),
        )

    def save_checkpoint(
        self, config: TrainingConfig, state: RunState, training: Training | None
    ) -> None:
        """Save the policy and the run's state as checkpoints/<stage>, or on the way as
        checkpoints/<stage>-<step>; then drop those that are not to be kept.

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints are as they were.
        """
        settings = config.checkpoint
        best = settings.keep_best
        value = None if best is None else self.latest.get(best.metric)

        def fill(directory: Path) -> None:
            save_policy(self.policy, directory, merge_lora=settings.merge_lora, critic=self.critic)
            write_state(directory, state, self.policy, training)
            self.run.sync_grown()

        checkpoints = Checkpoints(self.run.directory("checkpoints"))
        name = state.stage if state.finished else f"{state.stage}-{state.step:06d}"
        about = {"stage": state.stage, "step": state.step, "finished": state.finished}
        metric = None if best is None else best.metric
        saved = checkpoints.write(name, about | {"metric": metric, "value": value}, fill)
        self.checkpoint = str(saved.path)
        self._saved_at = _place(state)
        checkpoints.drop_old(
            state.stage,
            keep_last=settings.keep_last,
            keep_best=0 if best is None else best.count,
            metric=metric,
            highest=best is None or best.mode == "max",
        )

    @contextmanager
    def saved_on_failure(
        self, config: TrainingConfig, state: RunState, training: Training | None
    ) -> Iterator[None]:
        """Whatever stops the run inside, an error or the user, what it has learnt since the last
        checkpoint is saved first: `state`, which has to be what is in memory then.
        """
        try:
            yield
        except BaseException as error:
            self.save_if_new(config, state, training)
            if isinstance(error, Interrupted):
                error.checkpoint = self.checkpoint
            raise

    def save_if_new(
        self, config: TrainingConfig, state: RunState, training: Training | None
    ) -> None:
        """Save what a run that is about to end has learnt since its last checkpoint."""
        if state.step > 0 and _place(state) != self._saved_at:
            try:
                self.save_checkpoint(config, state, training)
            except Exception as failure:
                logger.warning("the state of the run was not saved: %s", failure)

    def write_down(self, error: NotFiniteError, stage: str, step: int) -> UserError:
        """Save the batch of a loss that is not finite; the error then says where it is."""
        path = self.run.write_samples(f"not_finite/{stage}-{step:06d}", error.samples)
        return UserError(f"{stage} step {step}: {error.cause}; its batch: {path}", error.next_step)


def _place(state: RunState) -> tuple[str, int, bool]:
    return state.stage, state.step, state.evaluated


def check_prompts_fit(tasks: TaskSource, sampler: Sampler, place: str) -> None:
    """Render the longest prompts of a source, as far as it is known, against the context limit.

    Raises:
        UserError: a prompt leaves no room for an answer.
    """
    longest = heapq.nlargest(
        _PROMPTS_RENDERED, tasks.known(), key=lambda t: sum(len(m.content) for m in t.prompt)
    )
    limit = sampler.engine.context_limit
    for task in longest:
        for opening, schemas in sampler.environment.starts(task):
            rollout = Rollout(task=task)
            rollout.add_messages(*opening)
            tokens = len(sampler.renderer.prompt(rollout, schemas).token_ids)
            if tokens >= limit:
                raise UserError(
                    f"{place}: the prompt of task {task.id} has {tokens} tokens; "
                    f"the context limit is {limit}",
                    "Shorten the prompt, or raise engine.context_limit if the model allows it.",
                )
