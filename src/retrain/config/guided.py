"""What on-policy distillation asks of the sections that it shares with RL."""

from __future__ import annotations

from collections.abc import Iterator

from retrain.config.algorithm import TOKEN_ADVANTAGES, Hyperparameters
from retrain.config.teachers import OnPolicyDistillation

_OF_REWARDS = (
    "advantage",
    "normalize_advantages",
    "gamma",
    "credit",
    "critic",
    "overlong_punishment",
)


def unfit_for_a_group_of_one(settings: Hyperparameters) -> str | None:
    """Why rollouts that are compared with each other cannot be alone, if they are."""
    if settings.group_size > 1 or settings.advantage in TOKEN_ADVANTAGES:
        return None
    return (
        "algorithm.hyperparameters: group_size 1 gives every rollout an advantage of zero under "
        f"{settings.advantage}; use at least 2, better 8"
    )


def unfit_for_teachers(
    section: OnPolicyDistillation, settings: Hyperparameters
) -> Iterator[tuple[str, str]]:
    """(what does nothing or harm in a stage with teachers, what to do about it)."""
    place = "algorithm.hyperparameters"
    if settings.dynamic_sampling_rounds:
        yield (
            f"{place}.dynamic_sampling_rounds {settings.dynamic_sampling_rounds} would replace "
            "groups that teach: a teacher speaks of those without variance too",
            "Set it to 0.",
        )
    if settings.loss == "gmpo":
        yield (
            f"{place}.loss: gmpo has one advantage for a whole rollout, and a teacher gives each "
            "token its own",
            "Use another loss, such as ppo_clip or reinforce.",
        )
    if section.task_reward:
        reason = unfit_for_a_group_of_one(settings)
        if reason is not None:
            yield reason, "Or set distillation.task_reward: 0, so that only teachers teach."
        return
    idle = settings.changed(*_OF_REWARDS)
    if settings.kl is not None and settings.kl.place == "reward":
        idle.append("kl.place: reward")
    if idle:
        yield (
            f"{' and '.join(f'{place}.{key}' for key in idle)}: nothing to act on, since rewards "
            "do not train with distillation.task_reward 0",
            "Remove it (or the algorithm.name that sets it), or raise task_reward.",
        )
