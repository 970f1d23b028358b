"""Which server a request goes to: no place is ever lost, and nobody is overtaken."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from retrain.engines.server import router as module
from retrain.engines.server.router import SLACK, Router
from retrain.types import InfrastructureError


def opened(count: int, most_each: int = 100) -> Router:
    router = Router(count, most_each)
    for number in range(count):
        router.set_ready(number, True)
    router.open()
    return router


async def a_moment() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_least_busy_of_those_that_are_ready() -> None:
    router = opened(3)
    assert [await router.admit(None) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    router.release(1)
    assert await router.admit(None) == 1
    router.set_ready(1, False)
    router.release(1)
    router.release(1)
    assert [await router.admit(None) for _ in range(2)] == [0, 2]
    assert list(router.in_flight) == [3, 0, 3]
    router.set_ready(1, True)
    assert [await router.admit(None) for _ in range(3)] == [1, 1, 1]


async def test_a_group_stays_together_until_its_server_is_too_busy() -> None:
    router = opened(2)
    assert [await router.admit("g") for _ in range(SLACK + 1)] == [0] * (SLACK + 1)
    assert await router.admit("g") == 1
    assert await router.admit("g") == 1, "it moved for good"
    assert await router.admit("other") == 1
    for _ in range(SLACK + 1):
        router.release(0)
    assert await router.admit("g") == 1
    router.set_ready(1, False)
    assert await router.admit("g") == 0
    router.set_ready(1, True)
    assert await router.admit("g") == 0


async def test_a_group_moves_where_its_server_is_full() -> None:
    router = opened(2, most_each=2)
    assert [await router.admit("g") for _ in range(4)] == [0, 0, 1, 1]


async def test_groups_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUPS_REMEMBERED", 2)
    router = opened(2)
    for group in "abc":
        await router.admit(group)
    assert list(router._groups) == ["b", "c"]


async def test_who_waits_is_admitted_in_order_and_only_while_it_is_open() -> None:
    router = opened(2, most_each=1)
    order: list[int] = []

    async def wait(name: int) -> None:
        await router.admit(None)
        order.append(name)

    first = [await router.admit(None), await router.admit(None)]
    waiting = [asyncio.ensure_future(wait(name)) for name in range(4)]
    await a_moment()
    assert order == []
    router.release(first[1])
    await a_moment()
    assert order == [0]
    router.close()
    router.release(first[0])
    await a_moment()
    assert order == [0]
    router.open()
    await a_moment()
    assert order == [0, 1]
    router.release(0)
    router.release(1)
    await asyncio.gather(*waiting)
    assert order == [0, 1, 2, 3]


async def test_cancelling_loses_no_place() -> None:
    """While it waits; admitted, but not told yet; admitted and told."""
    router = opened(1, most_each=1)
    await router.admit(None)
    waits, stays = (asyncio.ensure_future(router.admit(None)) for _ in range(2))
    await a_moment()
    waits.cancel()
    await a_moment()
    router.release(0)
    await a_moment()
    assert stays.result() == 0 and waits.cancelled()
    told = asyncio.ensure_future(router.admit(None))
    after = asyncio.ensure_future(router.admit(None))
    await a_moment()
    router.release(0)
    told.cancel()
    await a_moment()
    assert told.cancelled() and after.result() == 0
    assert list(router.in_flight) == [1]
    router.release(0)
    assert list(router.in_flight) == [0]


async def test_giving_up_tells_everybody() -> None:
    router = opened(1, most_each=1)
    await router.admit(None)
    tasks = [asyncio.ensure_future(router.admit(None)) for _ in range(3)]
    await a_moment()
    tasks[1].cancel()
    router.fail(InfrastructureError("none is left"))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(outcomes[0]), str(outcomes[2])] == ["none is left"] * 2
    assert isinstance(outcomes[1], asyncio.CancelledError)
    with pytest.raises(InfrastructureError, match="none is left"):
        await router.admit(None)
    router.release(0)


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_happens_places_add_up(seed: int) -> None:
    chance = random.Random(seed)
    router = opened(3, most_each=4)
    held = [0, 0, 0]
    served = 0

    async def work() -> None:
        nonlocal served
        number = await router.admit(chance.choice([None, "a", "b"]))
        try:
            held[number] += 1
            assert held[number] <= 4
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            served += 1
        finally:
            held[number] -= 1
            router.release(number)

    tasks: list[asyncio.Task[Any]] = []
    for _ in range(300):
        match chance.randrange(8):
            case 0:
                router.set_ready(chance.randrange(3), chance.random() < 0.7)
            case 1:
                router.close()
            case 2:
                router.open()
            case 3 if tasks:
                chance.choice(tasks).cancel()
            case _:
                tasks.append(asyncio.ensure_future(work()))
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    for number in range(3):
        router.set_ready(number, True)
    router.open()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(o) for o in outcomes} <= {type(None), asyncio.CancelledError}
    assert served >= sum(o is None for o in outcomes) > 0
    assert list(router.in_flight) == held == [0, 0, 0]
