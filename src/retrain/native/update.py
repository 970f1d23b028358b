"""What GRPO and PPO share: from rollouts and rewards to the policy's loss."""

from __future__ import annotations

import math
import sys
import warnings
from array import array
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from retrain.algorithms import Aggregation
from retrain.learner import Batch, PolicyObjective, Predictions, micro_batches
from retrain.learner.objectives import Metrics
from retrain.loops.credit import Credit, by_agent
from retrain.models.forward import architecture_setting, evaluating
from retrain.models.scores import Scores, scores, spread
from retrain.native.memory import RolloutMemory
from retrain.native.rendering import make_renderer
from retrain.native.scoring import Rewards, read_rewards, training_indices
from retrain.native.settings import ReferenceModel, above_zero, not_negative, one_of
from retrain.tools import Tool, tool_schema
from retrain.types import Rollout, Sample, TagConfig, UserError

Column = Literal["old_logprobs", "ref_logprobs", "values"]


@dataclass(frozen=True)
class Prepared:
    """One call's rollouts: those that are compared, and their samples."""

    groups: list[list[Rollout]]
    """With this call's rewards, and segments as they train."""
    labelled: bool
    """Whether somebody said which group each belongs to."""
    by_turn: bool
    """Whether rewards were given by turn."""
    samples: list[Sample]
    """This call's own; `kept` are their memory, which lasts."""
    kept: list[Sample]


@dataclass(frozen=True)
class Pass:
    """One forward pass of the policy over the samples that teach something."""

    batch: Batch
    found: Scores
    loss: Tensor
    """The policy's, a scalar."""
    metrics: Metrics


