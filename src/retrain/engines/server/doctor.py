"""What `retrain doctor --engine URL` says of an inference server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

from retrain.engines.base import SamplingParams
from retrain.engines.server.dialect import (
    CAPABILITIES,
    FULL,
    GENERATE,
    INTERRUPT,
    LORA,
    Ask,
    Dialect,
    Facts,
    Malformed,
)
from retrain.engines.server.http import Refused, Server, Unreachable
from retrain.engines.server.sglang import SGLang
from retrain.engines.server.vllm import VLLM

PROMPT = (3, 4, 5, 6)
"""Token ids that any vocabulary has."""

SAME = 1e-3
"""Nats; two log-probabilities that are nearer than that do not differ."""

TRIED_S = 60.0

_FAILURES = (Unreachable, Refused, Malformed)


async def report(url: str) -> tuple[str, bool]:
    """What the server is, and what it can do, a line each; and whether it can train a policy.

    Raises:
        UserError: not a web address.
    """
    server = Server(url)
    try:
        met = await _meet(server)
        if met is None:
            return f"{url}: {await _why_not(server)}", False
        dialect, facts = met
        good, tried = await _try(server, dialect, facts)
        good &= facts.can[INTERRUPT] and (facts.can[FULL] or facts.can[LORA])
        verdict = "can be an engine" if good else "cannot be an engine as it is"
        return "\n".join([*_describe(url, facts), *tried, f"  {verdict}"]), good
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
    dtype = facts.dtype or "unknown"
    yield f"  model: {facts.model}; context limit: {limit} tokens; dtype: {dtype}"
    for name in CAPABILITIES:
        outcome = "yes" if facts.can[name] else f"no: {facts.advice[name]}"
        yield f"  {name}: {outcome}"


async def _try(server: Server, dialect: Dialect, facts: Facts) -> tuple[bool, list[str]]:
    """Sample a few tokens, and have the server score what it sampled: the scores are at temperature
    1, so what is sampled at another has to differ from them."""
    lines: list[str] = []
    gaps: dict[float, float] = {}
    try:
        async with asyncio.timeout(TRIED_S):
            for temperature in (1.0, 0.5):
                params = SamplingParams(max_new_tokens=8, temperature=temperature)
                ask = Ask(facts.model, PROMPT, params, params.max_new_tokens, 0)
                answer = await dialect.generate(server, ask)
                found = [*PROMPT, *answer.token_ids]
                scored = (await dialect.score(server, facts.model, found))[len(PROMPT) :]
                pairs = zip(answer.logprobs, scored, strict=True)
                gaps[temperature] = max((abs(a - b) for a, b in pairs), default=math.nan)
    except TimeoutError:
        lines.append(f"  tried: no answer within {TRIED_S:g} s; it may be paused, or hang")
    except _FAILURES as error:
        lines.append(f"  tried: {error}")
    else:
        lines.append(f"  tried: its own scores of what it sampled differ by {gaps[1.0]:.1e} nats")
        after = gaps[0.5] > 10 * gaps[1.0] + SAME
        advice = "yes" if after else "no: start vLLM with --logprobs-mode processed_logprobs"
        lines.append(f"  log-probabilities after temperature: {advice}")
        return after, lines
    return False, lines
