"""All conversations of a caller as a tree of their messages: which one goes on?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from retrain.gateway.branch import Answer, Branch
from retrain.gateway.history import Key


@dataclass(eq=False, repr=False)
class Node:
    """Conversations that have begun alike."""

    depth: int = 0
    """Messages so far."""
    branch: Branch | None = None
    """One of those that came here."""
    ends: list[Branch] = field(default_factory=list)
    """Those that have come no further."""
    answers: list[Answer] = field(default_factory=list)
    """Given to exactly these messages."""
    below: dict[Key, Node] = field(default_factory=dict)


class Talk:
    """Finds in one walk what a request goes on with, however many conversations there are."""

    def __init__(self) -> None:
        self._root = Node()

    def deepest(self, keys: Sequence[Key]) -> Node:
        """The longest beginning of these messages that was heard and answered before."""
        node = self._root
        for key in keys:
            found = node.below.get(key)
            if found is None:
                break
            node = found
        return node

    def add(
        self, branch: Branch, known: int, keys: Sequence[Key], answer: Answer, said: Sequence[Key]
    ) -> None:
        """A branch, which had `known` messages, has heard `keys` and given an answer.

        Args:
            keys: of all of its messages but the answer.
            said: any of these is the answer.
        """
        node = self._root
        for depth, key in enumerate(keys, 1):
            node = node.below.setdefault(key, Node(depth, branch))
            if depth == known and branch in node.ends:
                node.ends.remove(branch)
        node.answers.append(answer)
        after = Node(node.depth + 1, branch)
        standing = {id(found): found for found in map(node.below.get, said) if found is not None}
        for found in standing.values() or (after,):
            found.ends.append(branch)
        for key in said:
            node.below.setdefault(key, after)
