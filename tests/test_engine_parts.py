"""The pieces of the engine: sampling, stop rules, the slot table, prefill batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.engines.prefix import PrefixAttention, find_families, make_families
from retrain.engines.runners import PREFILL_TOKENS, batches
from retrain.engines.sampling import UNIFORM_BLOCK, Uniforms, sample_tokens, truncate
from retrain.engines.slots import MOVING_COST, SlotTable
from retrain.engines.stops import StopRules, could_complete
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer(merges=(("a", "b"), ("ab", "a"), ("Ã", "©"), ("b", "Ã"), ("©", "a")))


def test_inverse_cdf_by_hand() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(5, 4)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.5999, 0.6001])
    tokens, logprobs = sample_tokens(logits, uniforms, 1.0)
    assert tokens.tolist() == [0, 0, 1, 2, 3]
    expected = [math.log(p) for p in (0.1, 0.1, 0.2, 0.3, 0.4)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-6)


def test_temperature_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]] * 3)
    temperature = torch.tensor([1.0, 0.5, 0.0])
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.2, 0.2, 0.2]), temperature)
    # 1/4, 3/4; at half the temperature 1/10, 9/10; greedy reports the plain distribution
    assert tokens.tolist() == [0, 1, 1]
    assert logprobs.exp().tolist() == pytest.approx([0.25, 0.9, 0.75], abs=1e-6)


def test_a_token_of_probability_zero_is_never_sampled() -> None:
    logits = torch.full((1, 50_000), -torch.inf)
    logits[0, :40_000] = 0.0
    largest = torch.tensor([float(np.float32(1 - 2**-22))])
    token, logprob = sample_tokens(logits, largest, 1.0)
    assert token.item() < 40_000
    assert logprob.item() == pytest.approx(-math.log(40_000), abs=1e-4)


def test_truncation_by_hand() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    inf = torch.inf
    assert truncate(logits, 1.0, 2, 1.0).isinf().tolist() == [True, False, True, False]
    assert truncate(logits, 1.0, 0, 0.4).isinf().tolist() == [True, False, True, True]
    assert truncate(logits, 1.0, 0, 0.41).isinf().tolist() == [True, False, True, False]
    assert truncate(logits, 1.0, 0, 1e-9).isinf().sum() == 3
    assert truncate(logits, 1.0, 3, 0.99).tolist()[0] == -inf


def test_uniforms_depend_on_the_seed_alone() -> None:
    one, same, other = Uniforms(7), Uniforms(7), Uniforms(8)
    first = one.next_block()
    assert first.shape == (UNIFORM_BLOCK,) and first.dtype == np.float32
    np.testing.assert_array_equal(first, same.next_block())
    assert not np.array_equal(first, other.next_block())
    assert not np.array_equal(first, one.next_block())


@pytest.mark.parametrize(
    ("piece", "text", "expected"),
    [
        ("de>", "</code>", True),
        ("x</code>y", "</code>", True),
        ("</co", "</code>", False),
        ("> and", "</code>", True),
        ("code", "</code>", False),
        ("\ufffd", "é", True),
        ("\ufffd", "e", False),
        ("foo", " foo", True),
    ],
)
def test_tokens_that_could_complete_a_string(piece: str, text: str, expected: bool) -> None:
    assert could_complete(piece, text) is expected


@settings(max_examples=200, deadline=None)
@given(st.text("abé→<", min_size=1, max_size=20), st.data())
def test_stop_strings_are_found_where_decoding_everything_finds_them(
    text: str, data: st.DataObject
) -> None:
    stop = data.draw(st.text("abé→<", min_size=1, max_size=3))
    raw = TOKENIZER.encode(text)
    rule = StopRules(TOKENIZER, len(TOKENIZER)).rule((stop,), ())
    found = next(
        (n for n in range(1, len(raw) + 1) if rule.flags[raw[n - 1]] and rule.reason(raw[:n])), None
    )
    expected = next((n for n in range(1, len(raw) + 1) if stop in TOKENIZER.decode(raw[:n])), None)
    assert found == expected


def test_a_rule_is_made_once() -> None:
    rules = StopRules(TOKENIZER, len(TOKENIZER))
    assert rules.rule(("ab",), (1,)) is rules.rule(("ab",), (1,))
    assert rules.rule(("ab",), (1,)) is not rules.rule(("ab",), (2,))


def test_slots_are_the_lowest_free_then_those_that_waited_longest() -> None:
    table = SlotTable(3)
    table.reserve(3, 8)
    assert table.free == 3
    assert [table.take(name, idle_before=0) for name in "abc"] == [0, 1, 2]
    assert table.free == 0
    table.active[:] = True
    assert table.take("d", idle_before=99) is None  # all are at work
    table.steps = 10
    table.deactivate(2)
    table.steps = 20
    table.deactivate(1)
    assert table.take("b", idle_before=0) == 1  # a session's own slot waits for it
    assert table.take("d", idle_before=10) is None  # c has waited since step 10, not before it
    assert table.take("d", idle_before=11) == 2
    assert "c" not in table.by_session
    table.active[1] = table.active[2] = True
    table.deactivate(0)
    assert table.take("b", idle_before=99) == 0  # a second request of a busy session


def test_compaction_moves_the_highest_rows_into_the_lowest_holes() -> None:
    table = SlotTable(8)
    table.reserve(8, 4)
    for name in "abcdefgh":
        slot = table.take(name, idle_before=0)
        assert slot is not None
        table.ids[slot] = slot
        table.active[slot] = True
    for slot in (0, 1, 2, 4, 6):
        table.deactivate(slot)
    waits = 0
    while (moves := table.compaction()) == ([], []):
        waits += 1
    movers, holes = moves
    assert (movers, holes) == ([3, 5, 7], [0, 1, 2])
    assert waits == MOVING_COST * 3 // 5  # until five idle rows a step have cost three moves
    table.swap(movers, holes)
    assert table.active.tolist() == [True] * 3 + [False] * 5
    assert all(
        table.ids[slot, 0] == ord(name) - ord("a") for name, slot in table.by_session.items()
    )
    assert table.compaction() == ([], [])


def test_prefix_sharing() -> None:
    table = SlotTable(4)
    table.reserve(3, 8)
    table.ids[0, :4] = [5, 6, 7, 8]
    table.ids[1, :4] = [5, 6, 9, 9]
    table.length[:2] = [3, 4]
    prompt = np.array([5, 6, 7, 8, 1], dtype=np.int32)
    assert table.shared_prefix(0, prompt) == 3  # the fourth token is known but was not run
    assert table.shared_prefix(1, prompt) == 2
    assert table.best_donor(prompt, table.length) == (0, 3)
    table.forget()
    assert table.best_donor(prompt, table.length)[1] == 0


@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=40))
def test_prefill_batches_hold_each_row_once_within_the_budget(lengths: list[int]) -> None:
    array = np.array(lengths)
    parts = batches(array)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or array[part].max() * len(part) <= PREFILL_TOKENS


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_families_read_a_prefix_once_and_attend_to_the_whole_row(data: st.DataObject) -> None:
    """Against attention over each row on its own; idle rows may hold anything."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), label="members")
    shared = np.repeat(data.draw(st.lists(st.integers(1, 6), min_size=len(sizes),
                                          max_size=len(sizes)), label="shared"), sizes)  # fmt: skip
    family = np.repeat(np.arange(len(sizes)) + 7, sizes)
    rows, kv_heads, repeats, size, width = len(family), 2, 3, 4, 12
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), label="seed"))
    shuffled = torch.randperm(rows, generator=generator).numpy()
    family, shared = family[shuffled], shared[shuffled]
    active = np.asarray(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    active[0] = True
    keys, values = (
        torch.randn(rows + 1, kv_heads, width + 3, size, generator=generator) for _ in range(2)
    )
    for row in range(rows):
        first = int(np.flatnonzero(family == family[row])[0])
        for states in (keys, values):
            states[row, :, : shared[row]] = states[first, :, : shared[row]]
    lengths = torch.tensor(
        [data.draw(st.integers(int(s), width - 1), label="length") for s in shared]
    )
    query = torch.randn(rows, kv_heads * repeats, 1, size, generator=generator)

    families = make_families(family, shared, active, torch.device("cpu"))
    own = PrefixAttention.of(families, lengths.unsqueeze(1), width, torch.float32)
    own.read(0, keys, values)
    found = own.attend(query, keys, values, None, None)
    for row in np.flatnonzero(active).tolist():
        upto = int(lengths[row]) + 1
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[row],
            *(x[row, :, :upto].repeat_interleave(repeats, 0) for x in (keys, values)),
        )
        torch.testing.assert_close(found[row, 0], expected[:, 0], atol=1e-5, rtol=1e-5)


def test_families_must_pay() -> None:
    cpu, everyone = torch.device("cpu"), np.ones(4, dtype=np.bool_)
    long, short = np.full(4, 100), np.array([100, 100, 100, 0])
    pairs, strangers = np.array([1, 1, 2, 2]), np.array([1, 2, 3, 3])
    assert find_families(pairs, long, everyone, 150, cpu) is not None
    assert find_families(pairs, short, everyone, 150, cpu) is None
    assert find_families(pairs, long, everyone, 201, cpu) is None
    assert find_families(strangers, long, everyone, 150, cpu) is None
    first = find_families(pairs, long, everyone, 150, cpu)
    assert first is not None
    first.prefixes[0] = (torch.zeros(1), torch.zeros(1))
    fewer = find_families(pairs, long, np.array([True, True, False, True]), 150, cpu, before=first)
    assert fewer is None or fewer.prefixes is first.prefixes
    other = find_families(pairs + 5, long, everyone, 150, cpu, before=first)
    assert other is not None and not other.prefixes
