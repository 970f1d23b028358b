"""Sessions that come and go, and the files that they leave behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from answering import Prescribed, client, said, serving
from retrain.gateway.ask import Ask, Reply, RequestRefused
from retrain.gateway.records import AppendOnly, RecordedSession, Records
from retrain.gateway.server import GatewayServer
from retrain.gateway.sessions import Sessions
from retrain.gateway.wire.errors import read_object
from retrain.gateway.wire.responses import Responses

ASK = Ask(({"role": "user", "content": "a"},))


@contextmanager
def room(path: Path, more: int) -> Iterator[None]:
    """Files may grow to the size of this one and so many bytes more: a disk that fills up."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_piece_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    file = AppendOnly(path, "gateway.rollouts")
    file.write(b"first\n")
    with room(path, 3), pytest.raises(OSError):
        file.write(b"second\n")
    file.write(b"third\n")
    file.close()
    assert path.read_bytes() == b"first\nthird\n"


class Keeping(Prescribed):
    """Gives a reply again that did not arrive."""

    kept: Reply | None = None

    async def answer(self, ask: Ask) -> Reply:
        kept, self.kept = self.kept, None
        return kept or await super().answer(ask)

    def undelivered(self, reply: Reply) -> None:
        self.kept = reply


async def test_a_reply_that_could_not_be_written_is_written_when_it_is_given_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "records"
    inner = Keeping()
    session = RecordedSession(inner, Records(path), "s")
    ask = Ask(ASK.messages, n=2)
    with room(path, 500), pytest.raises(OSError):  # one line fits, two do not
        await session.answer(ask)
    first = await session.answer(ask)
    session.undelivered(first)
    assert await session.answer(ask) is first
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == [first.id] * 2 and inner.answered == 1
    assert lines[0]["conversation"] != lines[1]["conversation"]


async def test_ends_that_were_overtaken_are_forgotten(tmp_path: Path) -> None:
    session = RecordedSession(Prescribed(), Records(tmp_path / "records"), "s")
    for _ in range(20):
        await session.answer(ASK)
    assert len(session._places) == len(session._ends) == 1


def sessions(ended: list[str], **settings: Any) -> tuple[Sessions, dict[str, Prescribed]]:
    made: dict[str, Prescribed] = {}

    def end(name: str, session: Any) -> None:
        ended.append(name)
        if name.startswith("bad"):
            raise OSError("disk")

    return Sessions(lambda name: made.setdefault(name, Prescribed()), end, **settings), made


def test_a_failure_at_the_end_of_one_leaves_the_others(caplog: Any) -> None:
    ended: list[str] = []
    book, _ = sessions(ended, idle_s=0.0)
    for name in ("bad1", "good", "bad2"):
        book.find(name=name, key="sk-caller")
    with caplog.at_level(logging.ERROR):
        book.sweep()
        book.find(name="late", key=None)
        book.close()
    assert ended == ["bad1", "good", "bad2", "late"] and (len(book), book.failed) == (0, 2)
    assert len(caplog.records) == 1 and "sk-caller" not in caplog.text


async def test_one_that_answered_long_is_as_fresh_as_its_answer() -> None:
    ended: list[str] = []
    book, made = sessions(ended, idle_s=0.2)
    visit = book.find(name="long", key=None)
    made["long"].delay_s = 0.3
    answering = asyncio.create_task(visit.answer(ASK))
    await asyncio.sleep(0)
    book.find(name="short", key=None)
    await answering
    book.sweep()
    assert ended == ["short"]


def test_a_key_names_a_session_by_64_bits() -> None:
    ended: list[str] = []
    book, _ = sessions(ended)
    book.find(name=None, key="k")
    book.close()
    assert ended == [f"key-{hashlib.sha256(b'k').hexdigest()[:16]}"]


async def test_a_session_opens_with_a_request_that_can_be_answered() -> None:
    """Models are listed without one, and a slow body outlives none."""
    ended: list[str] = []
    book, made = sessions(ended, keys=["k"], idle_s=0.0)
    server = GatewayServer(book, models=("small",))
    await server.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.split(":")[-1]))
        body = json.dumps({"model": "m", "messages": list(ASK.messages)}).encode()
        head = "POST /sessions/s/v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: k\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:5])
        await writer.drain()
        async with httpx2.AsyncClient(headers={"x-api-key": "k"}) as caller:
            listed = (await caller.get(f"{server.url}/sessions/probe/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["small"]
        book.sweep()
        assert (len(book), made) == (0, {})
        writer.write(body[5:])
        assert b"200" in await reader.readline()
        assert made["s"].answered == 1 and len(book) == 1
        writer.close()
    finally:
        await server.close()


async def test_an_answer_that_cannot_be_written_is_not_kept() -> None:
    session = Prescribed(said(object()))  # type: ignore[arg-type]
    async with serving(session) as (server, _):
        with pytest.raises(Exception, match="gateway failed"):
            await client(server).chat.completions.create(model="m", messages=list(ASK.messages))
    assert session.answered == 1 and session.lost == []


def test_numbers_are_finite() -> None:
    assert read_object(b'{"x": 1e300}') == {"x": 1e300}
    with pytest.raises(RequestRefused, match="1e999 is too large"):
        read_object(b'{"x": [1e999]}')


def test_what_chained_responses_keep_alive_is_bounded() -> None:
    dialect = Responses(most_characters=50_000)
    previous: dict[str, Any] = {}
    for _ in range(60):
        try:
            ask = dialect.read({"model": "m", "input": "x" * 1000, **previous}, {})
        except RequestRefused:
            break
        reply = Reply((said("y" * 1000),), model="m")
        previous = {"previous_response_id": dialect.write(reply, ask)["id"]}
        held = sum(len(m["content"]) for m in ask.messages)
        assert held <= 50_000
    else:
        raise AssertionError("the conversation outgrew what is remembered")
    assert (len(dialect), dialect._size) == (0, 0)
