"""Rollouts: one, a group, a step's worth; and the samples that they become."""

from retrain.rollout.agent import EngineAgent, request_seed
from retrain.rollout.endpoint_user import EndpointUser
from retrain.rollout.garbage import set_aside
from retrain.rollout.model_user import ModelUser
from retrain.rollout.players import EndpointPlayer, ModelPlayer, PolicyPlayer
from retrain.rollout.samples import to_samples
from retrain.rollout.sampling import Sampler, gather_or_cancel

__all__ = [
    "EndpointPlayer",
    "EndpointUser",
    "EngineAgent",
    "ModelPlayer",
    "ModelUser",
    "PolicyPlayer",
    "Sampler",
    "gather_or_cancel",
    "request_seed",
    "set_aside",
    "to_samples",
]
