"""Environments of other packages, from their config sections."""

from __future__ import annotations

from retrain.config.adapters import GymnasiumConfig, OpenEnvConfig, VerifiersConfig
from retrain.envs import Environment
from retrain.envs.adapters.gymnasium import GymnasiumEnvironment
from retrain.envs.adapters.openenv import OpenEnvEnvironment, action_class, client_class
from retrain.envs.adapters.verifiers import VerifiersEnvironment, load
from retrain.rendering import Renderer

AdapterConfig = GymnasiumConfig | OpenEnvConfig | VerifiersConfig


def build_adapter(section: AdapterConfig, renderer: Renderer) -> Environment:
    """
    Raises:
        UserError: there is no such environment, or its package is missing.
    """
    if isinstance(section, GymnasiumConfig):
        return _gymnasium(section)
    if isinstance(section, VerifiersConfig):
        return VerifiersEnvironment(
            renderer, env=section.env, path=section.path, params=section.params
        )
    return OpenEnvEnvironment(
        section.url,
        renderer,
        client=section.client,
        action=section.action,
        action_field=section.action_field,
        action_pattern=section.action_pattern,
        observation_field=section.observation_field,
        tools=section.tool_format is not None,
        max_steps=section.max_steps,
        invalid_reward=section.invalid_reward,
        timeout_s=section.timeout_s,
        max_sessions=section.max_sessions,
    )


def describe_adapter(section: AdapterConfig) -> str:
    """One line on what it is; nothing is started, and no server is asked.

    Raises:
        UserError: as `build_adapter`.
    """
    if isinstance(section, GymnasiumConfig):
        _gymnasium(section)
        return f"{section.id}; at most {section.max_steps} turns"
    if isinstance(section, OpenEnvConfig):
        client_class(section.client, section.tool_format is not None)
        action_class(section.action)
        return f"the server {section.url}; at most {section.max_steps} turns"
    made = load(section.env, section.path, section.params)
    return f"{type(made).__name__} of {type(made.taskset).__name__}"


def _gymnasium(section: GymnasiumConfig) -> GymnasiumEnvironment:
    return GymnasiumEnvironment(
        section.id,
        params=section.params,
        action=section.action,
        choices=section.choices,
        action_pattern=section.action_pattern,
        observation_field=section.observation_field,
        observations=section.observations,
        max_steps=section.max_steps,
        invalid_reward=section.invalid_reward,
    )
