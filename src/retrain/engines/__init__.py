"""Engines sample from the policy. `retrain.engines.torch_engine` needs torch; this does not."""

from retrain.engines.base import (
    Completion,
    Engine,
    GenerateRequest,
    PolicyEngine,
    SamplingParams,
)

__all__ = ["Completion", "Engine", "GenerateRequest", "PolicyEngine", "SamplingParams"]
