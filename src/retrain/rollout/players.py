"""Who speaks for an agent: the policy, another model, or a chat endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retrain.engines.base import Engine, SamplingParams
from retrain.engines.openai import ChatEndpoint
from retrain.envs import Agent
from retrain.rendering import Renderer, ToolSchema
from retrain.rollout.agent import EngineAgent, request_seed
from retrain.types import InfrastructureError, Message, MessageType, Rollout, Task

_ROLES = {
    MessageType.SYSTEM: "system",
    MessageType.MESSAGE: "user",
    MessageType.MODEL: "assistant",
    MessageType.TOOL: "user",
}


@dataclass(frozen=True)
class PolicyPlayer:
    """The policy, with its weights of the moment."""

    renderer: Renderer
    trains = True

    def agent(
        self, policy: Agent, name: str, *, trainable: bool, place: str, compared: str | None
    ) -> Agent:
        assert isinstance(policy, EngineAgent)
        return policy.sibling(
            name, place=place, trainable=trainable, compared=compared, renderer=self.renderer
        )

    async def close(self) -> None:
        return None


@dataclass(frozen=True)
class ModelPlayer:
    """Another model; it never trains."""

    engine: Engine
    renderer: Renderer
    params: SamplingParams
    trains = False

    def agent(
        self, policy: Agent, name: str, *, trainable: bool, place: str, compared: str | None
    ) -> Agent:
        assert isinstance(policy, EngineAgent)
        return policy.sibling(
            name,
            place=place,
            trainable=False,
            compared=compared,
            engine=self.engine,
            renderer=self.renderer,
            params=self.params,
        )

    async def close(self) -> None:
        await self.engine.close()


@dataclass(frozen=True)
class EndpointPlayer:
    """The model behind a chat endpoint; its rollouts have words and no tokens."""

    endpoint: ChatEndpoint
    trains = False

    def agent(
        self, policy: Agent, name: str, *, trainable: bool, place: str, compared: str | None
    ) -> Agent:
        assert isinstance(policy, EngineAgent)
        about = policy.sibling(name, place=place, trainable=False, compared=compared)
        return EndpointAgent(about, self.endpoint)

    async def close(self) -> None:
        await self.endpoint.close()


@dataclass(frozen=True)
class EndpointAgent:
    """Says what a chat endpoint answers to the conversation as it stands."""

    about: EngineAgent
    """Whose names and seeds these are; nothing is sampled from its engine."""
    endpoint: ChatEndpoint

    def start(self, task: Task) -> Rollout:
        return self.about.start(task)

    async def act(self, rollout: Rollout, tools: Sequence[ToolSchema] = ()) -> Message:
        """
        Raises:
            UserError: the endpoint refuses the request.
            InfrastructureError: the endpoint failed, or the attempt has ended.
        """
        if self.about.over:
            raise InfrastructureError("this attempt at the rollout has ended")
        said = [{"role": _ROLES[m.type], "content": m.content} for m in rollout.messages]
        turn = len(rollout.model_messages)
        seed = request_seed(self.about.run_seed, self.about.epoch, rollout.id, 0, turn)
        reply = await self.endpoint.chat(said, seed=seed >> 32)  # some take 31 bits
        if not reply.text.strip() and reply.finish_reason == "length":
            raise InfrastructureError(
                f"the reply of {self.about.name} was cut before it said a word: raise "
                "max_new_tokens of its player"
            )
        message = Message(reply.text, MessageType.MODEL)
        rollout.add_messages(message)
        return message
