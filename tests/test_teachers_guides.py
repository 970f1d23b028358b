"""What teachers say of a student's samples: the same tokens, other tokens, several at once."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from retrain.models.tokenizer import train_tokenizer
from retrain.rendering import Codec, NativeFormat, Renderer, TagFormat, make_template
from retrain.rollout import to_samples
from retrain.teachers.guides import Guide, Guides
from retrain.teachers.local import LocalTeacher
from retrain.tools import tool_schema
from retrain.types import (
    InfrastructureError,
    Message,
    MessageType,
    Prompt,
    Rollout,
    Sample,
    Task,
    Turn,
    UserError,
)
from scripted import CORPUS, SPECIAL, TEMPLATES, native_renderer, play, run, tag_renderer
from tiny import byte_tokenizer, tiny_llama, tiny_qwen3

TURNS = ("Let me see.<code>2 + 3</code>", "It is 5, söe☃.<|im_end|>")
NAN = float("nan")


def foreign(template: str | None = "llama3", form: str = "tags", vocab: int = 300) -> Renderer:
    """Another tokenizer, with fewer merges, and another template."""
    special = ("<eos>", *SPECIAL, "<|User|>", "<|Assistant|>")
    made = train_tokenizer(CORPUS * 20, vocab_size=vocab, special_tokens=special)
    made.eos_token = "<eos>"
    made.chat_template = None if template is None else TEMPLATES[template]
    written = make_template(made)
    formats = {"tags": TagFormat, "native": lambda: NativeFormat(written), "none": lambda: None}
    return Renderer(Codec(made), written, formats[form]())


def teacher(seed: int = 0, vocab_size: int = 330, **limits: Any) -> LocalTeacher:
    return LocalTeacher(tiny_qwen3(seed, vocab_size, context=2048), **limits)


async def scored(model: LocalTeacher, ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    return list(await model.score(list(ids), temperature))


def trained(sample: Sample) -> list[int]:
    return [i for i, trains in enumerate(sample.loss_mask) if trains]


class Broken(LocalTeacher):
    async def score(self, token_ids: Any, temperature: float = 1.0, *, start: int = 1) -> Any:
        raise InfrastructureError("gone")

    async def top(self, *_: Any, **__: Any) -> Any:
        raise InfrastructureError("gone")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_the_same_tokenizer_scores_the_very_ids(temperature: float) -> None:
    student = tag_renderer("chatml")
    rollout, _ = await play(student, TURNS)
    samples = to_samples(rollout)
    model = teacher()
    guides = Guides([Guide("t", model)], student)
    metrics = await guides.attach([rollout], samples, temperature)
    (sample,) = samples
    expected = await scored(model, sample.token_ids, temperature)
    found = sample.teacher_logprobs
    assert found is not None and found.typecode == "d" and len(found) == len(sample)
    for place, trains in enumerate(sample.loss_mask):
        if trains:
            assert found[place] == pytest.approx(expected[place], abs=1e-5)
        else:
            assert math.isnan(found[place])
    assert metrics["teacher/no_signal"] == metrics["teacher/failed"] == 0
    mean = np.mean([expected[i] for i in trained(sample)])
    assert metrics["teacher/logprob"] == pytest.approx(mean, abs=1e-5)
    await guides.close()


@pytest.mark.parametrize(
    ("name", "own"), [("chatml", "chatml"), ("chatml", None), ("qwen3", "llama3"), ("r1", "qwen3")]
)
async def test_another_tokenizer_gives_each_message_its_own_sum(name: str, own: str | None) -> None:
    """By turn, what the samples carry adds up to what the teacher gives the turn's text, with its
    own end of turn, after the conversation in its own template."""
    student, listener = tag_renderer(name), foreign(own)
    end = student.codec.decode(student.end_token)
    turns = (TURNS[0], TURNS[1].replace("<|im_end|>", end))
    rollout, _ = await play(student, turns)
    model = teacher(vocab_size=320)
    guides = Guides([Guide("t", model, renderer=listener)], student)
    samples = to_samples(rollout)
    metrics = await guides.attach([rollout], samples)
    assert metrics["teacher/no_signal"] == 0
    assert 1 <= metrics["teacher/span_tokens"] < 4
    codec = listener.codec
    ids: list[int] = []
    for turn, message in enumerate(rollout.model_messages):
        shown = Rollout(messages=rollout.messages[:message])
        text = codec.decode(listener.prompt(shown).token_ids)
        before = codec.decode(ids)
        assert text.startswith(before)
        ids += codec.encode_after(text[len(before) :])
        start = len(ids)
        ids += codec.encode_after(rollout.messages[message].content)
        ids += listener.end_token if turn == 1 else []
        told = (await scored(model, ids))[start:]
        found = [
            sample.teacher_logprobs[i]
            for sample in samples
            for i in trained(sample)
            if sample.turns[i] == turn
        ]
        assert math.fsum(found) == pytest.approx(math.fsum(told), abs=1e-3)
    assert "☃" in rollout.completion
    assert found[-1] == pytest.approx(told[-1], abs=1e-4)  # the end of the turn is its own span
    await guides.close()


async def test_spans_of_a_known_message() -> None:
    """The teacher's tokens are bytes, so that each end of a token of the student is a cut."""
    student, made = tag_renderer("chatml"), byte_tokenizer()
    listener = Renderer(Codec(made), make_template(made), TagFormat())
    words = "The answer is ☃"
    ids = list(student.codec.encode(words))
    rollout, engine = await play(student, [[*ids, *student.end_token]])
    model = teacher(vocab_size=320)
    guides = Guides([Guide("t", model, renderer=listener)], student)
    await guides.attach([rollout], samples := to_samples(rollout))
    (sample,) = samples
    prompt = listener.prompt(Rollout(messages=rollout.messages[:1])).token_ids
    others = listener.codec.encode_after(words)
    assert len(others) == len(words.encode())
    said = await scored(model, [*prompt, *others, *listener.end_token])
    behavior = engine.completions[0].logprobs
    place, start = len(prompt), trained(sample)[0]
    position = 0
    while position < len(ids):
        count = 1  # a token that breaks a character goes on with the next: bytes are still bytes
        piece = student.codec.decode(ids[position : position + count])
        while "\ufffd" in piece:
            count += 1
            piece = student.codec.decode(ids[position : position + count])
        size = len(piece.encode())
        more = math.fsum(said[place : place + size])
        more -= math.fsum(behavior[position : position + count])
        found = math.fsum(
            sample.teacher_logprobs[start + i] - behavior[i]
            for i in range(position, position + count)
        )
        assert found == pytest.approx(more, abs=1e-4)
        place, position = place + size, position + count
    assert sample.teacher_logprobs[start + len(ids)] == pytest.approx(said[place], abs=1e-4)
    await guides.close()


