"""A user's own program as the environment: it asks the policy over HTTP."""

from retrain.envs.external.environment import ExternalEnvironment

__all__ = ["ExternalEnvironment"]
