"""When a request ends by what was sampled: stop tokens and stop strings.

A table over the vocabulary marks each token that could be the last one of a stop string, so a
step costs one lookup per row; only a marked token leads to decoding, and only of the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from retrain.types import UserError

REPLACEMENT = "�"
"""What a tokenizer decodes an incomplete UTF-8 sequence to."""

TAIL_MARGIN = 8
"""Tokens decoded beyond those a stop string can span, for tokens that decode to nothing."""


class StopRule:
    """The stop conditions of one set of parameters.

    `flags` [V] is True for stop tokens and for every token that could complete a stop string.
    """

    def __init__(
        self, flags: np.ndarray, stop: tuple[str, ...], token_ids: tuple[int, ...], tokenizer: Any
    ) -> None:
        self.flags = flags
        self._stop = stop
        self._token_ids = frozenset(token_ids)
        self._tokenizer = tokenizer
        self._span = max((len(text.encode()) for text in stop), default=0) + TAIL_MARGIN

    def reason(self, generated: Sequence[int]) -> Literal["stop_token", "stop_string"] | None:
        """Why generation ends with the last of the `generated` tokens, if it does."""
        if generated[-1] in self._token_ids:
            return "stop_token"
        if not self._stop:
            return None
        tail = _decode(self._tokenizer, list(generated[-self._span :]))
        return "stop_string" if any(text in tail for text in self._stop) else None


class StopRules:
    """Makes each `StopRule` once."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._rules: dict[tuple[tuple[str, ...], tuple[int, ...]], StopRule] = {}
        self._texts: list[str] | None = None

    def rule(self, stop: tuple[str, ...], token_ids: tuple[int, ...]) -> StopRule:
        """
        Raises:
            UserError: a stop string without a tokenizer, an empty one, or a token id outside
                the vocabulary.
        """
        key = (stop, token_ids)
        if key not in self._rules:
            self._rules[key] = StopRule(
                self._flags(stop, token_ids), stop, token_ids, self._tokenizer
            )
        return self._rules[key]

    def _flags(self, stop: tuple[str, ...], token_ids: tuple[int, ...]) -> np.ndarray:
        flags = np.zeros(self._vocab_size, dtype=np.bool_)
        for token in token_ids:
            if not 0 <= token < self._vocab_size:
                raise UserError(
                    f"SamplingParams.stop_token_ids has {token}; the vocabulary has "
                    f"{self._vocab_size} tokens",
                    "use ids of the model's own tokenizer",
                )
            flags[token] = True
        for text in stop:
            if not text:
                raise UserError("SamplingParams.stop has an empty string", "remove it")
            for token, piece in enumerate(self._token_texts()):
                flags[token] |= could_complete(piece, text)
        return flags

    def _token_texts(self) -> list[str]:
        if self._tokenizer is None:
            raise UserError(
                "SamplingParams.stop needs a tokenizer to find strings in tokens",
                "pass tokenizer=... to TorchEngine",
            )
        if self._texts is None:
            count = min(len(self._tokenizer), self._vocab_size)
            self._texts = [_decode(self._tokenizer, [token]) for token in range(count)]
        return self._texts


def could_complete(piece: str, text: str) -> bool:
    """Whether a token that decodes to `piece` can be the one that completes `text`.

    It contains all of it, or begins with its end. A tokenizer may drop a leading space of a
    lone token, and a token with part of a character decodes to U+FFFD: both count as possible.
    """
    if REPLACEMENT in piece and not text.isascii():
        return True
    for variant in {piece, " " + piece}:
        if text in variant or any(variant.startswith(text[i:]) for i in range(1, len(text))):
            return True
    return False


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    decoded: str = tokenizer.decode(
        token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return decoded
