"""Sampling MODEL messages from a live model, for synchronous code."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from retrain.engines import SamplingParams
from retrain.engines.torch_engine import TorchEngine
from retrain.models.forward import evaluating
from retrain.native.background import BackgroundLoop
from retrain.native.rendering import make_renderer
from retrain.rollout import EngineAgent, gather_or_cancel
from retrain.tools import Tool, tool_schema
from retrain.types import Message, Rollout, TagConfig, Task, UserError


class ModelGenerate:
    """Generates responses with the model as it is at the moment of the call.

    Nothing is copied: the weights are read from `model`, and every call starts from an empty
    cache, so an optimizer step between two calls shows in the second however it was made. A
    call's rollouts are decoded together, each shared prompt computed once.

    The model is in evaluation mode during a call and as it was before afterwards: dropout takes
    no part in sampling, nor in the losses of `GRPO` and `PPO`.

    Messages come with the tokens that were sampled and their log-probabilities; adding one to
    its rollout enters those in the rollout's ledger, which is what trains. The policy version
    of a token is the number of the call, from 1.

    Args:
        model: a causal LM of transformers, PEFT-wrapped or not, on one device.
        tokenizer: its own; one without a chat template gets the plain format.
        max_new_tokens: of one response.
        temperature: of sampling; 0 is greedy. Give `GRPO` and `PPO` the same.
        tag_config: generation ends with a tool call's closing tag, and messages carry the calls.
        tools: what can be called. Without `tag_config` the chat template tells the model; with
            it, the system prompt should. Calls are parsed, and running them is the user's part.
        seed: of all numbers drawn. Each call draws new ones.
        max_slots: most responses decoded at once.

    Raises:
        UserError: tokenizer and tools that do not fit, or a model without a context limit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        *,
        tag_config: TagConfig | None = None,
        tools: Sequence[Tool] = (),
        seed: int = 0,
        max_slots: int = 128,
    ) -> None:
        self._model = model
        self._tools = [tool_schema(tool) for tool in tools]
        self._renderer = make_renderer(model, tokenizer, tag_config, has_tools=bool(tools))
        self._params = SamplingParams(max_new_tokens, temperature)
        self._seed = seed
        self._calls = 0
        self._engine = TorchEngine(model, tokenizer=tokenizer, max_slots=max_slots)
        self._loop = BackgroundLoop()
        self._finalizer = weakref.finalize(self, _shut_down, self._loop, self._engine)
        self._finalizer.atexit = False

    def rollout_generate_response(self, rollout: Rollout) -> Message:
        """The next MODEL message; the rollout is left as it is.

        Add the message with `rollout.add_messages(message)`.

        Raises:
            UserError: the prompt leaves no room in the context.
            InfrastructureError: the engine failed.
        """
        return self._respond([rollout])[0]

    def batch_rollout_generate_response(self, rollouts: Sequence[Rollout]) -> list[Message]:
        """Append a MODEL message to each rollout, and return them in order; they are not to be
        added again.

        Raises:
            UserError: one rollout is listed twice, or a prompt leaves no room in the context;
                nothing is appended then.
            InfrastructureError: the engine failed.
        """
        seen: dict[int, int] = {}
        for index, rollout in enumerate(rollouts):
            first = seen.setdefault(id(rollout), index)
            if first != index:
                raise UserError(
                    f"rollouts[{first}] and rollouts[{index}] are the same object",
                    "Make one Rollout for each attempt.",
                )
        messages = self._respond(rollouts)
        for rollout, message in zip(rollouts, messages, strict=True):
            rollout.add_messages(message)
        return messages

    def close(self) -> None:
        """End the threads behind it; closing twice is allowed, and happens by itself when the
        object is no longer used."""
        self._finalizer()
        self._loop.join()

    def _respond(self, rollouts: Sequence[Rollout]) -> list[Message]:
        if not self._finalizer.alive:
            raise UserError("this ModelGenerate is closed", "Make a new one.")
        self._calls += 1
        with evaluating(self._model):
            return self._loop.run(self._sample(rollouts, self._calls))

    async def _sample(self, rollouts: Sequence[Rollout], call: int) -> list[Message]:
        await self._engine.update_weights(call)
        responses = (self._one(rollout, i, call) for i, rollout in enumerate(rollouts))
        return await gather_or_cancel(responses)

    async def _one(self, rollout: Rollout, index: int, call: int) -> Message:
        """A copy of the rollout acts: its session and its seed belong to this call alone."""
        view = replace(
            rollout,
            id=f"{call}/{index}",
            task=Task(f"of rollouts[{index}]", ()),
            messages=list(rollout.messages),
            segments=copy.deepcopy(rollout.segments),
        )
        agent = EngineAgent(
            engine=self._engine,
            renderer=self._renderer,
            params=self._params,
            run_seed=self._seed,
            epoch=call,
            sample=index,
            rollout_id=view.id,
        )
        message = await agent.act(view, self._tools)
        await self._engine.end_session(view.id)
        assert message.turn is not None
        return replace(message, turn=replace(message.turn, rollout=rollout.id))


def _shut_down(loop: BackgroundLoop, engine: TorchEngine) -> None:
    loop.stop_after(engine.close())