class PolicyLossBuilder:
    """Turns rollouts into samples, remembers what lasts over epochs, and runs the model.

    Args:
        model: the policy; its forward pass runs without dropout.
        objective: the per-token loss.
        reference: gives the reference model; None where the objective has no KL penalty.
        temperature: of sampling; logits are divided by it.
        aggregation, aggregation_length: how the per-token loss becomes one number.

    Raises:
        UserError: settings that do not fit each other.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        objective: PolicyObjective,
        reference: ReferenceModel | None,
        temperature: float,
        aggregation: Aggregation,
        aggregation_length: int | None,
        tag_config: TagConfig | None,
        tools: Sequence[Tool],
    ) -> None:
        one_of("aggregation", aggregation, get_args(Aggregation))
        if (aggregation_length is None) == (aggregation == "constant"):
            raise UserError(
                f"aggregation is {aggregation} and aggregation_length is {aggregation_length}",
                "aggregation='constant' needs a length in tokens; no other has a use for it.",
            )
        above_zero("temperature", temperature)
        not_negative("entropy_coefficient", objective.entropy_coefficient)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(
                "the model has no parameter that trains", "Call model.requires_grad_()."
            )
        self.model = model
        self.objective = objective
        self._reference = reference
        self._temperature = temperature
        self._aggregation = aggregation
        self._aggregation_length = aggregation_length
        renderer = make_renderer(model, tokenizer, tag_config, has_tools=bool(tools))
        self.memory = RolloutMemory(
            renderer,
            [tool_schema(tool) for tool in tools],
            architecture_setting(model, "max_position_embeddings"),
        )
        self._warned: set[str] = set()

    def prepare(
        self, rollouts: Sequence[Rollout], rewards: Rewards, labels: Sequence[Hashable] | None
    ) -> Prepared:
        """Samples of the rollouts that train, and those rollouts in their groups.

        A sample's `rollout_id` is the rollout's place in the call: copies of one rollout share
        their id, but each is an attempt of its own.

        Args:
            labels: the group of each rollout; None makes all of them one.
        """
        training = training_indices(rollouts)
        remembered = {i: self.memory.look_up(rollouts[i]) for i in training}
        turns, by_turn = read_rewards(rollouts, rewards, training)
        members: dict[Hashable, list[Rollout]] = {}
        samples: list[Sample] = []
        for i in training:
            view = replace(
                rollouts[i],
                id=str(i),
                reward=math.fsum(turns[i]),
                step_rewards=turns[i],
                segments=remembered[i].segments,
            )
            members.setdefault(None if labels is None else labels[i], []).append(view)
            samples += [replace(sample, rollout_id=view.id) for sample in remembered[i].samples]
        if not samples:
            self.warn("no rollout of this call trains: all are masked or of a frozen agent")
        kept = [sample for i in training for sample in remembered[i].samples]
        prepared = Prepared(list(members.values()), labels is not None, by_turn, samples, kept)
        if self._reference is not None:
            with self._reference() as reference:
                self.attach(prepared, "ref_logprobs", partial(self._logprobs, reference))
        return prepared

    def assign(self, credit: Credit, prepared: Prepared) -> None:
        """Give the samples their advantages."""
        about_groups = None if credit.advantage == "gae" else _about_groups(prepared)
        if about_groups is not None:
            self.warn(about_groups)
        credit.assign(prepared.groups, prepared.samples)

    def attach(
        self, prepared: Prepared, column: Column, compute: Callable[[Batch], Tensor]
    ) -> None:
        """Fill a column of the samples, and compute it where their memory does not hold it yet.

        Args:
            compute: gives [B, T] for a batch; called without gradient.
        """
        missing = [kept for kept in prepared.kept if getattr(kept, column) is None]
        batch = self._collate(missing, skip_zero_advantages=False)
        if batch is not None:
            with torch.no_grad():
                _keep(missing, column, batch[0], compute(batch[1]))
        for sample, kept in zip(prepared.samples, prepared.kept, strict=True):
            setattr(sample, column, getattr(kept, column))

    def run(self, prepared: Prepared, *, skip_zero_advantages: bool) -> Pass | None:
        """The policy's loss, with its graph; None where no sample teaches anything.

        Samples without old log-probabilities get those of this pass: their ratio is exactly one.

        Raises:
            UserError: the loss is not finite.
        """
        for sample, kept in zip(prepared.samples, prepared.kept, strict=True):
            sample.old_logprobs = kept.old_logprobs
        collated = self._collate(prepared.samples, skip_zero_advantages=skip_zero_advantages)
        if collated is None:
            return None
        chosen, batch = collated
        with without_dropout(self.model):
            found = self.scores(batch, entropy_gradient=self.objective.entropy_coefficient > 0)
        predictions = Predictions(
            spread(found.logprobs, batch.mask), spread(found.entropy, batch.mask)
        )
        per_token, metrics = self.objective(predictions, batch)
        loss = (per_token * batch.weights).sum().to(found.logprobs.dtype)
        if not bool(torch.isfinite(loss)):
            raise UserError(
                f"the loss is {loss.item()}",
                "Lower the learning rate, or clip gradients before optimizer.step().",
            )
        metrics["entropy"] = predictions.entropy.detach().sum()
        metrics["logprob_gap"] = _gap(predictions.logprobs.detach(), batch)
        _keep(prepared.kept, "old_logprobs", chosen, predictions.logprobs.detach())
        return Pass(batch, found, loss, metrics)

    def scores(self, batch: Batch, *, entropy_gradient: bool = False) -> Scores:
        """What the model says of a batch's trained tokens."""
        return _scores(self.model, batch, self._temperature, entropy_gradient)

    def nothing(self) -> Tensor:
        """A loss of zero that `backward` accepts."""
        parameter = next(p for p in self.model.parameters() if p.requires_grad)
        return parameter.flatten()[:1].sum() * 0.0

    def warn(self, message: str) -> None:
        """Once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)

    def _logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        with without_dropout(model):
            return spread(_scores(model, batch, self._temperature).logprobs, batch.mask)

    def _collate(
        self, samples: Sequence[Sample], *, skip_zero_advantages: bool
    ) -> tuple[list[int], Batch] | None:
        """All samples in one batch, with the indices of those that are in it."""
        batches = micro_batches(
            samples,
            token_budget=sys.maxsize,
            aggregation=self._aggregation,
            constant_length=self._aggregation_length,
            device=next(self.model.parameters()).device,
            skip_zero_advantages=skip_zero_advantages,
        )
        return next(batches, None)


def _about_groups(prepared: Prepared) -> str | None:
    """What is odd about how rollouts are compared, for the user to read."""
    compared = list(by_agent(prepared.groups))
    if compared and not prepared.by_turn and all(len(group) == 1 for group in compared):
        return (
            "every group has one rollout, so every advantage is zero; sample several rollouts of "
            "each prompt and give them one group_id"
        )
    if compared and not prepared.labelled:
        return (
            "the rollouts have no group_id, so all of a call are one group and are compared with "
            "each other; pass groups=[...] if they answer different prompts"
        )
    return None


def _scores(
    model: nn.Module, batch: Batch, temperature: float, entropy_gradient: bool = False
) -> Scores:
    return scores(
        model,
        batch.token_ids,
        batch.lengths,
        batch.mask,
        temperature,
        entropy_gradient=entropy_gradient,
    )


def _keep(kept: Sequence[Sample], column: Column, chosen: Sequence[int], rows: Tensor) -> None:
    """Write [B, T] rows into samples that have no such column yet."""
    table = rows.double().cpu()
    for row, index in enumerate(chosen):
        sample = kept[index]
        if getattr(sample, column) is None:
            setattr(sample, column, array("d", table[row, : len(sample)].tolist()))


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model as it samples, every module's mode restored afterwards.

    That is evaluation mode; where gradient checkpointing is on, training mode, which switches it
    on.

    Raises:
        UserError: gradient checkpointing with dropout, which would be drawn anew in `backward`.
    """
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        with evaluating(model):
            yield
        return
    dropping = next((name for name, module in model.named_modules() if _drops(module)), None)
    if dropping is not None:
        raise UserError(
            f"the model has gradient checkpointing on and dropout in '{dropping}'",
            "Set its dropout to 0: what trains must be what was sampled.",
        )
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout) and module.p > 0:
        return True
    return any(
        "drop" in name and isinstance(value, float) and value > 0
        for name, value in vars(module).items()
    )


def _gap(logprobs: Tensor, batch: Batch) -> Tensor:
    """Sum of distances between the old log-probabilities and the engine's; where no engine sampled
    a token there is none."""
    old = torch.where(batch.old_logprobs.isnan(), logprobs, batch.old_logprobs)
    sampled = batch.mask & ~batch.behavior_logprobs.isnan()
    return torch.where(sampled, (old - batch.behavior_logprobs).abs(), 0.0).sum()


def token_means(passed: Pass, more: Metrics | None = None) -> dict[str, float]:
    """A pass's counts over its trained tokens, as means, and the `tokens` themselves."""
    tokens = passed.batch.num_trained
    sums = {**passed.metrics, **(more or {})}
    return {"tokens": float(tokens)} | {k: float(v) / tokens for k, v in sums.items()}
