"""Alignment of two tokenizations of one text, its error bound, and mixtures of teachers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retrain.teachers.base import Top
from retrain.teachers.mixture import mixed, mixed_top
from retrain.teachers.spans import Cut, align, shared_out
from retrain.teachers.tokenizers import TokenBytes, difference, require_same_tokenizer
from retrain.types import UserError
from tiny import byte_tokenizer, tiny_llama, tiny_qwen3

NAN = float("nan")
SNOWMAN = "☃".encode()


def wordpiece(normalise: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece's way to write words and bytes."""
    vocab = {"<unk>": 0, "<eos>": 1} | {f"<0x{b:02X}>": 2 + b for b in range(256)}
    for piece in ("▁", "▁a", "b", "ab", "a", "c"):
        vocab[piece] = len(vocab)
    made = Tokenizer(
        models.BPE(
            vocab=vocab, merges=[("▁", "a"), ("a", "b")], byte_fallback=True, unk_token="<unk>"
        )
    )
    steps = [normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *([normalizers.NFC()] if normalise else []), *steps]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    made.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def test_texts_are_cut_where_both_have_a_boundary() -> None:
    student = [b"he", b"l", b"lo", b" wor", b"ld"]
    teacher = [b"hell", b"o", b" w", b"or", b"l", b"d"]
    #                   0     2    3     5       9     11 | 0  4  5  7  9  10  11
    assert align(student, teacher) == [Cut(0, 3, 0, 2), Cut(3, 4, 2, 4), Cut(4, 5, 4, 6)]


def test_a_character_in_pieces_is_cut_within() -> None:
    """The student splits a three-byte character after its first byte, the teacher after two."""
    student = [b"a" + SNOWMAN[:1], SNOWMAN[1:], b"b"]
    assert align(student, [b"a", SNOWMAN[:2], SNOWMAN[2:] + b"b"]) == [Cut(0, 3, 0, 3)]
    assert align(student, [b"a", SNOWMAN[:1], SNOWMAN[1:], b"b"]) == [
        Cut(0, 1, 0, 2),
        Cut(1, 2, 2, 3),
        Cut(2, 3, 3, 4),
    ]


def test_nothing_is_aligned_from_the_first_difference_on() -> None:
    broken = [b"ab", b"c", SNOWMAN[:2]]
    replaced = [b"a", b"bc", "\ufffd".encode()]
    assert align(broken, replaced) == [Cut(0, 2, 0, 2)]
    assert align([b"abc"], [b"abd"]) == []
    assert align([], []) == []


def test_tokens_without_bytes_belong_to_the_span_before_them() -> None:
    assert align([b"", b"a", b"", b"b"], [b"a", b"b", b""]) == [Cut(0, 3, 0, 1), Cut(3, 4, 1, 3)]


def test_a_spans_difference_is_shared_equally() -> None:
    cuts = [Cut(0, 2, 0, 1), Cut(2, 3, 1, 3)]
    found = shared_out(cuts, [-1.0, -2.0, -0.5, -9.0], [-4.0, -0.25, -0.5, -7.0])
    # The first span: -4 - (-3) = -1, half each. The second: -0.75 - (-0.5).
    assert list(found[:3]) == [-1.5, -2.5, -0.75]
    assert math.isnan(found[3])


pieces = st.lists(st.binary(max_size=4), max_size=12)


