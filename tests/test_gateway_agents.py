"""Agents of other packages, unmodified, on a policy whose next tokens are prescribed.

Each calls a tool, reads its result and answers. Whatever they make of the conversation when they
send it again, the ledger holds what the engine saw and sampled.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateways import scripted_gateway
from retrain.types import MessageType, Rollout
from scripted import native_renderer, plain_renderer

END = "<|im_end|>"


def call(name: str, **arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>{END}"


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def said(rollout: Rollout) -> list[str]:
    return [rollout.messages[i].content for i in rollout.model_messages]


def heard(rollout: Rollout) -> str:
    texts = (m.content for m in rollout.messages if m.type is not MessageType.MODEL)
    return "\n".join(texts)


@pytest.mark.parametrize("template", ["chatml", "qwen3"])
async def test_smolagents_tool_calling_agent(template: str) -> None:
    """It writes its calls down as text when it sends them again: forks, as they should be."""
    import smolagents

    turns = [call("add", a=2, b=3), call("final_answer", answer="5")]
    async with scripted_gateway(native_renderer(template), turns) as place:

        def work() -> Any:
            model = smolagents.OpenAIModel(
                "policy", api_base=place.openai["base_url"], api_key=place.key
            )
            tools = [smolagents.tool(add)]
            agent = smolagents.ToolCallingAgent(tools, model, verbosity_level=0)
            return agent.run("What is 2 + 3?")

        assert await asyncio.to_thread(work) == "5"
        rollout = place.rollout()
        assert len(said(rollout)) == 2 and "Observation:\n5" in heard(rollout)
        assert rollout.num_forks == 1 and rollout.segments[1].prefix_len > 100


async def test_smolagents_code_agent() -> None:
    """It puts the closing tag back that ended the answer: that is what was sampled."""
    import smolagents

    turns = [
        "Thought: add.\n<code>\nx = add(2, 3)\nprint(x)\n</code>",
        "<code>\nfinal_answer(x)\n</code>",
    ]
    async with scripted_gateway(plain_renderer("chatml"), turns) as place:

        def work() -> Any:
            model = smolagents.OpenAIModel(
                "policy", api_base=place.openai["base_url"], api_key=place.key
            )
            agent = smolagents.CodeAgent([smolagents.tool(add)], model, verbosity_level=0)
            return agent.run("What is 2 + 3?")

        assert await asyncio.to_thread(work) == 5
        rollout = place.rollout()
        assert "Execution logs:\n5" in heard(rollout)
        assert len(rollout.segments) == 1, "one conversation, token for token"


@pytest.mark.parametrize("streaming", [False, True])
async def test_langgraph(streaming: bool) -> None:
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    turns = [call("add", a=2, b=3), f"It is 5.{END}"]
    async with scripted_gateway(native_renderer("chatml"), turns) as place:
        model = ChatOpenAI(model="policy", **place.openai, streaming=streaming)
        agent = create_react_agent(model, [add])
        state = await agent.ainvoke({"messages": [("user", "What is 2 + 3?")]})
        assert state["messages"][-1].content == "It is 5."
        rollout = place.rollout()
        assert len(rollout.segments) == 1 and rollout.messages[2].content == "5"


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("streaming", [False, True])
async def test_openai_agents_sdk(api: str, streaming: bool) -> None:
    import agents
    from openai import AsyncOpenAI

    turns = [call("add", a=2, b=3), f"It is 5.{END}"]
    async with scripted_gateway(native_renderer("chatml"), turns) as place:
        client = AsyncOpenAI(**place.openai)
        kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
        agents.set_tracing_disabled(True)
        agent = agents.Agent(
            name="adder",
            instructions="Use the tool.",
            model=kind("policy", client),
            tools=[agents.function_tool(add)],
        )
        if streaming:
            result: Any = agents.Runner.run_streamed(agent, "What is 2 + 3?")
            async for _ in result.stream_events():
                pass
        else:
            result = await agents.Runner.run(agent, "What is 2 + 3?")
        assert result.final_output == "It is 5."
        rollout = place.rollout()
        assert len(rollout.segments) == 1 and rollout.messages[-2].content == "5"


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_pydantic_ai(api: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    turns = [call("add", a=2, b=3), f"It is 5.{END}"]
    async with scripted_gateway(native_renderer("chatml"), turns) as place:
        kind = OpenAIChatModel if api == "chat" else OpenAIResponsesModel
        agent = Agent(
            kind("policy", provider=OpenAIProvider(**place.openai)), instructions="Use the tool."
        )
        agent.tool_plain(add)
        result = await agent.run("What is 2 + 3?")
        assert result.output == "It is 5."
        rollout = place.rollout()
        assert len(rollout.segments) == 1 and rollout.messages[-2].content == "5"


async def test_the_anthropic_sdk_runs_tools_itself() -> None:
    from anthropic import AsyncAnthropic, beta_async_tool

    @beta_async_tool
    async def add(a: int, b: int) -> str:
        """Add two numbers.

        Args:
            a: the first.
            b: the second.
        """
        return str(a + b)

    turns = [f"Let me see. {call('add', a=2, b=3)}", f"It is 5.{END}"]
    async with scripted_gateway(native_renderer("chatml"), turns) as place:
        async with AsyncAnthropic(api_key=place.key, base_url=place.url) as client:
            runner = client.beta.messages.tool_runner(
                model="policy",
                max_tokens=50,
                tools=[add],
                messages=[{"role": "user", "content": "What is 2 + 3?"}],
            )
            message = await runner.until_done()
        assert message.content[0].text == "It is 5."
        rollout = place.rollout()
        assert len(rollout.segments) == 1 and rollout.messages[-2].content == "5"


async def test_pydantic_ai_with_a_structured_output() -> None:
    """Its output is a call of a tool of its own."""
    from pydantic import BaseModel
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Sum(BaseModel):
        value: int

    turns = [call("add", a=2, b=3), call("final_result", value=5)]
    async with scripted_gateway(native_renderer("chatml"), turns) as place:
        model = OpenAIChatModel("policy", provider=OpenAIProvider(**place.openai))
        agent = Agent(model, output_type=Sum)
        agent.tool_plain(add)
        assert (await agent.run("What is 2 + 3?")).output == Sum(value=5)
        assert len(place.rollout().segments) == 1
