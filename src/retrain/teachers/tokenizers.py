"""Tokenizers held against each other, and the bytes that their tokens stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from retrain.types import UserError

_PROBES = (
    "The quick brown fox, 12345 + 67890 = ?\n\n\tdef f(x):\n        return x ** 2\n",
    "  two  spaces   and\r\nline ends\n\n\n",
    "Ünïcödé: Zürich, 北京, こんにちは, 👩🏽‍🚀 e\u0301",
    "don't DON'T camelCase snake_case 3.14e-10 \\frac{1}{2} <b>&amp;</b>",
)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"


def difference(a: Any, b: Any) -> str | None:
    """How two tokenizers differ; None where every text has the same ids in both.

    Compared are the vocabularies, added tokens included, and what they make of probe texts.
    """
    if a is b:
        return None
    vocab, other = a.get_vocab(), b.get_vocab()
    if vocab != other:
        strange = [token for token in vocab if other.get(token) != vocab[token]]
        strange += [token for token in other if token not in vocab]
        return (
            f"their vocabularies have {len(vocab)} and {len(other)} entries; {len(strange)} "
            f"differ, such as {strange[0]!r}"
        )
    special = "".join(map(str, a.all_special_tokens))
    for text in (*_PROBES, special, f"a{special} b"):
        ids, others = (list(t.encode(text, add_special_tokens=False)) for t in (a, b))
        if ids != others:
            return f"they encode {text!r} differently"
        if a.decode(ids) != b.decode(ids):
            return f"they decode the tokens of {text!r} differently"
    return None


def require_same_tokenizer(student: Any, teacher: Any, name: str) -> None:
    """
    Args:
        name: of the teacher, for the error.

    Raises:
        UserError: their ids do not mean the same.
    """
    if (differs := difference(student, teacher)) is not None:
        raise UserError(
            f"{name} has another tokenizer than the student ({differs}): distributions over its "
            "tokens say nothing of the student's",
            "Take a teacher of the student's model family, or distillation.type: on_policy, which "
            "compares spans of text.",
        )


class TokenBytes:
    """The bytes that each token of a tokenizer stands for in the text.

    Byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece with byte fallback (Llama 2, Gemma) are
    known; a tokenizer is tried on texts first.

    Raises:
        UserError: its tokens' bytes do not add up to the text.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self._added = {
            int(index): str(token).encode()
            for index, token in tokenizer.added_tokens_decoder.items()
        }
        self._known: dict[int, bytes] = {}
        for convert in (_of_byte_level, _of_sentencepiece):
            self._convert = convert
            self._known.clear()
            if all(self._adds_up(text) for text in _PROBES):
                return
        raise UserError(
            f"{name}: cannot tell which bytes the tokens of {type(tokenizer).__name__} stand for, "
            "which aligning different tokenizers needs",
            "Take a teacher with the student's tokenizer.",
        )

    def of(self, token_ids: Sequence[int]) -> list[bytes]:
        """One entry a token [T]; ids outside of the vocabulary stand for nothing."""
        return [self._one(index) for index in token_ids]

    def _one(self, index: int) -> bytes:
        if index in self._added:
            return self._added[index]
        if index not in self._known:
            piece = self._tokenizer.convert_ids_to_tokens(index)
            self._known[index] = b"" if piece is None else self._convert(str(piece))
        return self._known[index]

    def _adds_up(self, text: str) -> bool:
        """Whether the bytes of a text's tokens are the text's; a tokenizer may put a space before
        it, and may normalise it."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        said = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        try:
            found = b"".join(self.of(ids)).decode()
        except (KeyError, UnicodeDecodeError):
            return False
        return found in (said, f" {said}")


def _of_byte_level(piece: str) -> bytes:
    return bytes(_BYTES[character] for character in piece)


def _of_sentencepiece(piece: str) -> bytes:
    if (found := _BYTE_TOKEN.fullmatch(piece)) is not None:
        return bytes([int(found[1], 16)])
    return piece.replace(_WORD_START, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: printable ones stand for themselves,
    the others, in order, for the characters from 256 on (Radford et al., 2019)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    written = {chr(byte): byte for byte in printable}
    return written | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
