"""The calculator's agent written in other frameworks, on a model that the recipe own_agent made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from gateways import Observed
from retrain.config.formats import TagsFormat
from retrain.config.model import ModelConfig
from retrain.engines.base import SamplingParams
from retrain.gateway.recorder import Recorder
from retrain.gateway.seats import Seats
from retrain.gateway.server import GatewayServer
from retrain.loops.players import codec_of, make_renderer
from retrain.models import load_policy
from retrain.recipes.own_agent.agent import SYSTEM, calculate
from retrain.recipes.own_agent.tasks import questions
from retrain.rollout.agent import EngineAgent
from retrain.types import Rollout, Task


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: to compute.
    """
    try:
        return str(calculate(expression))
    except Exception as error:
        return f"error: {type(error).__name__}"


async def langgraph(place: dict[str, str], question: str) -> str:
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    model = ChatOpenAI(model="any", **place)
    agent = create_react_agent(model, [calculator], prompt=SYSTEM)
    state = await agent.ainvoke({"messages": [("user", question)]}, {"recursion_limit": 8})
    return str(state["messages"][-1].content)


async def agents_sdk(place: dict[str, str], question: str) -> str:
    import agents
    from openai import AsyncOpenAI

    agents.set_tracing_disabled(True)
    async with AsyncOpenAI(**place) as client:
        agent = agents.Agent(
            name="calculating",
            instructions=SYSTEM,
            model=agents.OpenAIChatCompletionsModel("any", client),
            tools=[agents.function_tool(calculator)],
        )
        return str((await agents.Runner.run(agent, question, max_turns=4)).final_output)


AGENTS: dict[str, Callable[[dict[str, str], str], Awaitable[str]]] = {
    "langgraph": langgraph,
    "agents_sdk": agents_sdk,
}


def equal_to_what_was_sampled(rollout: Rollout, engine: Observed, before: int) -> int:
    """How many of the engine's answers the ledger holds; each with its prompt."""
    count = 0
    seen: list[Any] = engine.seen[before:]
    for index, segment in enumerate(rollout.segments):
        full = list(rollout.full_token_ids(index))
        for span in segment.turns:
            start, end = segment.prefix_len + span.start, segment.prefix_len + span.end
            prompt, completion = seen[count]
            assert (full[:start], full[start:end]) == (prompt, list(completion.token_ids))
            assert segment.logprobs[span.start : span.end] == completion.logprobs
            count += 1
    return count


async def share_right(checkpoint: Path, framework: str, count: int) -> float:
    """Success on held-out questions; every rollout is held against what the engine did."""
    policy = load_policy(ModelConfig(name_or_path=str(checkpoint)), seed=0)
    form = TagsFormat(
        tool_start="<call>", tool_end="</call>", response_start="<result>", response_end="</result>"
    )
    renderer = make_renderer(codec_of(policy), policy.tokenizer, form)
    engine = Observed(policy.model, tokenizer=policy.tokenizer, num_threads=1)
    seats = Seats()
    server = GatewayServer(seats)
    await server.start()
    right = 0
    try:
        for number, row in enumerate(questions("test", count)):
            task = Task(str(number), ())
            agent = EngineAgent(engine, renderer, SamplingParams(18), 0, 0, 0, f"r{number}")
            recorder = Recorder(agent, task, renderer, describe_tools=False)
            seat = seats.open(recorder)
            place = {"base_url": f"{server.url}/sessions/{seat.name}/v1", "api_key": seat.key}
            before = len(engine.seen)
            try:
                right += await AGENTS[framework](place, row["prompt"]) == row["answer"]
            except Exception as error:  # it loops, or calls what is not there: the model's fault
                assert recorder.failed is None, error
            seats.close(seat.name)
            rollout = agent.start(task)
            recorder.enter(rollout)
            found = equal_to_what_was_sampled(rollout, engine, before)
            assert found == recorder.turns == len(engine.seen) - before > 0
            await engine.end_session(f"r{number}")
    finally:
        await server.close()
        await engine.close()
    return right / count
