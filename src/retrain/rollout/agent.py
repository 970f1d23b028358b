"""The policy as an environment sees it: a renderer, an engine, and one seed a turn."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from retrain.engines.base import Bounds, Completion, Engine, GenerateRequest, SamplingParams
from retrain.rendering import Renderer, ToolSchema, prompt_token_ids
from retrain.types import InfrastructureError, Message, Rollout, Task, Turn, UserError


def request_seed(run_seed: int, epoch: int, task_id: str, sample: int, turn: int) -> int:
    """A 63-bit seed that belongs to one request, whatever order requests arrive in."""
    key = f"{run_seed}\0{epoch}\0{task_id}\0{sample}\0{turn}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


@dataclass
class EngineAgent:
    """Samples MODEL messages from an engine; one instance serves one attempt at a rollout.

    Args:
        params: sampling settings; the renderer's stop strings and tokens are added to them.
        run_seed, epoch, sample: what a turn's seed is made from, with the task and the turn.
        turn_timeout_s: of sampling one message; None waits for ever.
    """

    engine: Engine
    renderer: Renderer
    params: SamplingParams
    run_seed: int
    epoch: int
    sample: int
    rollout_id: str
    group_id: str | None = None
    name: str = "policy"
    trainable: bool = True
    episode: str | None = None
    turn_timeout_s: float | None = None
    asked: int = field(default=0, init=False)
    """Turns that the engine was asked for."""
    answered: int = field(default=0, init=False)
    """Turns that it gave."""
    over: bool = field(default=False, init=False)
    """The attempt has ended: code of it that was left behind gets nothing more sampled."""
    siblings: list[EngineAgent] = field(default_factory=list, init=False)
    """Further agents of the attempt."""

    def __post_init__(self) -> None:
        self.params = replace(
            self.params,
            stop=self.renderer.stop,
            stop_token_ids=tuple(sorted(self.renderer.codec.stop_token_ids)),
        )

    def start(self, task: Task) -> Rollout:
        return Rollout(
            id=self.rollout_id,
            group_id=self.group_id,
            agent=self.name,
            trainable=self.trainable,
            episode=self.episode,
            task=task,
        )

    def sibling(
        self,
        name: str,
        *,
        place: str,
        trainable: bool = True,
        compared: str | None = None,
        engine: Engine | None = None,
        renderer: Renderer | None = None,
        params: SamplingParams | None = None,
    ) -> EngineAgent:
        """Another agent of the same attempt, with seeds of its own.

        Args:
            place: tells its rollout apart from the others of the attempt.
            compared: names those of the attempt that it is compared with; None compares it with
                those of other attempts at the task.
            engine, renderer, params: where it is not the policy that speaks for it.
        """
        made = replace(
            self,
            name=name,
            trainable=trainable,
            rollout_id=f"{self.rollout_id}/{place}",
            group_id=self.group_id if compared is None else f"{self.rollout_id}/{compared}",
            episode=self.rollout_id,
            engine=engine or self.engine,
            renderer=renderer or self.renderer,
            params=params or self.params,
        )
        made.over = self.over
        self.siblings.append(made)
        return made

    async def end(self, forget: Callable[[EngineAgent], Awaitable[None]]) -> None:
        """The attempt is over for this agent and its siblings; `forget` ends what an engine holds
        of one."""
        everyone = [self, *self.siblings]
        for agent in everyone:
            agent.over = True
        for agent in everyone:
            await forget(agent)

    async def act(self, rollout: Rollout, tools: Sequence[ToolSchema] = ()) -> Message:
        """Sample the next MODEL message and append it.

        Raises:
            UserError: the task's own prompt leaves no room in the context.
            InfrastructureError: the engine failed, or took too long.
        """
        return await self._act(rollout, tools, self.params, alone=self.episode is None)

    async def act_within(
        self, rollout: Rollout, tools: Sequence[ToolSchema], bounds: Bounds
    ) -> Message:
        """`act`, where something else than the task decides what is in the prompt: one that leaves
        no room is answered with no token and `finish_reason` "context".

        Raises:
            InfrastructureError: as `act`.
        """
        most = self.params.max_new_tokens
        params = replace(
            self.params,
            stop=tuple(dict.fromkeys((*self.params.stop, *bounds.stop))),
            max_new_tokens=min(most, bounds.max_new_tokens or most),
        )
        return await self._act(rollout, tools, params, alone=False)

    async def _act(
        self,
        rollout: Rollout,
        tools: Sequence[ToolSchema],
        params: SamplingParams,
        *,
        alone: bool,
    ) -> Message:
        """
        Args:
            alone: nobody but the task has had a say in the first prompt.
        """
        if self.over:
            raise InfrastructureError("this attempt at the rollout has ended")
        prompt = self.renderer.prompt(rollout, tools)
        prompt_ids = prompt_token_ids(rollout, prompt)
        turn = len(rollout.model_messages)
        task_id = rollout.task.id if rollout.task else ""
        if alone and turn == 0 and len(prompt_ids) >= self.engine.context_limit:
            raise UserError(
                f"task {task_id}: the prompt has {len(prompt_ids)} tokens; "
                f"the context limit is {self.engine.context_limit}",
                "Shorten the prompt, or raise engine.context_limit if the model allows it.",
            )
        completion = await self._sample(
            GenerateRequest(
                prompt_ids,
                params,
                seed=request_seed(self.run_seed, self.epoch, self._of(task_id), self.sample, turn),
                session=rollout.id,
                group=self.group_id,
            )
        )
        entry = Turn(
            prompt,
            completion.token_ids,
            completion.logprobs,
            completion.versions,
            completion.finish_reason,
            rollout=rollout.id,
            place=len(rollout.messages),
        )
        message = self.renderer.message(completion.token_ids, tools)
        if entry.finish_reason in ("length", "context"):
            message = replace(message, tool_calls=())
        message = replace(message, turn=entry)
        rollout.add_messages(message)
        return message

    def _of(self, task_id: str) -> str:
        """What stands for the task in a seed: agents of one attempt draw numbers of their own."""
        return task_id if self.episode is None else f"{task_id}\0{self.rollout_id}"

    async def _sample(self, request: GenerateRequest) -> Completion:
        self.asked += 1
        try:
            async with asyncio.timeout(self.turn_timeout_s) as clock:
                completion = await self.engine.generate(request)
        except TimeoutError as error:
            if not clock.expired():
                raise
            late = InfrastructureError(
                f"the engine gave no turn within {self.turn_timeout_s:g} s (rollout.turn_timeout_s)"
            )
            late.kind = "engine"
            raise late from error
        except InfrastructureError as error:
            error.kind = error.kind or "engine"
            raise
        self.answered += 1
        return completion
