"""Teachers behind HTTP: vLLM's prompt log-probabilities, SGLang's input log-probabilities."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from retrain.engines.openai.transport import PASSING, wait_s
from retrain.engines.server.dialect import GENERATE, Dialect, Facts, Malformed
from retrain.engines.server.http import Refused, Server
from retrain.engines.server.sglang import SGLang
from retrain.engines.server.vllm import VLLM
from retrain.teachers.base import Top
from retrain.types import InfrastructureError, UserError

T = TypeVar("T")

BACKOFF_S = 1.0
"""Before the first retry; it doubles with each."""

_PROBE = (0, 1)
"""Token ids that every vocabulary has."""

_ROOM = 1
"""Tokens that a server has to have room for after the prompt."""


class Rows(Protocol):
    """Asks a server for the likeliest tokens at each place of a prompt."""

    async def __call__(
        self, server: Server, model: str, token_ids: Sequence[int], k: int
    ) -> list[list[tuple[float, int]]]:
        """(log-probability, token id), at least `k` of each token but the first [T - 1].

        Raises:
            Malformed: the answer is none.
        """
        ...


async def vllm_rows(
    server: Server, model: str, token_ids: Sequence[int], k: int
) -> list[list[tuple[float, int]]]:
    body = {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": _ROOM,
        "temperature": 0.0,
        "prompt_logprobs": k,
    }
    answer = await server.post("/v1/completions", body)
    try:
        rows = answer["choices"][0]["prompt_logprobs"]
        return [
            [(float(entry["logprob"]), int(token)) for token, entry in row.items()]
            for row in rows[1:]
        ]
    except (KeyError, TypeError, IndexError, ValueError, AttributeError):
        raise Malformed(f"{server.url} gave no prompt log-probabilities") from None


async def sglang_rows(
    server: Server, model: str, token_ids: Sequence[int], k: int
) -> list[list[tuple[float, int]]]:
    body = {
        "input_ids": list(token_ids),
        "sampling_params": {"max_new_tokens": _ROOM, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
    }
    answer = await server.post("/generate", body)
    try:
        rows = answer["meta_info"]["input_top_logprobs"]
        return [[(float(entry[0]), int(entry[1])) for entry in row] for row in rows[1:]]
    except (KeyError, TypeError, IndexError, ValueError):
        raise Malformed(f"{server.url} gave no input log-probabilities") from None


DIALECTS: dict[str, tuple[Dialect, Rows]] = {
    "vllm": (VLLM(), vllm_rows),
    "sglang": (SGLang(), sglang_rows),
}


class ServerTeacher:
    """A model on a server that runs already. It scores at temperature 1 only: vLLM and SGLang give
    a prompt's log-probabilities before temperature.

    Args:
        kind: `vllm` or `sglang`.
        model: as the server names it; None asks for the first that it lists. Of vLLM only.
        api_key: sent as a bearer token; it appears in no message of ours.
        timeout_s: of one attempt, its turn not included.
        retries: further attempts where the connection fails, the time runs out, the answer is none
            of this protocol, or the server says 408, 409, 425, 429 or 5xx.
        max_concurrency: most requests under way.
        vocab_size: ids from here on are never among the likeliest.
        where: what errors call the teacher: the place in the config that it comes from.

    Raises:
        UserError: the address cannot be one.
    """

    def __init__(
        self,
        kind: str,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        retries: int = 3,
        backoff_s: float = BACKOFF_S,
        max_concurrency: int = 32,
        vocab_size: int | None = None,
        where: str = "the teacher",
    ) -> None:
        self._dialect, self._rows = DIALECTS[kind]
        self._server = Server(url, api_key=api_key, where=where)
        self._model = model
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._turns = asyncio.Semaphore(max_concurrency)
        self._vocab_size = vocab_size
        self._where = where
        self._limit: int | None = None
        self._prepared = False

    @property
    def context_limit(self) -> int | None:
        return self._limit

    async def prepare(self, temperature: float = 1.0) -> None:
        """Ask the server what it is.

        Raises:
            UserError: it cannot be reached, is no server of this kind, serves another model, or
                was asked for another temperature than 1.
        """
        self._check_temperature(temperature)
        if self._prepared:
            return
        try:
            facts = await self._until_answered(lambda: self._dialect.facts(self._server))
            self._check(facts)
            model = self._model = self._model or facts.model
            await self._until_answered(lambda: self._dialect.score(self._server, model, _PROBE))
        except InfrastructureError as error:
            raise UserError(
                f"{self._where}: {self._server.url} is no {self._dialect.name} server that can be "
                f"used: {error}",
                f"retrain doctor --engine {self._server.url} says what it is.",
            ) from error
        if facts.context_limit is not None:
            self._limit = facts.context_limit - _ROOM
        self._prepared = True

    async def score(
        self, token_ids: Sequence[int], temperature: float = 1.0, *, start: int = 1
    ) -> array[float]:
        """See `Teacher.score`; float32 as the server sends it."""
        await self.prepare(temperature)
        self._check_length(token_ids)
        if len(token_ids) <= max(start, 1):
            return array("d", bytes(8 * len(token_ids)))
        model = str(self._model)
        scored = await self._until_answered(
            lambda: self._dialect.score(self._server, model, token_ids)
        )
        return array("d", bytes(8 * start)) + array("d", scored[start:])

    async def top(
        self, token_ids: Sequence[int], k: int, temperature: float = 1.0, *, start: int = 1
    ) -> Top:
        """See `Teacher.top`. Ids that only pad the embedding are left out: the row then has fewer
        than `k`."""
        await self.prepare(temperature)
        self._check_length(token_ids)
        top = Top.empty(len(token_ids), k)
        if len(token_ids) <= max(start, 1):
            return top
        model = str(self._model)
        rows = await self._until_answered(lambda: self._asked(model, token_ids, k))
        for position in range(max(start, 1), len(token_ids)):
            likeliest = sorted(rows[position - 1], key=lambda entry: (-entry[0], entry[1]))[:k]
            known = [e for e in likeliest if self._vocab_size is None or e[1] < self._vocab_size]
            top.ids[position, : len(known)] = [token for _, token in known]
            top.logprobs[position, : len(known)] = [logprob for logprob, _ in known]
        return top

    async def close(self) -> None:
        await self._server.close()

    async def _asked(
        self, model: str, token_ids: Sequence[int], k: int
    ) -> list[list[tuple[float, int]]]:
        rows = await self._rows(self._server, model, token_ids, k)
        if len(rows) != len(token_ids) - 1 or any(len(row) < k for row in rows):
            raise Malformed(f"{self._server.url} gave fewer than {k} tokens of each place")
        return rows

    async def _until_answered(self, ask: Callable[[], Awaitable[T]]) -> T:
        """
        Raises:
            InfrastructureError: there is still no answer after the last retry.
            UserError: the server refuses the request as such.
        """
        attempt = 1
        while True:
            try:
                async with self._turns, asyncio.timeout(self._timeout_s):
                    return await ask()
            except TimeoutError:
                problem = f"no answer within {self._timeout_s:g} s"
            except Refused as error:
                problem = self._shown(error)
                if error.status < 500 and error.status not in PASSING:
                    raise UserError(f"{self._where}: {problem}", self._advice(error)) from None
            except InfrastructureError as error:
                problem = self._shown(error)
            if attempt > self._retries:
                tried = f" ({attempt} attempts)" if attempt > 1 else ""
                failed = InfrastructureError(f"{self._where}: {problem}{tried}")
                failed.kind = "engine"
                raise failed
            await asyncio.sleep(wait_s(attempt, self._backoff_s, None))
            attempt += 1

    def _advice(self, error: Refused) -> str:
        if error.status in (401, 403):
            return "Check the key in the variable that api_key_env names."
        if "logprobs" in error.said:
            return "Ask for fewer, or start vLLM with a larger --max-logprobs."
        return "The server does not take this request: check the model's name and its limits."

    def _shown(self, error: Exception) -> str:
        said = str(error)
        return said if self._api_key is None else said.replace(self._api_key, "***")

    def _check(self, facts: Facts) -> None:
        if missing := facts.missing(GENERATE):
            raise UserError(
                f"{self._where}: {self._server.url} cannot score: {'; '.join(missing)}",
                "Take a server with this path.",
            )

    def _check_temperature(self, temperature: float) -> None:
        if temperature not in (0.0, 1.0):
            raise UserError(
                f"{self._where}: a {self._dialect.name} server scores at temperature 1, not "
                f"{temperature:g}",
                "Sample at temperature 1, or load the teacher in the run: type: model.",
            )

    def _check_length(self, token_ids: Sequence[int]) -> None:
        if self._limit is not None and len(token_ids) > self._limit:
            raise UserError(
                f"{self._where}: a sequence of {len(token_ids)} tokens is longer than the "
                f"teacher's context of {self._limit}",
                "Take a teacher with a longer context, or shorten the rollouts.",
            )
