"""Output that cannot grow without bound: the head and the tail are kept, the middle is counted."""

from __future__ import annotations


def cut_middle(text: str, max_chars: int) -> str:
    """`text` with its middle left out: `max_chars` characters of it stay, half at each end.

    The marker that replaces the middle says how many characters are missing; it comes on top of
    `max_chars`.
    """
    if len(text) <= max_chars:
        return text
    tail = max_chars // 2
    head = max_chars - tail
    return _join(text[:head], text[len(text) - tail :], len(text) - max_chars)


class BoundedText:
    """Collects written pieces in at most about `2 * max_chars` characters of memory."""

    def __init__(self, max_chars: int) -> None:
        self.max_chars = max_chars
        self.total = 0
        """Characters written, kept or not."""
        self._tail_size = max_chars // 2
        self._head = ""
        self._tail = ""

    def write(self, piece: str) -> None:
        self.total += len(piece)
        room = self.max_chars - self._tail_size - len(self._head)
        if room > 0:
            self._head += piece[:room]
            piece = piece[room:]
        if piece:
            tail = self._tail + piece
            self._tail = tail[max(0, len(tail) - self._tail_size) :]

    @property
    def truncated(self) -> bool:
        return self.total > self.max_chars

    def text(self) -> str:
        if not self.truncated:
            return self._head + self._tail
        return _join(self._head, self._tail, self.total - self.max_chars)


def _join(head: str, tail: str, missing: int) -> str:
    return f"{head}\n... [{missing} characters left out] ...\n{tail}"