@given(st.text(max_size=20), st.data())
def test_spans_partition_the_text_and_keep_the_sums(text: str, data: st.DataObject) -> None:
    """Whatever the tokens: a text cut at any bytes, twice."""
    raw = text.encode()

    def cut_up() -> list[bytes]:
        places = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
        edges = [0, *places, len(raw)]
        return [raw[a:b] for a, b in itertools.pairwise(edges)]

    student, teacher = cut_up(), cut_up()
    cuts = align(student, teacher)
    for cut in cuts:
        own = b"".join(student[cut.start : cut.end])
        assert own and own == b"".join(teacher[cut.teacher_start : cut.teacher_end])
    # Spans follow each other, and none could be cut again.
    assert [c.start for c in cuts[1:]] == [c.end for c in cuts[:-1]]
    assert [c.teacher_start for c in cuts[1:]] == [c.teacher_end for c in cuts[:-1]]
    inner = {len(b"".join(student[:i])) for i in range(len(student) + 1)}
    inner &= {len(b"".join(teacher[:i])) for i in range(len(teacher) + 1)}
    assert len(cuts) == len(inner - {0})
    if raw:
        assert cuts[-1].end == len(student) and cuts[-1].teacher_end == len(teacher)
        a = [data.draw(st.floats(-20, 0)) for _ in student]
        b = [data.draw(st.floats(-20, 0)) for _ in teacher]
        found = shared_out(cuts, a, b)
        assert sum(found) == pytest.approx(sum(b), abs=1e-9)
        for cut in cuts:
            more = [found[i] - a[i] for i in range(cut.start, cut.end)]
            assert max(more) - min(more) < 1e-9


@given(pieces, pieces)
def test_different_texts_are_aligned_as_far_as_they_agree(a: list[bytes], b: list[bytes]) -> None:
    for cut in align(a, b):
        assert b"".join(a[: cut.end]) == b"".join(b[: cut.teacher_end])


MERGED = byte_tokenizer((("a", "b"), ("ab", "a"), ("b", "a"), ("â", "ĺ"), ("Ġ", "a")))


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=12))
def test_the_bytes_of_tokens_are_those_of_the_text(text: str) -> None:
    for tokenizer in (MERGED, byte_tokenizer(), wordpiece()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        found = b"".join(TokenBytes(tokenizer, "t").of(ids))
        extra = b" " if tokenizer.get_vocab().get("▁") and text else b""
        assert found == extra + text.encode()


def test_the_bytes_of_single_tokens() -> None:
    ids = MERGED.encode("aba☃<eos>", add_special_tokens=False)
    assert TokenBytes(MERGED, "t").of(ids) == [b"aba", SNOWMAN[:2], SNOWMAN[2:], b"<eos>"]
    made = wordpiece()
    ids = made.encode("ab☃", add_special_tokens=False)
    assert TokenBytes(made, "t").of(ids) == [b" a", b"b", *(bytes([b]) for b in SNOWMAN)]
    assert TokenBytes(made, "t").of([10_000]) == [b""]


def test_a_tokenizer_that_loses_what_it_reads_is_refused() -> None:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=made)
    with pytest.raises(UserError, match=r"teacher0: cannot tell which bytes"):
        TokenBytes(words, "teacher0")


def test_tokenizers_are_told_apart() -> None:
    assert difference(MERGED, MERGED) is None
    assert difference(byte_tokenizer(), byte_tokenizer()) is None
    more = byte_tokenizer(special=("<eos>", "<new>"))
    assert "257 and 258 entries; 1 differ, such as '<new>'" in str(
        difference(byte_tokenizer(), more)
    )
    assert "differ" in str(difference(byte_tokenizer((("a", "b"),)), byte_tokenizer((("b", "a"),))))
    # One vocabulary, other rules.
    assert "encode" in str(difference(wordpiece(), wordpiece(normalise=True)))
    require_same_tokenizer(MERGED, MERGED, "teacher0")
    with pytest.raises(UserError, match="teacher0 has another tokenizer than the student"):
        require_same_tokenizer(MERGED, byte_tokenizer(), "teacher0")


def tokenizations(text: bytes, known: list[bytes]) -> Iterator[list[int]]:
    """All token sequences that spell the text."""
    if not text:
        yield []
    for token, piece in enumerate(known):
        if piece and text.startswith(piece):
            for rest in tokenizations(text[len(piece) :], known):
                yield [token, *rest]


def logprob(model: Any, context: list[int], ids: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([context + ids])).logits[0].double()
    rows = logits.log_softmax(-1)[len(context) - 1 : -1]
    return float(rows[range(len(ids)), ids].sum())


