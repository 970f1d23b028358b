"""Text to tokens and back, the same way everywhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from retrain.types import UserError


class Codec:
    """A tokenizer reduced to what the ledger needs: encode, decode, and which tokens end a turn.

    `stop_token_ids`: the tokenizer's and the model's end-of-sequence tokens, and the one that
    the chat template puts after an assistant's turn.
    """

    def __init__(self, tokenizer: Any, extra_stop_token_ids: Sequence[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token, so a turn could never end",
                "Set eos_token in its tokenizer_config.json.",
            )
        self.tokenizer = tokenizer
        self.stop_token_ids = frozenset({int(tokenizer.eos_token_id), *extra_stop_token_ids})
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self.encode = functools.lru_cache(maxsize=8192)(self._encode)
        special = {str(token) for token in tokenizer.all_special_tokens}
        added = {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special_tokens = tuple(sorted(special | added, key=len, reverse=True))

    def _encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a piece of text, with nothing added; special tokens in it are read as such."""
        if not text:
            return ()
        if self._backend is not None:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones included; bytes that are not UTF-8 become U+FFFD."""
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def said(self, token_ids: Sequence[int]) -> str:
        """What a turn said: its text without the end-of-turn token."""
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        return self.decode(token_ids)

    def neutralise(self, text: str, markers: Sequence[str] = ()) -> str:
        """Break every special token and marker in text that a tool returned.

        A space after the first character keeps it readable, and keeps it from ending a turn or
        forging a call.
        """
        for marker in (*self.special_tokens, *markers):
            if marker in text:
                text = text.replace(marker, f"{marker[0]} {marker[1:]}")
        return text
