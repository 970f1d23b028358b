"""Tool formats: text to calls and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrain.rendering import FencedFormat, NativeFormat, TagFormat, ToolFormat, make_template
from retrain.types import TagConfig, ToolCall, UserError
from scripted import TEMPLATES, native_renderer, tokenizer


def schema(name: str, *parameters: str, required: tuple[str, ...] | None = None) -> dict[str, Any]:
    properties = {p: {"type": "string"} for p in parameters}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Do {name}.",
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(parameters if required is None else required),
            },
        },
    }


RUN = schema("run", "code", "seconds", required=("code",))
ADD = schema("add", "a", "b")


def parsed(form: ToolFormat, text: str, *tools: Any) -> list[tuple[str, dict[str, Any]]]:
    calls = form.parse(text, tools)
    assert [c.error for c in calls] == [None] * len(calls)
    assert [c.id for c in calls] == [str(i) for i in range(len(calls))]
    return [(c.name, dict(c.arguments)) for c in calls]


def errors(form: ToolFormat, text: str, *tools: Any) -> list[str]:
    return [c.error or "" for c in form.parse(text, tools)]


def test_tags_two_calls_and_text_after() -> None:
    text = "a <code>1</code> b <code>\n  2\n</code> answer"
    assert parsed(TagFormat(), text, RUN) == [("run", {"code": "1"}), ("run", {"code": "2"})]


def test_tags_partial_empty_and_stray() -> None:
    form = TagFormat()
    assert form.parse("a <cod", [RUN]) == ()
    assert form.parse("a </code> b", [RUN]) == ()
    assert parsed(form, "<code></code>", RUN) == [("run", {"code": ""})]
    assert "never ends with </code>" in errors(form, "<code>1</cod", RUN)[0]


def test_tags_nested_and_inside_a_string_end_at_the_first_close() -> None:
    form = TagFormat()
    assert parsed(form, "<code>a<code>b</code>c</code>", RUN) == [("run", {"code": "a<code>b"})]
    assert parsed(form, "<code>print('</code>')", RUN) == [("run", {"code": "print('"})]


def test_tags_that_are_parts_of_each_other() -> None:
    form = TagFormat(TagConfig("<<", "<<>", "[", "]"))
    assert parsed(form, "<<1<<>", RUN) == [("run", {"code": "1"})]


def test_a_tool_that_needs_two_arguments_takes_json() -> None:
    form = TagFormat()
    call = ToolCall("add", {"a": "1", "b": "2"}, "0")
    body = form.render_call(call, [ADD])
    assert body == '<code>{"name": "add", "arguments": {"a": "1", "b": "2"}}</code>'
    assert parsed(form, body, ADD) == [("add", {"a": "1", "b": "2"})]
    assert "must be JSON" in errors(form, "<code>1 + 2</code>", ADD)[0]
    assert '"name": ...' in form.describe([ADD])


def test_json_that_names_a_tool_is_a_call_of_it_also_where_there_is_another_one() -> None:
    tags = TagFormat(TagConfig())
    for name in ("run", "python"):
        text = f'<code>{{"name": "{name}", "arguments": {{"code": "1"}}}}</code>'
        assert parsed(tags, text, RUN) == [(name, {"code": "1"})]
    body = '{"name": "x", "code": 1}'
    assert parsed(tags, f"<code>{body}</code>", RUN) == [("run", {"code": body})]


def test_several_tools_take_json_and_errors_name_them() -> None:
    form = TagFormat()
    text = '<code>{"name": "run", "arguments": {"code": "1"}}</code>'
    assert parsed(form, text, RUN, ADD) == [("run", {"code": "1"})]
    assert "tools: run, add" in errors(form, "<code>{</code>", RUN, ADD)[0]
    assert 'with a "name"' in errors(form, "<code>[1]</code>", RUN, ADD)[0]
    wrong = '<code>{"name": "run", "arguments": 3}</code>'
    assert "must be a JSON object" in errors(form, wrong, RUN, ADD)[0]


@pytest.mark.parametrize("body", ["[" * 100_000, "9" * 5_000, '{"name": "\\ud800"', "\x00"])
def test_json_that_breaks_a_parser_is_the_models_fault(body: str) -> None:
    assert errors(TagFormat(), f"<code>{body}</code>", RUN, ADD) != [""]
    native = native_renderer("chatml").tool_format
    assert native is not None
    assert errors(native, f"<tool_call>{body}</tool_call>", RUN) != [""]


def test_fenced_blocks() -> None:
    form = FencedFormat()
    text = "Let's see:\n```python\nprint(1)\n```\nthen ```python\nx = 2\n```"
    assert parsed(form, text, RUN) == [("run", {"code": "print(1)"}), ("run", {"code": "x = 2"})]
    assert parsed(form, "```python\nprint('```')\n```\n", RUN) == [
        ("run", {"code": "print('```')"})
    ]
    assert parsed(form, "```python\n```", RUN) == [("run", {"code": ""})]
    assert form.parse("```json\n{}\n```\n", [RUN]) == ()
    assert "never closed" in errors(form, "```python\nprint(1)", RUN)[0]
    assert form.render_result("5") == "```output\n5\n```\n"
    assert form.render_call(ToolCall("run", {"code": "1"}), [RUN]) == "```python\n1\n```\n"


def test_native_markers_in_strings_and_text_around() -> None:
    form = native_renderer("chatml").tool_format
    assert form is not None
    call = ToolCall("run", {"code": "'</tool_call><tool_call>'"}, "0")
    text = f"first {form.render_call(call, [RUN])} then {form.render_call(call, [RUN])} after"
    assert parsed(form, text, RUN) == [("run", dict(call.arguments))] * 2
    assert form.parse("no call, <tool_cal", [RUN]) == ()
    assert "never ends" in errors(form, '<tool_call>\n{"name": "run"', RUN)[0]
    assert "more text" in errors(form, '<tool_call>{"name": "run"} x</tool_call>', RUN)[0]
    assert form.markers == ("<tool_call>", "</tool_call>")


def test_bare_json_is_a_call_only_with_a_name() -> None:
    form = native_renderer("llama3").tool_format
    assert form is not None
    one = '{"name": "run", "parameters": {"code": "1"}}'
    assert parsed(form, f"\n{one}\n", RUN) == [("run", {"code": "1"})]
    assert parsed(form, f"{one}; {one}", RUN) == [("run", {"code": "1"})] * 2
    assert form.parse('{"answer": 4}', [RUN]) == ()
    assert form.parse("{1, 2} is the set", [RUN]) == ()
    assert "not valid JSON" in errors(form, '{"name": "run", ', RUN)[0]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3"])
def test_native_format_reads_what_its_template_writes(name: str) -> None:
    form = native_renderer(name).tool_format
    assert form is not None
    call = ToolCall("run", {"code": "é\n\"'}]"}, "0")
    assert parsed(form, form.render_call(call, [RUN]), RUN) == [("run", dict(call.arguments))]


def test_native_format_where_the_prompt_opens_the_reasoning() -> None:
    made = tokenizer("chatml", "<|thinking|>")
    template = str(TEMPLATES["chatml"])
    made.chat_template = template.removesuffix("{% endif %}") + "<think>\n{% endif %}"
    form = NativeFormat(make_template(made))
    assert form.markers == ("<tool_call>", "</tool_call>")
    call = form.render_call(ToolCall("run", {"code": "1"}), [RUN])
    assert parsed(form, f"maybe <tool_call>?\n</think>\n\n{call}", RUN) == [("run", {"code": "1"})]
    assert form.parse(f"still {call}", [RUN]) == ()


def test_native_calls_that_reasoning_only_speaks_of_are_not_made() -> None:
    form = native_renderer("qwen3").tool_format
    assert form is not None
    call = form.render_call(ToolCall("run", {"code": "</think>"}), [RUN])
    assert form.parse(f"<think>\n{call}\n", [RUN]) == ()
    text = f"<think>\nshould I <tool_call>?\n</think>\n\n{call}"
    assert parsed(form, text, RUN) == [("run", {"code": "</think>"})]
    assert parsed(form, call, RUN) == [("run", {"code": "</think>"})]


@pytest.mark.parametrize("name", ["strict", "mistral", "r1", "no_glue", "plain"])
def test_native_needs_a_template_with_tools(name: str) -> None:
    with pytest.raises(UserError) as raised:
        NativeFormat(make_template(tokenizer(name)))
    assert "tags or fenced" in raised.value.next_step


def test_native_needs_json_calls() -> None:
    made = tokenizer("chatml", "<|other|>")
    made.chat_template = (
        "{{ tools }}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<f={{ c.function.name }}>{% endfor %};{% endfor %}"
    )
    with pytest.raises(UserError, match="does not write tool calls as JSON"):
        NativeFormat(make_template(made))


def test_describe_names_tools_and_tags() -> None:
    about = TagFormat().describe([RUN])
    assert "- run(code: string, seconds: string): Do run." in about
    assert "write <code>code</code>" in about
    assert "between <interpreter> and </interpreter>" in about
    assert "```python\ncode\n```" in FencedFormat().describe([RUN])


TAG = st.text("<>/[]|ab", min_size=1, max_size=6)
JSON = st.dictionaries(st.text(max_size=5), st.text(max_size=10) | st.integers(), max_size=3)


@given(st.lists(TAG, min_size=4, max_size=4, unique=True), JSON, st.integers(1, 3))
def test_structured_calls_survive_any_tags(
    tags: list[str], arguments: dict[str, Any], count: int
) -> None:
    form = TagFormat(TagConfig(*tags))
    call = ToolCall("add", arguments, "0")
    written = form.render_call(call, [ADD, RUN])
    body = json.dumps({"name": "add", "arguments": arguments}, ensure_ascii=False)
    at = (body + tags[1]).find(tags[1])
    if at < len(body):
        return
    assert parsed(form, written * count, ADD, RUN)[0] == ("add", arguments)


@given(st.text(max_size=200))
def test_any_text_parses(text: str) -> None:
    native = native_renderer("chatml").tool_format
    bare = native_renderer("llama3").tool_format
    assert native is not None and bare is not None
    for form in (TagFormat(), FencedFormat(), native, bare):
        for prefix in ("", "<code>", "```python\n", "<tool_call>", '{"name": '):
            for call in form.parse(prefix + text, [RUN, ADD]):
                assert call.error is None or call.error


@given(JSON)
def test_native_round_trip(arguments: dict[str, Any]) -> None:
    for name in ("chatml", "llama3"):
        form = native_renderer(name).tool_format
        assert form is not None
        written = form.render_call(ToolCall("add", arguments), [ADD])
        assert parsed(form, f"{written}", ADD) == [("add", arguments)]
