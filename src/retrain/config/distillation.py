"""`distillation`: learn from other agents, by their words or by their log-probabilities."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from retrain.config.teachers import LogitsDistillation, OnPolicyDistillation
from retrain.config.traces import TracesDistillation

DistillationConfig = Annotated[
    TracesDistillation | OnPolicyDistillation | LogitsDistillation, Field(discriminator="type")
]
