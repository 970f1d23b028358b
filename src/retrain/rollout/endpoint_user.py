"""A simulated user that the model behind a chat endpoint plays."""

from __future__ import annotations

from retrain.engines.openai import ChatEndpoint
from retrain.envs.prompts import fill
from retrain.rollout.agent import request_seed
from retrain.rollout.model_user import PROMPT, seen_by_user
from retrain.types import InfrastructureError, MessageType, Rollout, Task

_ROLES = {MessageType.MODEL: "assistant", MessageType.MESSAGE: "user"}


class EndpointUser:
    """Plays the user: it sees the conversation with the parties exchanged.

    Args:
        system_prompt: a format string over the task's columns, `{prompt}` and `{answer}` too.
        run_seed: with the rollout and the turn it makes the seed sent with each request.
    """

    def __init__(self, endpoint: ChatEndpoint, *, system_prompt: str, run_seed: int = 0) -> None:
        self._endpoint = endpoint
        self._system_prompt = system_prompt
        self._run_seed = run_seed

    async def reply(self, task: Task, rollout: Rollout) -> str | None:
        """The user's next words.

        Raises:
            UserError: the system prompt asks for a column that the task lacks, or the endpoint
                refuses the request.
            InfrastructureError: the endpoint failed, or cut the reply before its first word.
        """
        said = [{"role": _ROLES[m.type], "content": m.content} for m in seen_by_user(rollout)]
        system = {"role": "system", "content": fill(self._system_prompt, task, PROMPT)}
        turn = len(rollout.model_messages)
        seed = request_seed(self._run_seed, turn, rollout.id, 0, 0)
        reply = await self._endpoint.chat([system, *said], seed=seed >> 32)  # some take 31 bits
        text = reply.text.strip()
        if not text and reply.finish_reason == "length":
            raise InfrastructureError(
                "the user's reply was cut before it said a word: raise "
                "environment.user.max_new_tokens"
            )
        return text or None

    async def finish(self, rollout: Rollout) -> None:
        return None

    async def close(self) -> None:
        await self._endpoint.close()
