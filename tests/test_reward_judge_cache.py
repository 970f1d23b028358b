"""Answers of judges in a file: for other runs, and for several processes at once."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from engine_servers.chat import ChatServer
from retrain.rewards.judge_cache import AnswerCache
from retrain.types import UserError
from test_reward_judge import score, scoring, told


async def test_a_file_keeps_answers_for_other_runs(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "judge.sqlite")
    with ChatServer(scoring(5)) as server:
        for model, temperature in (("small", 0.0), ("small", 0.0), ("small", 0.5)):
            params = {"model": model, "temperature": temperature, "cache": path}
            rollout = told("4")
            await score("llm_judge", server, rollout, criteria="c", **params)
            assert rollout.reward == 1.0
        assert len(server.bodies) == 2
        rollout = told("4")
        with ChatServer(scoring(0)) as other:  # the same model's name, somewhere else
            await score("llm_judge", other, rollout, criteria="c", cache=path)
            assert (rollout.reward, len(other.bodies)) == (0.0, 1)
    broken = tmp_path / "broken"
    broken.write_text("no database at all, but a text of some length " * 20)
    with ChatServer(scoring(5)) as server, pytest.raises(UserError, match="cannot be used"):
        await score("llm_judge", server, told("4"), criteria="c", cache=str(broken))


def _fill(path: str, number: int) -> None:
    async def fill() -> None:
        cache = AnswerCache(path)
        for key in range(40):
            await cache.put(str(key), f"{number}")

    asyncio.run(fill())


def test_several_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "judge.sqlite"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(str(path), n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    with sqlite3.connect(path) as file:
        rows = dict(file.execute("SELECT key, text FROM answers").fetchall())
    assert sorted(rows, key=int) == [str(key) for key in range(40)]

    async def first_one_stays() -> str:
        return await AnswerCache(str(path)).put("7", "later")

    assert asyncio.run(first_one_stays()) == rows["7"]
