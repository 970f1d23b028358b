"""What `retrain doctor --engine URL` says of an inference server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator

from retrain.engines.base import SamplingParams
from retrain.engines.server.dialect import CAPABILITIES, GENERATE, Ask, Dialect, Facts, Malformed
from retrain.engines.server.http import Refused, Server, Unreachable
from retrain.engines.server.sglang import SGLang
from retrain.engines.server.vllm import VLLM

PROMPT = (3, 4, 5, 6)
"""Token ids that any vocabulary has."""

GREEDY = SamplingParams(max_new_tokens=4, temperature=0.0)

TRIED_S = 60.0

_FAILURES = (Unreachable, Refused, Malformed)


async def report(url: str) -> str:
    """What the server is, and what it can do, a line each.

    Raises:
        UserError: not a web address.
    """
    server = Server(url)
    try:
        met = await _meet(server)
        if met is None:
            return f"{url}: {await _why_not(server)}"
        return "\n".join([*_describe(url, met[1]), *[line async for line in _try(server, *met)]])
    finally:
        await server.close()


async def _meet(server: Server) -> tuple[Dialect, Facts] | None:
    """The dialect that a server speaks, and what it says in it."""
    dialects: tuple[Dialect, ...] = (VLLM(), SGLang())
    for dialect in dialects:
        try:
            facts = await dialect.facts(server)
        except _FAILURES:
            continue
        if facts.can[GENERATE]:
            return dialect, facts
    return None


async def _why_not(server: Server) -> str:
    try:
        await server.get("/health", 10.0)
    except Unreachable as error:
        return f"cannot be reached: {error}"
    except Refused:
        pass
    return (
        "something answers, but neither as vLLM nor as SGLang; if it is an OpenAI-compatible "
        "endpoint, it can play a user (environment.user.type: openai), but not be a policy engine"
    )


def _describe(url: str, facts: Facts) -> Iterator[str]:
    limit = "unknown" if facts.context_limit is None else str(facts.context_limit)
    yield f"{url}: {facts.server} {facts.version}"
    yield f"  model: {facts.model}; context limit: {limit} tokens"
    for name in CAPABILITIES:
        outcome = "yes" if facts.can[name] else f"no: {facts.advice[name]}"
        yield f"  {name}: {outcome}"


async def _try(server: Server, dialect: Dialect, facts: Facts) -> AsyncIterator[str]:
    """Sample a few tokens, and have the server score what it sampled."""
    try:
        async with asyncio.timeout(TRIED_S):
            ask = Ask(facts.model, PROMPT, GREEDY, GREEDY.max_new_tokens, 0)
            answer = await dialect.generate(server, ask)
            yield f"  tried: {len(answer.token_ids)} tokens sampled, with log-probabilities"
            scored = await dialect.score(server, facts.model, [*PROMPT, *answer.token_ids])
    except TimeoutError:
        yield f"  tried: no answer within {TRIED_S:g} s; it may be paused, or hang"
    except _FAILURES as error:
        yield f"  tried: {error}"
    else:
        pairs = zip(answer.logprobs, scored[len(PROMPT) :], strict=True)
        gap = max((abs(a - b) for a, b in pairs), default=math.nan)
        yield f"  its own scores of them differ by up to {gap:.1e} nats"
