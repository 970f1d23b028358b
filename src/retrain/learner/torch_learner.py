"""The learner: forward, backward, step. It knows per-token losses, not algorithms."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retrain.algorithms import Aggregation, value_loss
from retrain.learner.batch import Batch, micro_batches
from retrain.learner.critic import Critic
from retrain.learner.objectives import Objective, Predictions
from retrain.learner.optim import (
    OptimizerName,
    Schedule,
    make_optimizers,
    optimizer_tensors,
    restore_optimizers,
)
from retrain.learner.reference import Reference
from retrain.models.scores import Scores, scores, selected_logprobs, spread
from retrain.models.tree import packs_exactly
from retrain.types import Sample, UserError


class NotFiniteError(UserError):
    """The loss or the gradient is NaN or infinite; `samples` are those it came from."""

    def __init__(self, cause: str, next_step: str, samples: Sequence[Sample]) -> None:
        super().__init__(cause, next_step)
        self.samples = samples


class TorchLearner:
    """Trains the model it shares with the engine, in place.

    Args:
        model: any causal LM of transformers, PEFT-wrapped or not; only parameters that require
            a gradient are given to the optimizer.
        temperature: of sampling; the learner's log-probabilities are those of the distribution
            that the engine samples from.
        max_grad_norm: gradients are clipped to this global norm; None leaves them.
        micro_batch_tokens: most tokens of one forward pass.
        share_prefixes: compute what sequences share from the start once, where the architecture
            allows it.
        critic: learns its values beside the policy, with its own optimizer and gradient norm.
        critic_learning_rate: its peak; the policy's if None.
        value_clip, value_coefficient: of the critic's loss.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        optimizer: OptimizerName = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        max_grad_norm: float | None = 1.0,
        micro_batch_tokens: int = 16384,
        temperature: float = 1.0,
        share_prefixes: bool = True,
        critic: Critic | None = None,
        critic_learning_rate: float | None = None,
        value_clip: float | None = 0.2,
        value_coefficient: float = 0.5,
    ) -> None:
        self.model = model
        self.critic = critic
        self.temperature = temperature
        self.max_grad_norm = max_grad_norm
        self.micro_batch_tokens = micro_batch_tokens
        self.share_prefixes = share_prefixes
        self.value_clip = value_clip
        self.value_coefficient = value_coefficient
        self.schedule = schedule or Schedule()
        self.updates = 0
        self._checkpointing = any(
            getattr(module, "gradient_checkpointing", False) for module in model.modules()
        )

        def optimizers(module: nn.Module, peak: float) -> list[torch.optim.Optimizer]:
            return make_optimizers(
                module.named_parameters(),
                name=optimizer,
                learning_rate=peak,
                betas=betas,
                weight_decay=weight_decay,
            )

        self.optimizers = optimizers(model, learning_rate)
        if not self.optimizers:
            raise UserError("the model has no parameter that trains")
        self.critic_optimizers = (
            [] if critic is None else optimizers(critic, critic_learning_rate or learning_rate)
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the weights: the state of the optimizers."""
        named = {"policy": self.optimizers, "critic": self.critic_optimizers}
        return {
            f"{whose}/{key}": tensor
            for whose, optimizers in named.items()
            for key, tensor in optimizer_tensors(optimizers).items()
        }

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Go on as after `updates` updates, with what `tensors` gave then."""
        self.updates = updates
        named = {"policy": self.optimizers, "critic": self.critic_optimizers}
        for whose, optimizers in named.items():
            mine = (key for key in tensors if key.startswith(f"{whose}/"))
            restore_optimizers(
                optimizers, {key.removeprefix(f"{whose}/"): tensors[key] for key in mine}
            )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward_backward(
        self,
        samples: Sequence[Sample],
        objective: Objective,
        aggregation: Aggregation = "token_mean",
        *,
        constant_length: int | None = None,
        whole_rollouts: bool = False,
        skip_zero_advantages: bool = True,
        entropy_gradient: bool = False,
        train_policy: bool = True,
    ) -> dict[str, float]:
        """Accumulate the gradient of `(per_token * weights).sum()` over all samples.

        Returns the loss and what the objective counted, over the whole batch, with `tokens`, the
        tokens that trained, their `entropy`, and `gap_max` and `gap_mean`, how far the learner's
        log-probabilities are from the engine's.

        Args:
            whole_rollouts: the objective has ratios of whole rollouts.
            train_policy: off while a critic warms up: only its own parameters get a gradient.

        Raises:
            NotFiniteError: the loss is not finite.
        """
        totals: dict[str, float] = {"loss": 0.0, "tokens": 0.0, "gap_max": 0.0, "gap_sum": 0.0}
        self._set_mode()
        for chosen, batch in self._micro_batches(
            samples,
            aggregation,
            constant_length=constant_length,
            whole_rollouts=whole_rollouts,
            skip_zero_advantages=skip_zero_advantages,
        ):
            part = [samples[i] for i in chosen]
            with torch.set_grad_enabled(train_policy):
                found = self._scores(batch, entropy_gradient, batch.teacher_top_ids)
                predictions = Predictions(
                    spread(found.logprobs, batch.mask),
                    spread(found.entropy, batch.mask),
                    None if found.candidates is None else spread(found.candidates, batch.mask),
                )
                per_token, counts = objective(predictions, batch)
                loss = (per_token * batch.weights).sum()
            if self.critic is None:
                self._backward(loss, part)
            else:
                counts |= self._backward_both(self.critic, loss, found.hidden, batch, part)
            _add_counts(totals, loss, predictions, batch, counts)
        totals["gap_mean"] = totals.pop("gap_sum") / max(totals["tokens"], 1.0)
        return totals

    def _backward_both(
        self,
        critic: Critic,
        loss: Tensor,
        policy_hidden: Tensor | None,
        batch: Batch,
        samples: Sequence[Sample],
    ) -> dict[str, Tensor]:
        """The policy's loss and the critic's; one graph only where they share a backbone."""
        if critic.backbone is None:
            valued, counts = self._value_loss(critic, batch, policy_hidden)
            self._backward(loss + valued, samples)
            return counts
        self._backward(loss, samples)
        valued, counts = self._value_loss(critic, batch, None)
        self._backward(valued, samples)
        return counts

    def _value_loss(
        self, critic: Critic, batch: Batch, policy_hidden: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found = critic.values(
            batch.token_ids, batch.mask, policy_hidden, share_prefixes=self.share_prefixes
        )
        values = spread(found, batch.mask)
        per_token, counts = value_loss(
            values, batch.values, batch.returns, batch.mask, clip=self.value_clip
        )
        error = torch.where(batch.mask, batch.returns - values.detach(), 0.0)
        counts["value_loss"] = per_token.detach().sum()
        counts["value_error_squared"] = error.square().sum()
        counts["returns"] = torch.where(batch.mask, batch.returns, 0.0).sum()
        counts["returns_squared"] = torch.where(batch.mask, batch.returns, 0.0).square().sum()
        return self.value_coefficient * (per_token * batch.weights).sum(), counts

    def _backward(self, loss: Tensor, samples: Sequence[Sample]) -> None:
        if not bool(torch.isfinite(loss)):
            ids = ", ".join(sorted({sample.rollout_id for sample in samples})[:5])
            raise NotFiniteError(
                f"the loss is {loss.item()} after {self.updates} updates (rollouts {ids})",
                "Lower the learning rate, or look at those rollouts in the run directory.",
                samples,
            )
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    def optim_step(
        self, samples: Sequence[Sample] = (), *, schedule_step: int | None = None
    ) -> dict[str, float]:
        """Clip, step, clear. Returns the gradient's norm before clipping and the learning rate;
        those of the critic too, where there is one.

        Args:
            schedule_step: where the schedule stands; by default the number of updates made.

        Raises:
            NotFiniteError: the gradient is not finite; `samples` are named as what it came from.
        """
        factor = self.schedule.factor(self.updates if schedule_step is None else schedule_step)
        metrics = self._step("policy", self.optimizers, samples, factor)
        if self.critic is not None:
            stepped = self._step("critic", self.critic_optimizers, samples, factor)
            metrics |= {f"critic_{name}": value for name, value in stepped.items()}
        self.updates += 1
        return metrics

    def _step(
        self,
        whose: str,
        optimizers: Sequence[torch.optim.Optimizer],
        samples: Sequence[Sample],
        factor: float,
    ) -> dict[str, float]:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        parameters = [p for group in groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            raise NotFiniteError(
                f"the {whose}'s gradient norm is {norm} after {self.updates} updates",
                f"Lower the {whose}'s learning rate"
                + (" or the scale of the rewards." if self.updates == 0 else "."),
                samples,
            )
        for group in groups:
            group["lr"] = group["peak"] * factor
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "learning_rate": groups[0]["lr"]}

    def attach_old_logprobs(self, samples: Sequence[Sample]) -> None:
        """Keep the learner's log-probabilities on each sample, for the ratio of later updates."""
        for sample, column in self._columns(samples, self._logprobs):
            sample.old_logprobs = column

    def attach_reference(self, samples: Sequence[Sample], reference: Reference) -> None:
        """Keep the reference's log-probabilities on each sample."""
        with reference.model() as model:
            for sample, column in self._columns(
                samples, lambda batch: self._logprobs(batch, model)
            ):
                sample.ref_logprobs = column

    def attach_values(self, samples: Sequence[Sample]) -> None:
        """Keep the critic's values on each sample."""
        critic = self.critic
        assert critic is not None

        def values(batch: Batch) -> Tensor:
            hidden = self._scores(batch, False).hidden if critic.backbone is None else None
            found = critic.values(
                batch.token_ids, batch.mask, hidden, share_prefixes=self.share_prefixes
            )
            return spread(found, batch.mask)

        for sample, column in self._columns(samples, values):
            sample.values = column

    @torch.no_grad()
    def _columns(
        self, samples: Sequence[Sample], of: Callable[[Batch], Tensor]
    ) -> list[tuple[Sample, array[float]]]:
        """Each sample with its row of what `of` gives for a batch."""
        self._set_mode()
        columns: list[tuple[Sample, array[float]]] = []
        for chosen, batch in self._micro_batches(samples, "token_mean", skip_zero_advantages=False):
            rows = of(batch).double().cpu()
            for row, index in enumerate(chosen):
                length = len(samples[index])
                columns.append((samples[index], array("d", rows[row, :length].tolist())))
        return columns

    def _set_mode(self) -> None:
        """Training mode is what switches gradient checkpointing on; nothing else needs it."""
        self.model.train(self._checkpointing)
        if self.critic is not None:
            self.critic.train(self._checkpointing)

    def _micro_batches(
        self, samples: Sequence[Sample], aggregation: Aggregation, **how: Any
    ) -> Iterator[tuple[list[int], Batch]]:
        return micro_batches(
            samples,
            token_budget=self.micro_batch_tokens,
            aggregation=aggregation,
            device=self.device,
            share_prefixes=self.share_prefixes and packs_exactly(self.model),
            **how,
        )

    def _scores(
        self, batch: Batch, entropy_gradient: bool, candidates: Tensor | None = None
    ) -> Scores:
        return scores(
            self.model,
            batch.token_ids,
            batch.lengths,
            batch.mask,
            self.temperature,
            share_prefixes=self.share_prefixes,
            entropy_gradient=entropy_gradient,
            candidates=None if candidates is None else candidates[batch.mask],
            candidate_temperature=batch.teacher_temperature,
        )

    def _logprobs(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        return selected_logprobs(
            self.model if model is None else model,
            batch.token_ids,
            batch.lengths,
            batch.mask,
            self.temperature,
            share_prefixes=self.share_prefixes,
        )


def _add_counts(
    totals: dict[str, float],
    loss: Tensor,
    predictions: Predictions,
    batch: Batch,
    counts: dict[str, Tensor],
) -> None:
    gap = ((predictions.logprobs.detach() - batch.behavior_logprobs).abs() * batch.mask).double()
    sums: dict[str, Tensor | float] = {
        "loss": loss.item(),
        "tokens": batch.num_trained,
        "entropy": predictions.entropy.detach().sum(),
        "gap_sum": gap.sum(),
        **counts,
    }
    for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + float(value)
    totals["gap_max"] = max(totals["gap_max"], float(gap.max()))
