"""Worlds to act in."""

from retrain.envs.agents import MultiAgentEnvironment
from retrain.envs.base import Agent, Environment, Step
from retrain.envs.dialogue import DialogueEnvironment, ScriptedUser, SimulatedUser
from retrain.envs.episode import Episode, Participant, Player, Role
from retrain.envs.tools import TOOLS_OFF, ToolEnvironment

__all__ = [
    "TOOLS_OFF",
    "Agent",
    "DialogueEnvironment",
    "Environment",
    "Episode",
    "MultiAgentEnvironment",
    "Participant",
    "Player",
    "Role",
    "ScriptedUser",
    "SimulatedUser",
    "Step",
    "ToolEnvironment",
]
