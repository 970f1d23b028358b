"""The tool environment: the policy may call tools until it answers without a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from retrain.envs.base import Environment, Step
from retrain.importing import suggest
from retrain.rendering import Renderer, ToolSchema
from retrain.tools import Tool, ToolResult, ToolRunner, close_tools, tool_schema
from retrain.types import Message, MessageType, Rollout, Task, UserError

TOOLS_OFF = "The tools are switched off."


class ToolEnvironment(Environment):
    """A multi-turn conversation with tools (`type: smolagent`).

    Several calls in one turn run at the same time; their results come back in the order of the
    calls. Every failure of a call is shown to the policy. A rollout's metrics count its calls:
    `tool_calls` all of them (0 where none was made), `tool_calls/<status>`, and for each tool
    `tool/<name>/<status>`; figures that tools give with their results are added up.

    Args:
        tools: what may be called; the environment closes them.
        renderer: writes results so that they cannot forge the policy's own words.
        max_steps: most MODEL turns.
        timeout_s, retries, max_output_chars: of one call, see `ToolRunner`.
        max_calls, max_calls_of: of a rollout, in all and of a tool by its name; a call beyond it is
            answered with that.
        tools_column: the metadata column that lists the names of a task's own tools; None gives
            every task all of them.
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
        max_calls: int | None = None,
        max_calls_of: Mapping[str, int] | None = None,
        tools_column: str | None = None,
        describe_tools: bool = False,
        enabled: bool = True,
    ) -> None:
        self.tools = tuple(tools)
        self.renderer = renderer
        self.max_steps = max_steps
        self.timeout_s = timeout_s
        self.retries = retries
        self.max_output_chars = max_output_chars
        self.max_calls = max_calls
        self.max_calls_of = dict(max_calls_of or {})
        self.tools_column = tools_column
        self.describe_tools = describe_tools and renderer.tool_format is not None
        self.enabled = enabled
        self._runner: ToolRunner | None = None

    def tools_of(self, task: Task) -> Sequence[Tool]:
        """The tools of a task, in the environment's order.

        Raises:
            UserError: its column does not list names of tools.
        """
        if self.tools_column is None:
            return self.tools
        names = task.metadata.get(self.tools_column)
        known = [tool.name for tool in self.tools]
        if not isinstance(names, list | tuple):
            raise UserError(
                f"task {task.id}: column {self.tools_column!r} must list names of tools, "
                f"got {names!r}",
                f"Tools: {', '.join(known)}.",
            )
        for name in names:
            if name not in known:
                raise UserError(
                    f"task {task.id}: column {self.tools_column!r} names {name!r}, "
                    "which is no tool of the environment",
                    suggest(str(name), known, "tools"),
                )
        return [tool for tool in self.tools if tool.name in names]

    def tools_for(self, task: Task) -> Sequence[ToolSchema]:
        return [tool_schema(tool) for tool in self.tools_of(task)]

    def opening(self, task: Task) -> Sequence[Message]:
        if not self.describe_tools or not self.tools_of(task):
            return task.prompt
        assert self.renderer.tool_format is not None
        about = self.renderer.tool_format.describe(self.tools_for(task))
        return with_system(task.prompt, about) if about else task.prompt

    async def reset(self, task: Task) -> Sequence[Message]:
        self._runner = ToolRunner(
            self.tools_of(task),
            timeout_s=self.timeout_s,
            retries=self.retries,
            max_output_chars=self.max_output_chars,
            max_calls=self.max_calls,
            max_calls_of=self.max_calls_of,
        )
        return self.opening(task)

    async def step(self, rollout: Rollout, message: Message) -> Step:
        if self.tools:
            _add(rollout, "tool_calls", len(message.tool_calls))
        if not message.tool_calls:
            return Step(stop="answered")
        results = await self._call(message)
        for result in results:
            self._count(rollout, result)
        return Step([self.renderer.tool_message(r.text, r.call.name, r.call.id) for r in results])

    async def finish(self, rollout: Rollout) -> None:
        if self._runner is not None:
            await self._runner.aclose()

    async def close(self) -> None:
        await close_tools(self.tools)

    def _count(self, rollout: Rollout, result: ToolResult) -> None:
        _add(rollout, f"tool_calls/{result.status}", 1.0)
        _add(rollout, "seconds/tools", result.wall_s)
        if any(tool.name == result.call.name for tool in self.tools):
            _add(rollout, f"tool/{result.call.name}/{result.status}", 1.0)
        for name, value in result.metrics.items():
            _add(rollout, name, value)

    async def _call(self, message: Message) -> list[ToolResult]:
        if not self.enabled:
            return [ToolResult(call, TOOLS_OFF, "tool_error") for call in message.tool_calls]
        assert self._runner is not None
        return await self._runner.run(message.tool_calls)


def _add(rollout: Rollout, name: str, value: float) -> None:
    rollout.metrics[name] = rollout.metrics.get(name, 0.0) + value


def with_system(prompt: Sequence[Message], text: str) -> list[Message]:
    """A conversation whose system message goes on with a text, or begins with it."""
    if prompt and prompt[0].type is MessageType.SYSTEM:
        first = Message(f"{prompt[0].content}\n\n{text}", MessageType.SYSTEM)
        return [first, *prompt[1:]]
    return [Message(text, MessageType.SYSTEM), *prompt]
