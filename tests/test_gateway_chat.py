"""OpenAI's own client against the gateway: every field that it parses."""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletion

from answering import QUESTION, TOOL, Prescribed, client, said, serving


async def test_an_answer_has_all_that_the_client_reads() -> None:
    choice = said(
        None,
        calls=[("c1", "add", '{"a": 2}'), ("c2", "add", '{"a": 3}')],
        reasoning="Both at once.",
        tokens=[("ad", -0.5), ("d", -0.25)],
    )
    async with serving(Prescribed(choice)) as (server, _):
        answer = await client(server).chat.completions.create(
            model="m", messages=QUESTION, tools=[TOOL], n=2, logprobs=True
        )
    assert isinstance(answer, ChatCompletion)
    assert answer.id.startswith("chatcmpl-") and answer.model == "m"
    assert [c.index for c in answer.choices] == [0, 1]
    first = answer.choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None and first.message.refusal is None
    assert first.message.reasoning_content == "Both at once."
    calls = [
        (c.id, c.type, c.function.name, c.function.arguments) for c in first.message.tool_calls
    ]
    assert calls == [("c1", "function", "add", '{"a": 2}'), ("c2", "function", "add", '{"a": 3}')]
    tokens = [(t.token, t.bytes, t.logprob, t.top_logprobs) for t in first.logprobs.content]
    assert tokens == [("ad", [97, 100], -0.5, []), ("d", [100], -0.25, [])]
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (11, 7, 18)
    assert usage.prompt_tokens_details.cached_tokens == 4


async def test_what_was_not_asked_for_is_not_in_the_answer() -> None:
    async with serving(Prescribed(said(tokens=[("It", -1.0)]))) as (server, _):
        answer = await client(server).chat.completions.create(model="m", messages=QUESTION)
    message = answer.choices[0].message
    assert message.content == "It is five." and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert message.tool_calls is None and not hasattr(message, "reasoning_content")


async def test_the_session_gets_what_was_asked() -> None:
    session = Prescribed()
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, TEXT]},
        {"role": "user", "content": "2 + 3?", "name": "ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    ]
    async with serving(session) as (server, _):
        await client(server).chat.completions.create(
            model="m",
            messages=messages,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "add"}},
            parallel_tool_calls=False,
            stop="\n",
            max_tokens=9,
            max_completion_tokens=7,
            logprobs=True,
            top_logprobs=2,
            temperature=0.5,
            seed=3,
            response_format={"type": "json_object"},
            user="u",
            metadata={"a": "b"},
            store=True,
            extra_body={"top_k": 4, "something_else": [1]},
        )
    (ask,) = session.asks
    assert ask.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 3?", "name": "ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    )
    assert ask.tools == (TOOL,) and ask.tool_choice == "tool:add"
    assert not ask.parallel_tool_calls and ask.stop == ("\n",) and ask.max_tokens == 7
    assert ask.logprobs and ask.n == 1 and ask.model == "m"
    assert not ask.stream and not ask.retried
    assert ask.sampling == {
        "temperature": 0.5,
        "seed": 3,
        "top_logprobs": 2,
        "top_k": 4,
        "something_else": [1],
        "response_format": {"type": "json_object"},
    }


TEXT = {"type": "text", "text": "brief."}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


