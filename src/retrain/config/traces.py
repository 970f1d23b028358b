"""`distillation` of type `traces`: another agent's logged conversations to imitate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from retrain.config.data import PromptSourceConfig, refuse_shares
from retrain.config.imitation import Imitation


class TracesDistillation(Imitation):
    """`traces`: the work of another agent, as its log holds it, trained by SFT."""

    type: Literal["traces"] = "traces"
    sources: list[str] = Field(min_length=1)
    """Files, directories or datasets that hold the logs; `retrain distill --from` replaces them."""
    format: Literal["auto", "messages", "gateway", "langfuse", "otel", "smolagents"] = "auto"
    """Of the logs; `auto` tells by each record."""
    system_prompt: str | None = None
    """Stands in place of the system messages of every trace; `""` leaves them out, null keeps
    them."""
    min_reward: float | None = Field(None, allow_inf_nan=False)
    """Least reward or score that the log itself gives; what has none is dropped."""
    threshold: float | None = Field(None, allow_inf_nan=False)
    """Least reward that `reward_setup` gives a trace (rejection sampling); its verifiers have to
    pass too. null scores nothing."""
    tasks: PromptSourceConfig | None = None
    """Where `reward_setup` finds answers that the log lacks: a trace is of the task whose last
    message equals its first user message (or that after its examples), or else is dropped."""
    per_prompt: int | None = Field(None, ge=1)
    """Most traces of one prompt: those of the highest reward, then the first."""

    @model_validator(mode="after")
    def _tasks_to_score(self) -> TracesDistillation:
        if self.tasks is None:
            return self
        if self.threshold is None:
            raise ValueError(
                "tasks does nothing without threshold: its answers are for reward_setup alone; "
                "set threshold, or remove tasks"
            )
        refuse_shares(self.tasks)
        return self
