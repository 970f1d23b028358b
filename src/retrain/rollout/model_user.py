"""A simulated user that a model plays."""

from __future__ import annotations

from retrain.engines.base import Engine, SamplingParams
from retrain.envs.prompts import fill
from retrain.rendering import Renderer
from retrain.rollout.agent import EngineAgent
from retrain.types import Message, MessageType, Rollout, Task

PROMPT = "environment.user.system_prompt"

_FLIPPED = {MessageType.MODEL: MessageType.MESSAGE, MessageType.MESSAGE: MessageType.MODEL}


class ModelUser:
    """Plays the user: it sees the conversation with the parties exchanged.

    Args:
        system_prompt: a format string over the task's columns, `{prompt}` and `{answer}` too.
        run_seed: with the rollout and the turn it makes each reply's seed.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        *,
        system_prompt: str,
        params: SamplingParams,
        run_seed: int = 0,
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._system_prompt = system_prompt
        self._params = params
        self._run_seed = run_seed

    async def reply(self, task: Task, rollout: Rollout) -> str | None:
        """The user's next words.

        Raises:
            UserError: the system prompt asks for a column that the task lacks.
            InfrastructureError: the engine failed.
        """
        agent = EngineAgent(
            engine=self._engine,
            renderer=self._renderer,
            params=self._params,
            run_seed=self._run_seed,
            epoch=len(rollout.model_messages),
            sample=0,
            rollout_id=_session(rollout),
            trainable=False,
        )
        mine = agent.start(Task(rollout.id, ()))
        mine.add_messages(Message(fill(self._system_prompt, task, PROMPT), MessageType.SYSTEM))
        mine.add_messages(*seen_by_user(rollout))
        return (await agent.act(mine)).content.strip() or None

    async def finish(self, rollout: Rollout) -> None:
        await self._engine.end_session(_session(rollout))

    async def close(self) -> None:
        await self._engine.close()


def seen_by_user(rollout: Rollout) -> list[Message]:
    """What was said, with the parties exchanged: the policy's words are another party's, and the
    user's own are the model's."""
    return [Message(m.content, _FLIPPED[m.type]) for m in rollout.messages if m.type in _FLIPPED]


def _session(rollout: Rollout) -> str:
    return f"user of {rollout.id}"