@pytest.mark.parametrize("text", ["abab", "aba ab", "a☃ab"])
def test_the_error_is_the_share_of_the_canonical_tokenization(text: str) -> None:
    """The marginal probability of a short text, summed over all its tokenizations."""
    teacher, student = MERGED, byte_tokenizer((("a", "b"),))
    marginal, canonical, scored = {}, {}, {}
    for name, tokenizer, model in (
        ("teacher", teacher, tiny_qwen3(1)),
        ("student", student, tiny_llama(2)),
    ):
        known = TokenBytes(tokenizer, name).of(range(len(tokenizer) - 1))  # without <eos>
        ids = tokenizer.encode(text, add_special_tokens=False)
        every = list(tokenizations(text.encode(), known))
        assert ids in every and len(every) > 1
        total = np.logaddexp.reduce([logprob(model, [0], one) for one in every])
        marginal[name], canonical[name] = float(total), logprob(model, [0], ids)
        scored[name] = [logprob(model, [0, *ids[:i]], [t]) for i, t in enumerate(ids)]
        share = math.exp(canonical[name] - total)
        assert 0 < share < 1
        # Surprise is overestimated by minus the logarithm of the share, and never underestimated.
        assert -canonical[name] == pytest.approx(-total - math.log(share))
        assert -canonical[name] >= -total
    ids = [t.encode(text, add_special_tokens=False) for t in (student, teacher)]
    bytes_of = [TokenBytes(t, "").of(i) for t, i in zip((student, teacher), ids, strict=True)]
    numbers = shared_out(align(*bytes_of), scored["student"], scored["teacher"])
    aligned = math.fsum(numbers) - math.fsum(scored["student"])
    assert aligned == pytest.approx(canonical["teacher"] - canonical["student"], abs=1e-5)
    error = aligned - (marginal["teacher"] - marginal["student"])
    log_r = {name: canonical[name] - marginal[name] for name in marginal}
    assert log_r["teacher"] - 1e-5 <= error <= -log_r["student"] + 1e-5
    assert error == pytest.approx(log_r["teacher"] - log_r["student"], abs=1e-5)


def test_distributions_mix_by_weight_where_each_speaks() -> None:
    half, fifth = math.log(0.5), math.log(0.2)
    found = mixed([[half, fifth, NAN, NAN], [fifth, NAN, half, NAN]], [3, 1], geometric=False)
    # (3 * 0.5 + 1 * 0.2) / 4, then one teacher alone, then none.
    assert np.exp(found[:3]) == pytest.approx([0.425, 0.2, 0.5])
    assert math.isnan(found[3])
    impossible = mixed([[-math.inf], [half]], [1, 1], geometric=False)
    assert np.exp(impossible) == pytest.approx([0.25])


def test_what_was_aligned_mixes_as_a_weighted_mean_of_logarithms() -> None:
    found = mixed([[-1.0, -4.0, NAN], [-2.0, NAN, NAN]], [3, 1], geometric=True)
    assert list(found[:2]) == [-1.25, -4.0]
    assert math.isnan(found[2])


def test_the_likeliest_of_a_mixture() -> None:
    def top(ids: list[int], shares: list[float]) -> Top:
        logs = np.log(np.array([shares], dtype=np.float32))
        return Top(np.array([ids], dtype=np.int32), logs)

    found = mixed_top([top([7, 3], [0.6, 0.3]), top([3, 9], [0.8, 0.1])], [1, 3], 2)
    # 3: 0.25 * 0.3 + 0.75 * 0.8; 7: 0.25 * 0.6; 9: 0.75 * 0.1.
    assert found.ids.tolist() == [[3, 7]]
    assert np.exp(found.logprobs[0]) == pytest.approx([0.675, 0.15], abs=1e-6)
    nothing = Top.empty(1, 2)
    assert mixed_top([nothing, nothing], [1, 1], 2).ids.tolist() == [[-1, -1]]