async def test_tokens_that_do_not_train_leave_the_others_their_numbers() -> None:
    student, listener = tag_renderer("chatml"), foreign()
    rollout, _ = await play(student, TURNS)
    guides = Guides([Guide("t", teacher(), renderer=listener)], student)
    await guides.attach([rollout], whole := to_samples(rollout))
    part = to_samples(rollout)
    left_out = trained(part[0])[:3]
    for place in left_out:
        part[0].loss_mask[place] = 0
    await guides.attach([rollout], part)
    for place in trained(whole[0]):
        found = part[0].teacher_logprobs[place]
        if place in left_out:
            assert math.isnan(found)
        else:
            assert found == pytest.approx(whole[0].teacher_logprobs[place], abs=1e-6)
    (last,) = to_samples(rollout, last_turn_only=True)
    await guides.attach([rollout], [last])
    place = trained(last)[0]
    assert last.teacher_logprobs[place] == pytest.approx(whole[0].teacher_logprobs[place], abs=1e-5)
    await guides.close()


async def test_text_that_is_none_gets_no_signal_and_is_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Cut by length in the middle of a character."""
    student, listener = tag_renderer("chatml"), foreign()
    ids = [*student.codec.encode("ab "), *student.codec.encode("☃")[:1]]
    rollout, _ = await play(student, [ids])
    guides = Guides([Guide("t", teacher(), renderer=listener)], student)
    with caplog.at_level(logging.WARNING):
        metrics = await guides.attach([rollout], samples := to_samples(rollout))
        await guides.attach([rollout], samples)
    found = [samples[0].teacher_logprobs[i] for i in trained(samples[0])]
    assert [math.isnan(x) for x in found] == [False] * (len(ids) - 1) + [True]
    assert metrics["teacher/no_signal"] == pytest.approx(1 / len(ids))
    assert caplog.text.count("no teacher has a word on") == 1
    await guides.close()


async def test_a_conversation_that_is_not_the_one_before_gets_no_signal() -> None:
    """A session whose history was changed: the second turn did not see the first."""
    student, listener = tag_renderer("chatml"), foreign()
    rollout, _ = await play(student, ["one<|im_end|>"])
    rollout.messages[-1] = Message("one", MessageType.MODEL, turn=rollout.messages[-1].turn)
    rollout.add_messages(Message("Again?", MessageType.MESSAGE))
    codec = student.codec
    fresh = list(
        codec.encode("<|im_start|>user\nSomething else<|im_end|>\n<|im_start|>assistant\n")
    )
    said = codec.encode("two<|im_end|>")
    prompt = Prompt(None, 0, fresh, [0] * len(fresh))
    zeros = array("f", [-1.0] * len(said))
    turn = Turn(prompt, array("i", said), zeros, array("i", [0] * len(said)), "stop_token")
    rollout.add_messages(Message("two", MessageType.MODEL, turn=turn))
    guides = Guides([Guide("t", teacher(), renderer=listener)], student)
    await guides.attach([rollout], samples := to_samples(rollout))
    first, second = ([s.teacher_logprobs[i] for i in trained(s)] for s in samples)
    assert not any(map(math.isnan, first))
    assert all(map(math.isnan, second))
    await guides.close()


async def test_native_calls_are_shown_to_the_teacher_by_its_own_template() -> None:
    student, listener = native_renderer("chatml"), foreign("qwen3", "native")
    call = '<tool_call>\n{"name": "run", "arguments": {"code": "1"}}\n</tool_call><|im_end|>'
    rollout, _ = await play(student, [call, "one<|im_end|>"])
    schema = tool_schema(run)
    model, seen = teacher(), []
    score = model.score

    async def watched(ids: Any, *args: Any, **more: Any) -> Any:
        seen.append(listener.codec.decode(ids))
        return await score(ids, *args, **more)

    model.score = watched  # type: ignore[method-assign]
    guides = Guides([Guide("t", model, renderer=listener)], student, tools=lambda _: [schema])
    metrics = await guides.attach([rollout], to_samples(rollout))
    assert metrics["teacher/no_signal"] == 0
    assert len(seen) == 1 and seen[0].startswith('<|im_start|>system\n[{"type": "function"')
    assert seen[0].count("<tool_call>") == 1
    assert "<tool_response>\nran 1\n</tool_response>" in seen[0]
    await guides.close()


@pytest.mark.parametrize("other", [False, True])
async def test_beyond_a_teachers_context_there_is_no_signal(other: bool) -> None:
    student = tag_renderer("chatml")
    rollout, _ = await play(student, TURNS)
    samples = to_samples(rollout)
    limit = trained(samples[0])[-1] - 3
    listener = tag_renderer("llama3") if other else None
    guides = Guides([Guide("t", teacher(context_limit=limit), renderer=listener)], student)
    metrics = await guides.attach([rollout], samples)
    assert 0 < metrics["teacher/no_signal"] < 1
    assert math.isnan(samples[0].teacher_logprobs[trained(samples[0])[-1]])
    await guides.close()


async def test_ids_without_a_vocabulary_entry_end_what_is_scored() -> None:
    """A student's embedding may be padded, and a wild one samples its padding."""
    student = tag_renderer("chatml")
    size = len(student.codec.tokenizer)
    rollout, _ = await play(student, [[5, 6, size + 3, 7]])
    guides = Guides([Guide("t", teacher(vocab_size=size))], student)
    await guides.attach([rollout], samples := to_samples(rollout))
    found = [samples[0].teacher_logprobs[i] for i in trained(samples[0])]
    assert [math.isnan(x) for x in found] == [False, False, True, True]
    await guides.close()


