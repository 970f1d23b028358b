"""SFT traces through the renderer: what trains, and that the tokens are the template's own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrain.envs import DialogueEnvironment, ScriptedUser
from retrain.rendering import Codec, Renderer, TagFormat, make_template
from retrain.rollout import to_samples
from retrain.tools import tool_schema
from retrain.types import (
    Message,
    MessageType,
    Rollout,
    Source,
    TagConfig,
    ToolCall,
    UserError,
)
from scripted import (
    TAGS,
    check_ledger,
    model,
    native_renderer,
    plain_renderer,
    play,
    run,
    tag_renderer,
    tokenizer,
    tool_result,
    user,
)

SCHEMA = tool_schema(run)


def entered(renderer: Renderer, *messages: Message, tools: Any = ()) -> Rollout:
    rollout = Rollout()
    rollout.add_messages(*messages)
    renderer.enter(rollout, tools)
    return rollout


def targets(renderer: Renderer, rollout: Rollout) -> list[str]:
    """The decoded text of each run of TARGET tokens, one per span."""
    found = []
    for segment in rollout.segments:
        covered = 0
        for span in segment.turns:
            own = slice(span.start, span.end)
            assert set(segment.source[own]) == {Source.TARGET}
            covered += span.end - span.start
            found.append(renderer.codec.decode(segment.token_ids[own]))
        assert covered == sum(1 for s in segment.source if s == Source.TARGET)
    return found


def canonical(name: str, messages: list[dict[str, Any]], extra: Any = (), **options: Any) -> Any:
    encoded = tokenizer(name, *extra).apply_chat_template(
        messages, tokenize=True, return_dict=True, **options
    )
    return list(encoded["input_ids"])


def entry(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("strict", "<|im_end|>"),
        ("no_glue", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
    ],
)
def test_two_turn_trace_equals_apply_chat_template(name: str, end: str) -> None:
    renderer = plain_renderer(name)
    rollout = entered(renderer, user("a"), model("It is 5."), user("b"), model("😀 6 \n"))
    expected = canonical(
        name,
        [
            entry("user", "a"),
            entry("assistant", "It is 5."),
            entry("user", "b"),
            entry("assistant", "😀 6 \n"),
        ],
    )
    last = {"llama3": "😀 6", "qwen3": "<think>\n\n</think>\n\n😀 6 \n"}.get(name, "😀 6 \n")
    assert list(rollout.full_token_ids()) == expected
    assert rollout.num_forks == 0
    assert targets(renderer, rollout) == [f"It is 5.{end}", last + end]


def test_mistral_trace_equals_apply_chat_template() -> None:
    renderer = plain_renderer("mistral")
    rollout = entered(renderer, user("a"), model("5"), user("b"), model("6"))
    expected = canonical(
        "mistral",
        [entry("user", "a"), entry("assistant", "5"), entry("user", "b"), entry("assistant", "6")],
    )
    assert list(rollout.full_token_ids()) == expected
    assert targets(renderer, rollout) == [" 5<eos>", " 6<eos>"]


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3"])
def test_structured_calls_through_the_native_template(name: str) -> None:
    renderer = native_renderer(name)
    call = ToolCall("run", {"code": "print('<|x|>')"}, "0")
    rollout = entered(
        renderer, user("a"), model("", call), tool_result("5"), model("It is 5."), tools=[SCHEMA]
    )
    function = {"name": "run", "arguments": {"code": "print('<|x|>')"}}
    expected = canonical(
        name,
        [
            entry("user", "a"),
            entry("assistant", "", tool_calls=[{"type": "function", "function": function}]),
            entry("tool", "5", name="run", tool_call_id="0"),
            entry("assistant", "It is 5."),
        ],
        tools=[SCHEMA],
    )
    assert list(rollout.full_token_ids()) == expected
    first, second = targets(renderer, rollout)
    assert '"name": "run"' in first and first.endswith(("<|im_end|>", "<|eot_id|>"))
    assert "It is 5." in second
    assert renderer.tool_format is not None
    parsed = renderer.tool_format.parse(
        first.removesuffix("<|im_end|>").removesuffix("<|eot_id|>"), [SCHEMA]
    )
    assert [(c.name, dict(c.arguments)) for c in parsed] == [("run", dict(call.arguments))]


def test_reasoning_trains_in_its_turn_and_the_next_prompt_is_a_fork() -> None:
    renderer = plain_renderer("qwen3")
    rollout = entered(
        renderer, user("a"), model("5", reasoning="hm"), user("b"), model("6", reasoning="so")
    )
    assert targets(renderer, rollout) == [
        "<think>\nhm\n</think>\n\n5<|im_end|>",
        "<think>\nso\n</think>\n\n6<|im_end|>",
    ]
    assert [s.parent for s in rollout.segments] == [None, 0]
    messages = [
        entry("user", "a"),
        entry("assistant", "5", reasoning_content="hm"),
        entry("user", "b"),
        entry("assistant", "6", reasoning_content="so"),
    ]
    first = list(rollout.full_token_ids(0))
    assert first == canonical("qwen3", messages[:2])[: len(first)]
    assert list(rollout.full_token_ids()) == canonical("qwen3", messages)
    assert [sum(s.loss_mask) for s in to_samples(rollout, "cross_entropy")] == [
        len(renderer.codec.encode(t)) for t in targets(renderer, rollout)
    ]


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_reasoning_that_the_template_has_no_place_for_is_kept_and_forks(name: str) -> None:
    renderer = plain_renderer(name)
    rollout = entered(renderer, user("a"), model("5hm", reasoning="hm"), user("b"), model("6"))
    assert targets(renderer, rollout)[0].startswith("<think>\nhm\n</think>\n\n5hm<")
    assert rollout.num_forks == 1
    assert "<think>" not in renderer.codec.decode(rollout.full_token_ids())


def test_reasoning_between_inline_calls_is_kept() -> None:
    renderer = tag_renderer("chatml", *TAGS)
    call = ToolCall("run", {"code": "1"})
    rollout = entered(
        renderer,
        user("a"),
        model("x", call),
        tool_result("1"),
        model("y", reasoning="hm"),
        tools=[SCHEMA],
    )
    assert targets(renderer, rollout) == ["x<code>1</code>", "<think>\nhm\n</think>\n\ny<|im_end|>"]


def test_reasoning_after_a_prompt_that_opens_it() -> None:
    renderer = plain_renderer("r1")
    rollout = entered(renderer, user("a"), model("5", reasoning="hm"), user("b"), model("6"))
    assert targets(renderer, rollout) == ["hm\n</think>\n\n5<eos>", "\n</think>\n\n6<eos>"]
    final = canonical(
        "r1",
        [entry("user", "a"), entry("assistant", "5"), entry("user", "b"), entry("assistant", "6")],
    )
    assert list(rollout.full_token_ids()) == final


def test_assistant_messages_of_others_never_train() -> None:
    renderer = plain_renderer("chatml")
    other = Message("not mine", MessageType.MESSAGE, role="assistant")
    rollout = entered(renderer, user("a"), other, user("b"), model("mine"))
    assert targets(renderer, rollout) == ["mine<|im_end|>"]
    assert list(rollout.full_token_ids()) == canonical(
        "chatml",
        [
            entry("user", "a"),
            entry("assistant", "not mine"),
            entry("user", "b"),
            entry("assistant", "mine"),
        ],
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3"])
def test_inline_tag_trace_equals_apply_chat_template(name: str) -> None:
    renderer = tag_renderer(name, *TAGS)
    call = ToolCall("run", {"code": "1"})
    rollout = entered(
        renderer,
        user("a"),
        model("x ", call),
        tool_result("ran 1"),
        model("", call),
        tool_result("again"),
        model(" so 5"),
        user("b"),
        model("6"),
        tools=[SCHEMA],
    )
    whole = (
        "x <code>1</code><interpreter>ran 1</interpreter>"
        "<code>1</code><interpreter>again</interpreter> so 5"
    )
    expected = canonical(
        name,
        [
            entry("user", "a"),
            entry("assistant", whole),
            entry("user", "b"),
            entry("assistant", "6"),
        ],
        extra=TAGS,
    )
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    assert list(rollout.full_token_ids()) == expected
    assert rollout.num_forks == 0
    said = targets(renderer, rollout)
    assert said[:3] == ["x <code>1</code>", "<code>1</code>", f" so 5{end}"]


def test_tokenizer_with_truncation_switched_on_still_gives_every_token() -> None:
    made = tokenizer("chatml")
    codec = Codec(made)
    made.backend_tokenizer.enable_truncation(3)
    try:
        assert codec.decode(codec.encode("a long enough text")) == "a long enough text"
    finally:
        made.backend_tokenizer.no_truncation()


def test_tokenizer_without_an_end_token_is_refused() -> None:
    made = tokenizer("chatml")
    made.eos_token = None
    try:
        with pytest.raises(UserError, match="end-of-sequence"):
            Codec(made)
    finally:
        made.eos_token = "<eos>"


def test_words_after_a_first_word_prefix_are_encoded_as_in_context() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", "a", "b", ">"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(["</s>"])
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert codec.encode("ab") == (1, 2, 3)
    assert codec.encode_after("ab") == (2, 3)


@given(st.text(max_size=60), st.lists(st.text("`<|>ab ", min_size=1, max_size=5), max_size=4))
@settings(max_examples=200)
def test_neutralised_text_holds_no_marker(text: str, markers: list[str]) -> None:
    markers = [m.strip() for m in markers if m.strip()]
    codec = Codec(tokenizer("chatml"))
    safe = codec.neutralise(text + "".join(markers) + "<|im_end|>", markers)
    assert not any(marker in safe for marker in (*markers, *codec.special_tokens))


TAG = st.text("<>/[]|ab c{", min_size=1, max_size=6).filter(lambda t: bool(t.strip()))
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    st.lists(TAG, min_size=4, max_size=4, unique=True),
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    WORDS,
    st.sampled_from(["chatml", "llama3", "qwen3", "no_glue", "plain", "r1"]),
)
@settings(max_examples=60)
async def test_any_words_with_any_tags_keep_the_ledger(
    tags: list[str], calls: list[tuple[str, str]], answer: str, name: str
) -> None:
    made = tokenizer(name)
    renderer = Renderer(Codec(made), make_template(made), TagFormat(TagConfig(*tags)))
    turns = [f"{words}{tags[0]}{code}{tags[1]}" for words, code in calls]
    rollout, engine = await play(renderer, [*turns, answer + "<eos>", "<eos>"])
    renderer.enter(rollout)
    check_ledger(rollout, engine)
    trained = sum(sum(s.loss_mask) for s in to_samples(rollout))
    assert trained == sum(len(c.token_ids) for c in engine.completions)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 379), max_size=8), st.booleans(), WORDS),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["chatml", "qwen3", "llama3", "mistral", "r1", "strict", "no_glue", "plain"]),
)
@settings(max_examples=150)
async def test_any_sampled_tokens_give_prompts_that_read_as_the_template_writes_them(
    turns: list[tuple[list[int], bool, str]], name: str
) -> None:
    renderer = plain_renderer(name)
    stops = renderer.codec.stop_token_ids
    eos = renderer.codec.encode("<eos>")[0]
    end = max(stops)
    scripted = [
        [*(t for t in ids if t not in stops), end if usual else eos] for ids, usual, _ in turns
    ]
    replies = [reply for *_, reply in turns[1:]]
    world = DialogueEnvironment(ScriptedUser(replies))
    rollout, engine = await play(renderer, scripted, environment=world)
    for number, request in enumerate(engine.requests):
        shown = renderer.codec.decode(request.prompt_ids)
        written = renderer.template.text(rollout.messages[: 2 * number + 1], (), generation=True)
        assert "".join(shown.split()) == "".join(written.split())


@given(
    st.lists(st.tuples(WORDS, st.none() | WORDS), min_size=1, max_size=4),
    st.sampled_from(["chatml", "qwen3", "llama3", "mistral", "r1", "strict", "no_glue", "plain"]),
)
@settings(max_examples=80)
def test_any_trace_ends_as_its_template_writes_it(
    turns: list[tuple[str, str | None]], name: str
) -> None:
    renderer = plain_renderer(name)
    messages = [
        m for words, reasoning in turns for m in (user(words), model(words, reasoning=reasoning))
    ]
    rollout = entered(renderer, *messages)
    said = targets(renderer, rollout)
    assert len(said) == len(turns)
    text = renderer.codec.decode(rollout.full_token_ids())
    plain = renderer.template.text(messages, (), generation=False)
    assert plain.endswith(text[-5:])
    if rollout.num_forks == 0:
        assert "".join(text.split()) == "".join(plain.split())
