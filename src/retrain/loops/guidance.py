"""Teachers in a stage: what they say of its samples, and which tokens that leaves to train."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from retrain.types import InfrastructureError, Rollout, Sample


class Teaching(Protocol):
    """The teachers of a stage, each for its tasks, mixed where several speak.

    A rollout of which one fails to speak is masked; all of them raise InfrastructureError.
    """

    async def prepare(self, temperature: float) -> None:
        """Find out whether they can do what will be asked of them."""
        ...

    async def attach(
        self, rollouts: Sequence[Rollout], samples: Sequence[Sample], temperature: float
    ) -> dict[str, float]:
        """Set the samples' `teacher_logprobs`; what is to be reported."""
        ...

    async def attach_top(
        self,
        samples: Sequence[Sample],
        k: int,
        temperature: float,
        *,
        rollouts: Sequence[Rollout] = (),
    ) -> None:
        """Set the samples' `teacher_top_ids`, `teacher_top_logprobs` and `teacher_top_k`."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Guidance:
    """Teachers beside the rewards of a stage of RL, or instead of them.

    Args:
        coefficient: weight of the KL from the policy to them.
        task_reward: weight of the advantages that come from rewards.
        top_k: how many of their likeliest tokens they give at each place; None asks for the
            log-probabilities of the sampled tokens only.
        vocab_size: of the policy; what a teacher has beyond counts among all other tokens.
    """

    teachers: Teaching
    coefficient: float
    task_reward: float
    top_k: int | None
    vocab_size: int

    async def teach(
        self, rollouts: Sequence[Rollout], samples: Sequence[Sample], temperature: float
    ) -> tuple[list[Sample], dict[str, float]]:
        """The samples that have something to learn, and what is to be reported.

        Teachers are asked at the temperature of sampling: a policy whose logits are a teacher's
        then has no distance from it. Where rewards do not train, tokens of which no teacher speaks
        do not either, and count in no mean.
        """
        if not samples:
            return [], {}
        metrics: dict[str, float] = {}
        try:
            if self.top_k is None:
                metrics |= await self.teachers.attach(rollouts, samples, temperature)
            else:
                await attach_top(
                    self.teachers,
                    samples,
                    self.top_k,
                    temperature,
                    self.vocab_size,
                    rollouts=rollouts,
                )
        except InfrastructureError:
            return [], {}  # every rollout is masked: the step is lost, and counted as such
        masked = {rollout.id for rollout in rollouts if rollout.error is not None}
        kept = [sample for sample in samples if sample.rollout_id not in masked]
        metrics["teacher/no_signal"] = share_untaught(samples)
        if self.task_reward == 0:
            leave_out_untaught(kept)
        return [sample for sample in kept if any(sample.loss_mask)], metrics


async def attach_top(
    teachers: Teaching,
    samples: Sequence[Sample],
    k: int,
    temperature: float,
    vocab_size: int,
    *,
    rollouts: Sequence[Rollout] = (),
) -> None:
    """Have teachers set their likeliest tokens, as far as the policy has them."""
    await teachers.attach_top(samples, k, temperature, rollouts=rollouts)
    for sample in samples:
        sample.teacher_temperature = temperature
        if sample.teacher_top_ids is not None:
            unknown = numbers(sample.teacher_top_ids) >= vocab_size
            if unknown.any():
                ids = np.where(unknown, -1, numbers(sample.teacher_top_ids))
                sample.teacher_top_ids = array("i", ids.astype(np.int32).tobytes())


def leave_out_untaught(samples: Sequence[Sample]) -> None:
    """Take the tokens that no teacher speaks of out of what trains."""
    for sample in samples:
        trains = numbers(sample.loss_mask).astype(np.bool_) & taught(sample)
        sample.loss_mask = array("B", trains.astype(np.uint8).tobytes())


def share_untaught(samples: Sequence[Sample]) -> float:
    """Of the tokens that may train."""
    masks = [numbers(sample.loss_mask).astype(np.bool_) for sample in samples]
    spoken = sum(
        int((mask & taught(sample)).sum()) for mask, sample in zip(masks, samples, strict=True)
    )
    return 1.0 - spoken / max(1, sum(int(mask.sum()) for mask in masks))


def taught(sample: Sample) -> np.ndarray:
    """[T] bool, where a teacher speaks."""
    speaks: np.ndarray = np.zeros(len(sample), dtype=np.bool_)
    if sample.teacher_top_logprobs is not None and sample.teacher_top_ids is not None:
        shape = (len(sample), sample.teacher_top_k)
        logprobs = numbers(sample.teacher_top_logprobs).reshape(shape)
        known = numbers(sample.teacher_top_ids).reshape(shape) >= 0
        speaks |= np.any(known & (logprobs > -np.inf), axis=1)
    if sample.teacher_logprobs is not None:
        speaks |= np.logical_not(np.isnan(numbers(sample.teacher_logprobs)))
    return speaks


def numbers(values: array[int] | array[float]) -> np.ndarray:
    """A column without a copy."""
    return np.frombuffer(values, dtype=np.dtype(values.typecode))