async def test_a_stream_says_the_same_in_pieces() -> None:
    tokens = [("It", -0.5), (" is", -0.25), (" five", -1.0), (".", -2.0)]
    choice = said(
        "It is five.",
        calls=[("c1", "add", '{"a": 2, "b": 3}'), ("c2", "add", "{}")],
        reasoning="Two and three.",
        tokens=tokens,
    )
    async with serving(Prescribed(choice)) as (server, _):
        stream = await client(server).chat.completions.create(
            model="m",
            messages=QUESTION,
            n=2,
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert {c.object for c in chunks} == {"chat.completion.chunk"} and len(
        {c.id for c in chunks}
    ) == 1
    *spoken, counts = chunks
    assert counts.choices == [] and counts.usage.total_tokens == 18
    assert all(chunk.usage is None for chunk in spoken)
    assert [chunk.choices[0].index for chunk in spoken] == [0, 1] * (len(spoken) // 2)
    mine = [chunk.choices[0] for chunk in spoken if chunk.choices[0].index == 1]
    assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
    contents = [c.delta.content for c in mine if c.delta.content]
    assert contents == ["It", " is", " five."]
    reasoning = [getattr(c.delta, "reasoning_content", "") for c in mine]
    assert "".join(reasoning) == "Two and three."
    calls = [call for c in mine for call in c.delta.tool_calls or ()]
    assert [(c.id, c.function.name, c.index) for c in calls if c.id] == [
        ("c1", "add", 0),
        ("c2", "add", 1),
    ]
    assert "".join(c.function.arguments for c in calls if c.index == 0) == '{"a": 2, "b": 3}'
    assert "".join(c.function.arguments for c in calls if c.index == 1) == "{}"
    shares = [[t.logprob for t in c.logprobs.content] for c in mine if c.logprobs]
    assert shares == [[-0.5], [-0.25], [-1.0, -2.0]]
    assert [c.finish_reason for c in mine if c.finish_reason] == ["tool_calls"]
    assert mine[-1].finish_reason == "tool_calls"


async def test_the_log_probabilities_of_mere_calls_end_the_stream() -> None:
    choice = said(None, calls=[("c1", "add", "{}")], tokens=[("x", -0.5)])
    async with serving(Prescribed(choice)) as (server, _):
        stream = await client(server).chat.completions.create(
            model="m", messages=QUESTION, logprobs=True, stream=True
        )
        chunks = [chunk.choices[0] async for chunk in stream]
    assert chunks[0].delta.content is None
    assert [t.logprob for t in chunks[-1].logprobs.content] == [-0.5]


async def test_the_client_puts_a_stream_together() -> None:
    choice = said("Let me see.", calls=[("c1", "add", '{"a": 2}')])
    async with (
        serving(Prescribed(choice)) as (server, _),
        client(server).chat.completions.stream(model="m", messages=QUESTION) as stream,
    ):
        whole = await stream.get_final_completion()
    message = whole.choices[0].message
    assert message.content == "Let me see."
    assert message.tool_calls[0].function.arguments == '{"a": 2}'
    assert whole.choices[0].finish_reason == "tool_calls"


async def test_the_synchronous_client_reads_both() -> None:
    def ask(url: str) -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as sync:
            create = sync.chat.completions.create
            whole = create(model="m", messages=QUESTION).choices[0].message.content
            stream = create(model="m", messages=QUESTION, stream=True)
            return whole, "".join(c.choices[0].delta.content or "" for c in stream)

    async with serving(Prescribed()) as (server, _):
        whole, streamed = await asyncio.to_thread(ask, server.url)
    assert whole == streamed == "It is five."


async def test_a_second_attempt_says_so() -> None:
    session = Prescribed()
    async with serving(session) as (server, _):
        headers = {"x-stainless-retry-count": "1"}
        await client(server).chat.completions.create(
            model="m", messages=QUESTION, extra_headers=headers
        )
        await client(server).chat.completions.create(model="m", messages=QUESTION)
    assert [ask.retried for ask in session.asks] == [True, False]


@pytest.mark.parametrize("words, pieces", [(1, 2), (31, 32), (32, 17), (1000, 32)])
async def test_long_answers_come_in_few_pieces(words: int, pieces: int) -> None:
    text = "\n ".join(f"w{i}" for i in range(words)) + " \n"
    async with serving(Prescribed(said(text))) as (server, _):
        stream = await client(server).chat.completions.create(
            model="m", messages=QUESTION, stream=True
        )
        contents = [chunk.choices[0].delta.content async for chunk in stream]
    assert "".join(content or "" for content in contents) == text
    assert len([content for content in contents if content]) == pieces
