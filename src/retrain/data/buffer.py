"""The order of what does not fit in memory."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

DEFAULT_BUFFER = 1000
"""Items among which a stream is shuffled."""


def shuffled(items: Iterable[T], size: int, generator: random.Random) -> Iterator[T]:
    """Items in a random order, holding `size` of them at a time."""
    held: list[T] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        i = generator.randrange(size)
        yield held[i]
        held[i] = item
    generator.shuffle(held)
    yield from held