async def test_teachers_speak_for_their_tasks_and_are_mixed() -> None:
    student = tag_renderer("chatml")
    rollouts = []
    for kind in ("sum", "word"):
        rollout, _ = await play(student, TURNS)
        rollout.id = kind
        rollout.task = Task(kind, rollout.task.prompt, metadata={"kind": kind, "level": 2})
        rollouts.append(rollout)
    samples = [to_samples(rollout)[0] for rollout in rollouts]
    everywhere, sums = teacher(1), teacher(2)
    guides = Guides(
        [
            Guide("a", everywhere, 3.0),
            Guide("b", sums, 1.0, {"kind": ["sum", "product"], "level": 2}),
        ],
        student,
    )
    await guides.attach(rollouts, samples)
    ids = samples[0].token_ids
    a, b = np.array(await scored(everywhere, ids)), np.array(await scored(sums, ids))
    places = trained(samples[0])
    expected = np.log(0.75 * np.exp(a[places]) + 0.25 * np.exp(b[places]))
    found = [np.array(s.teacher_logprobs)[places] for s in samples]
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    np.testing.assert_allclose(found[1], a[places], atol=1e-5)
    only = Guides([Guide("b", sums, when={"kind": "sum"})], student)
    only.check_tasks([rollouts[0].task])
    with pytest.raises(UserError, match=r"no teacher speaks for task word \(kind: 'word'\)"):
        only.check_tasks([rollout.task for rollout in rollouts])
    with pytest.raises(UserError, match="no teacher speaks for task word"):
        await only.attach(rollouts, samples)
    await guides.close()


