"""Text to tokens and back, the same way everywhere."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import Any

from retrain.types import UserError

_CACHED_CHARS = 16_384
"""Longer texts are encoded anew each time, so that the cache stays small."""

_CACHED_TOKENS = 256
"""Of longer sequences only the latest few are remembered: the openings of conversations."""


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
        self._cached = functools.lru_cache(maxsize=1024)(self._encode)
        self._decoded = functools.lru_cache(maxsize=8192)(self._decode)
        self._decoded_long = functools.lru_cache(maxsize=32)(self._decode)
        special = {str(token) for token in tokenizer.all_special_tokens}
        added = [token for token in tokenizer.added_tokens_decoder.values()]
        special |= {str(token.content) for token in added if token.special}
        self.special_tokens = tuple(sorted(special, key=len, reverse=True))
        written = special | {str(token.content) for token in added}
        self._unsafe = tuple(
            sorted((t for t in written if len(t.strip()) > 1), key=len, reverse=True)
        )
        self._anchor = self._find_anchor()

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that begins a sequence, with nothing added; special tokens in it
        are read as such."""
        return self._cached(text) if len(text) <= _CACHED_CHARS else self._encode(text)

    def encode_after(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that goes on from another: without the space that some tokenizers
        put before a sequence's first word."""
        if not text or not self._anchor:
            return self.encode(text)
        return self.encode(self._anchor + text)[1:]

    def _find_anchor(self) -> str:
        """A special token's text, where words after it are encoded otherwise than first words."""
        eos = str(self.tokenizer.eos_token)
        alone, inside = self._encode("x"), self._encode(eos + "x")
        whole = self._encode(eos + " x")
        one_token = inside[:1] == (self.tokenizer.eos_token_id,) and whole[1:] != inside[1:]
        return eos if one_token and inside[1:] != alone else ""

    def _encode(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        if self._backend is None:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones included; bytes that are not UTF-8 become U+FFFD."""
        if not token_ids:
            return ""
        ids = array("i", token_ids).tobytes()
        short = len(token_ids) <= _CACHED_TOKENS
        return self._decoded(ids) if short else self._decoded_long(ids)

    def _decode(self, packed: bytes) -> str:
        ids = array("i", packed).tolist()
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def said(self, token_ids: Sequence[int]) -> str:
        """What a turn said: its text without the end-of-turn token."""
        if token_ids and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        return self.decode(token_ids)

    def neutralise(self, text: str, markers: Sequence[str] = ()) -> str:
        """Break every special or added token and every marker in text that a tool returned.

        A space after the first character keeps it readable, and keeps it from ending a turn or
        forging a call. One of a single character becomes U+FFFD.
        """
        for marker in (*self.special_tokens, *markers):
            if len(marker) == 1:
                text = text.replace(marker, "\ufffd")
        unsafe = [m for m in (*self._unsafe, *markers) if len(m) > 1]
        while found := [marker for marker in unsafe if marker in text]:
            for marker in found:
                text = text.replace(marker, f"{marker[0]} {marker[1:]}")
        return text
