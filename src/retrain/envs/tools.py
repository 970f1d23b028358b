"""The tool environment: the policy may call tools until it answers without a call."""

from __future__ import annotations

from collections.abc import Sequence

from retrain.envs.base import Environment, Step
from retrain.rendering import Renderer, ToolSchema
from retrain.tools import Tool, ToolResult, ToolRunner, tool_schema
from retrain.types import Message, MessageType, Rollout, Task

TOOLS_OFF = "The tools are switched off."


class ToolEnvironment(Environment):
    """A multi-turn conversation with tools (`type: smolagent`).

    Several calls in one turn run at the same time; their results come back in the order of the
    calls. Every failure of a call is shown to the policy, and counted in the rollout's metrics as
    `tool_calls/<status>`; `tool_calls` counts them all, and is 0 where none was made.

    Args:
        tools: what may be called.
        renderer: writes results so that they cannot forge the policy's own words.
        max_steps: most MODEL turns.
        timeout_s, retries, max_output_chars: of one call, see `ToolRunner`.
        describe_tools: open with a system message about the tools and how to call them.
        enabled: False answers every call with `TOOLS_OFF`.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        renderer: Renderer,
        *,
        max_steps: int = 10,
        timeout_s: float = 30.0,
        retries: int = 2,
        max_output_chars: int = 4000,
        describe_tools: bool = False,
        enabled: bool = True,
    ) -> None:
        self.tools = tuple(tools)
        self.renderer = renderer
        self.max_steps = max_steps
        self.timeout_s = timeout_s
        self.retries = retries
        self.max_output_chars = max_output_chars
        self.enabled = enabled
        self._schemas = tuple(tool_schema(tool) for tool in self.tools)
        self._about = ""
        if describe_tools and renderer.tool_format is not None:
            self._about = renderer.tool_format.describe(self._schemas)
        self._runner: ToolRunner | None = None

    @property
    def tool_schemas(self) -> Sequence[ToolSchema]:
        return self._schemas

    def opening(self, task: Task) -> Sequence[Message]:
        return _with_system(task.prompt, self._about) if self._about else task.prompt

    async def reset(self, task: Task) -> Sequence[Message]:
        self._runner = ToolRunner(
            self.tools,
            timeout_s=self.timeout_s,
            retries=self.retries,
            max_output_chars=self.max_output_chars,
        )
        return self.opening(task)

    async def step(self, rollout: Rollout, message: Message) -> Step:
        if self.tools:
            made = rollout.metrics.get("tool_calls", 0.0)
            rollout.metrics["tool_calls"] = made + len(message.tool_calls)
        if not message.tool_calls:
            return Step(stop="answered")
        results = await self._call(message)
        for result in results:
            key = f"tool_calls/{result.status}"
            rollout.metrics[key] = rollout.metrics.get(key, 0.0) + 1.0
            rollout.metrics["seconds/tools"] = (
                rollout.metrics.get("seconds/tools", 0.0) + result.wall_s
            )
        return Step([self.renderer.tool_message(r.text, r.call.name, r.call.id) for r in results])

    async def finish(self, rollout: Rollout) -> None:
        if self._runner is not None:
            await self._runner.aclose()

    async def _call(self, message: Message) -> list[ToolResult]:
        if not self.enabled:
            return [ToolResult(call, TOOLS_OFF, "tool_error") for call in message.tool_calls]
        assert self._runner is not None
        return await self._runner.run(message.tool_calls)


def _with_system(prompt: Sequence[Message], text: str) -> list[Message]:
    if prompt and prompt[0].type is MessageType.SYSTEM:
        first = Message(f"{prompt[0].content}\n\n{text}", MessageType.SYSTEM)
        return [first, *prompt[1:]]
    return [Message(text, MessageType.SYSTEM), *prompt]