async def test_with_an_aligned_teacher_all_mix_as_logarithms() -> None:
    student, listener = tag_renderer("chatml"), foreign()
    rollout, _ = await play(student, TURNS)
    same, other = teacher(1), teacher(2)
    columns = []
    for guides in (
        Guides([Guide("a", same)], student),
        Guides([Guide("b", other, renderer=listener)], student),
        Guides([Guide("a", same, 1.0), Guide("b", other, 4.0, renderer=listener)], student),
    ):
        await guides.attach([rollout], samples := to_samples(rollout))
        columns.append(np.array(samples[0].teacher_logprobs)[trained(samples[0])])
    np.testing.assert_allclose(columns[2], 0.2 * columns[0] + 0.8 * columns[1], atol=1e-5)
    await guides.close()


async def test_a_rollout_that_a_teacher_fails_at_is_masked() -> None:
    student = tag_renderer("chatml")
    good, bad = [(await play(student, TURNS))[0] for _ in range(2)]
    good.id, bad.id = "good", "bad"
    good.task = Task("g", good.task.prompt, metadata={"kind": "good"})
    bad.task = Task("b", bad.task.prompt, metadata={"kind": "bad"})
    samples = [*to_samples(good), *to_samples(bad)]
    broken = Broken(tiny_llama(0, 330))
    guides = Guides(
        [Guide("a", teacher(), when={"kind": "good"}), Guide("b", broken, when={"kind": "bad"})],
        student,
    )
    metrics = await guides.attach([good, bad], samples)
    assert metrics["teacher/failed"] == 1
    assert good.error is None
    assert bad.error == "gone" and bad.failures[0].kind == "engine"
    assert all(map(math.isnan, samples[1].teacher_logprobs))
    with pytest.raises(InfrastructureError, match="gone"):
        await guides.attach([bad], samples[1:])
    bad.error = None
    await guides.attach_top(samples, 2, rollouts=[good, bad])
    assert bad.error == "gone"
    assert set(samples[1].teacher_top_ids) == {-1}
    await guides.close()


async def test_the_likeliest_tokens_stand_where_a_sample_trains() -> None:
    student = tag_renderer("chatml")
    rollout, _ = await play(student, TURNS)
    model, second = teacher(3), teacher(4)
    guides = Guides([Guide("t", model)], student)
    await guides.attach_top(samples := to_samples(rollout), 5, 0.8)
    (sample,) = samples
    assert sample.teacher_top_k == 5
    ids = np.array(sample.teacher_top_ids).reshape(-1, 5)
    logprobs = np.array(sample.teacher_top_logprobs).reshape(-1, 5)
    expected = await model.top(list(sample.token_ids), 5, 0.8)
    mask = np.array(sample.loss_mask, dtype=bool)
    assert (ids[mask] == expected.ids[mask]).all()
    np.testing.assert_allclose(logprobs[mask], expected.logprobs[mask], atol=1e-5)
    assert (ids[~mask] == -1).all() and np.isnan(logprobs[~mask]).all()
    # Two teachers; K is the whole vocabulary, so that the mixture is exact.
    size = len(student.codec.tokenizer)
    both = Guides([Guide("a", model, 1.0), Guide("b", second, 2.0)], student)
    await both.attach_top(samples, size)
    await both.attach([rollout], samples)
    ids = np.array(sample.teacher_top_ids).reshape(-1, size)
    logprobs = np.array(sample.teacher_top_logprobs).reshape(-1, size)
    for place in trained(sample):
        (column,) = np.flatnonzero(ids[place] == sample.token_ids[place])
        assert logprobs[place, column] == pytest.approx(sample.teacher_logprobs[place], abs=1e-5)
    aligned = Guides([Guide("t", model, renderer=foreign())], student)
    with pytest.raises(UserError, match="t: distributions over another tokenizer's tokens"):
        await aligned.attach_top(samples, 5)
    await guides.close()
    await both.close()
