"""How a policy writes tool calls, and how it reads their results.

A format parses text that is already known to be the policy's own; it is never used to find out
which tokens train.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from typing import Any, Protocol

from retrain.rendering.templates import Template, ToolSchema
from retrain.types import Message, MessageType, TagConfig, ToolCall, UserError


class ToolFormat(Protocol):
    inline: bool
    """True: results are written into the assistant's own turn, which then goes on. False: they
    are messages of their own, and the chat template writes them."""
    stop: tuple[str, ...]
    """Strings that end a generation."""
    markers: tuple[str, ...]
    """What a tool's output must not be able to forge."""
    opening: str
    """What a call begins with; empty where a call is a whole message."""

    def parse(self, text: str, tools: Sequence[ToolSchema]) -> tuple[ToolCall, ...]:
        """The calls in one MODEL message; a broken one carries `error`."""
        ...

    def render_call(self, call: ToolCall, tools: Sequence[ToolSchema]) -> str:
        """The text of a call, for traces that hold it in structured form."""
        ...

    def render_result(self, text: str) -> str:
        """The text that puts a result into the assistant's turn; only used when inline."""
        ...

    def describe(self, tools: Sequence[ToolSchema]) -> str:
        """What a system message may say about the tools and how to call them."""
        ...


class TagFormat:
    """Calls between two tags (ReTool, Router-R1).

    The first closing tag ends a call, also inside a string: that is where generation stops, and at
    `answer_end` (`</answer>`, say), where there is one.
    """

    inline = True

    def __init__(self, tags: TagConfig | None = None, *, answer_end: str | None = None) -> None:
        self.tags = tags or TagConfig()
        self.opening = self.tags.tool_start
        ends = (self.tags.tool_end, answer_end)
        self.stop: tuple[str, ...] = tuple(end for end in ends if end is not None)
        self.markers: tuple[str, ...] = (
            self.tags.tool_start.strip(),
            self.tags.tool_end.strip(),
            self.tags.response_start.strip(),
            self.tags.response_end.strip(),
        )

    def parse(self, text: str, tools: Sequence[ToolSchema]) -> tuple[ToolCall, ...]:
        calls: list[ToolCall] = []
        position = 0
        start, end = self.tags.tool_start, self.tags.tool_end
        while (opened := text.find(start, position)) >= 0:
            body_start = opened + len(start)
            closed = text.find(end, body_start)
            if closed < 0:
                error = f"a call starts with {start.strip()} but never ends with {end.strip()}"
                calls.append(ToolCall(_only_name(tools), {}, str(len(calls)), error))
                break
            calls.append(_call_from_body(text[body_start:closed], tools, str(len(calls))))
            position = closed + len(end)
        return tuple(calls)

    def render_call(self, call: ToolCall, tools: Sequence[ToolSchema]) -> str:
        start, end = self.tags.tool_start, self.tags.tool_end
        bodies = _bodies(call, tools)
        bodies.append(bodies[-1].replace(end, f"\\u{ord(end[0]):04x}{end[1:]}"))
        return _first_read_back(self, call, tools, [f"{start}{body}{end}" for body in bodies])

    def render_result(self, text: str) -> str:
        return f"{self.tags.response_start}{text}{self.tags.response_end}"

    def describe(self, tools: Sequence[ToolSchema]) -> str:
        return (
            f"{_describe_tools(tools)}\nTo use one, write {self.tags.tool_start}"
            f"{_placeholder(tools)}{self.tags.tool_end}. The result follows between "
            f"{self.tags.response_start.strip()} and {self.tags.response_end.strip()}."
        )


class FencedFormat:
    """Calls as fenced code blocks of one language, results as blocks of another.

    A block is closed by a fence alone on its line, so a fence inside a string is code.
    """

    inline = True

    def __init__(self, language: str = "python", output: str = "output") -> None:
        self.language = language
        self.output = output
        self._open = re.compile(rf"```{re.escape(language)}[ \t]*\n")
        self._close = re.compile(r"^[ \t]*```[ \t]*$", re.MULTILINE)
        self.opening = f"```{language}"
        self.stop: tuple[str, ...] = ("\n```\n",)
        self.markers: tuple[str, ...] = ("```",)

    def parse(self, text: str, tools: Sequence[ToolSchema]) -> tuple[ToolCall, ...]:
        calls: list[ToolCall] = []
        position = 0
        while opened := self._open.search(text, position):
            closed = self._close.search(text, opened.end())
            if closed is None:
                error = f"a ```{self.language} block is never closed with ```"
                calls.append(ToolCall(_only_name(tools), {}, str(len(calls)), error))
                break
            body = text[opened.end() : closed.start()]
            calls.append(_call_from_body(body, tools, str(len(calls))))
            position = closed.end()
        return tuple(calls)

    def render_call(self, call: ToolCall, tools: Sequence[ToolSchema]) -> str:
        texts = [f"```{self.language}\n{body}\n```\n" for body in _bodies(call, tools)]
        return _first_read_back(self, call, tools, texts)

    def render_result(self, text: str) -> str:
        return f"```{self.output}\n{text}\n```\n"

    def describe(self, tools: Sequence[ToolSchema]) -> str:
        return (
            f"{_describe_tools(tools)}\nTo use one, write\n```{self.language}\n"
            f"{_placeholder(tools)}\n```\nThe result follows in a ```{self.output} block."
        )


class NativeFormat:
    """The calls that the chat template itself writes, where they are JSON between two markers.

    The markers are read off the template by rendering a call with known names (Qwen, Hermes:
    `<tool_call>{...}</tool_call>`; Llama 3: bare JSON).

    Raises:
        UserError: the template has no tools, or writes calls in another way.
    """

    inline = False
    stop: tuple[str, ...] = ()

    def __init__(self, template: Template) -> None:
        if not template.supports_tools:
            raise UserError(
                "native tool calls need a tokenizer whose chat template takes tools; this one's "
                "does not",
                "Use environment.tool_format.type: tags or fenced.",
            )
        self._start, self._end, self._arguments_key = _probe_call(template)
        self.opening = self._start.strip()
        prompt = template.text([Message("x", MessageType.MESSAGE)], (), generation=True)
        self._prompt_opens_reasoning = prompt.rstrip().endswith("<think>")
        self.markers = tuple(m for m in (self._start.strip(), self._end.strip()) if m)

    def parse(self, text: str, tools: Sequence[ToolSchema]) -> tuple[ToolCall, ...]:
        text = self._after_reasoning(text)
        start = self._start.strip()
        if not start:
            return self._parse_bare(text.strip())
        calls: list[ToolCall] = []
        position = 0
        while (opened := text.find(start, position)) >= 0:
            call, position = self._parse_one(text, opened + len(start), str(len(calls)))
            calls.append(call)
        return tuple(calls)

    def _after_reasoning(self, text: str) -> str:
        """What follows a leading block of reasoning, which may speak of calls without making one;
        nothing where the block never ends."""
        if self._prompt_opens_reasoning or text.lstrip().startswith("<think>"):
            return text.partition("</think>")[2]
        return text

    def _parse_one(self, text: str, body_start: int, call_id: str) -> tuple[ToolCall, int]:
        """One call between markers, and where to go on. A marker inside a JSON string is text."""
        end = self._end.strip()
        try:
            data, after = _decode_json(text, body_start)
        except (ValueError, RecursionError) as error:
            closed = text.find(end, body_start) if end else -1
            reason = f"the call is not valid JSON: {error}"
            if end and closed < 0:
                reason = f"a call starts with {self._start.strip()} but never ends with {end}"
            return ToolCall("", {}, call_id, reason), len(text) if closed < 0 else closed + len(end)
        rest = text[after:].lstrip()
        if not rest.startswith(end):
            closed = text.find(end, after)
            reason = (
                f"a call starts with {self._start.strip()} but never ends with {end}"
                if closed < 0
                else f"between a call's JSON and {end} there is more text"
            )
            return ToolCall("", {}, call_id, reason), len(text) if closed < 0 else closed + len(end)
        return _call_from_json(data, call_id, self._arguments_key), len(text) - len(rest) + len(end)

    def _parse_bare(self, text: str) -> tuple[ToolCall, ...]:
        """A text that is JSON objects with a name, one after another; any other is an answer."""
        if not text.startswith("{") or '"name"' not in text:
            return ()
        calls: list[ToolCall] = []
        position = 0
        while position < len(text):
            call_id = str(len(calls))
            try:
                data, position = _decode_json(text, position)
            except (ValueError, RecursionError) as error:
                reason = f"the call is not valid JSON: {error}"
                return (*calls, ToolCall("", {}, call_id, reason))
            calls.append(_call_from_json(data, call_id, self._arguments_key))
            position += len(text[position:]) - len(text[position:].lstrip(" \t\r\n;"))
        return tuple(calls)

    def render_call(self, call: ToolCall, tools: Sequence[ToolSchema]) -> str:
        body = json.dumps(
            {"name": call.name, self._arguments_key: dict(call.arguments)}, ensure_ascii=False
        )
        return f"{self._start}{body}{self._end}"

    def render_result(self, text: str) -> str:
        return text

    def describe(self, tools: Sequence[ToolSchema]) -> str:
        return ""


def _probe_call(template: Template) -> tuple[str, str, str]:
    call = ToolCall("zqname", {"zqkey": "zqvalue"}, "zqid000id")
    schema = {
        "type": "function",
        "function": {
            "name": "zqname",
            "description": "",
            "parameters": {"type": "object", "properties": {"zqkey": {"type": "string"}}},
        },
    }
    question = Message("x", MessageType.MESSAGE)
    calling = Message("", MessageType.MODEL, tool_calls=(call,))
    speaking = Message(_PROBE, MessageType.MODEL)
    before = template.text([question], [schema], generation=True)
    try:
        text = template.text([question, calling], [schema], generation=False)
        spoken = template.text([question, speaking], [schema], generation=False)
    except UserError:
        text = spoken = ""
    opening = spoken.partition(_PROBE)[0]
    shared = next((t for t in (before, opening) if t and text.startswith(t)), text)
    written = text.removeprefix(shared)
    for key in ("arguments", "parameters"):
        pattern = rf'\{{\s*"name":\s*"zqname",\s*"{key}":\s*\{{\s*"zqkey":\s*"zqvalue"\s*\}}\s*\}}'
        if match := re.search(pattern, written):
            start = re.sub(r"<think>.*?</think>", "", written[: match.start()], flags=re.DOTALL)
            end = re.match(r"\s*(?:</[^<>|]+>|\[/[A-Z_]+\])?", written[match.end() :])
            return start.lstrip(), end.group() if end else "", key
    raise UserError(
        "this tokenizer's chat template does not write tool calls as JSON "
        '{"name": ..., "arguments": ...}, so they cannot be read back',
        "Use environment.tool_format.type: tags or fenced.",
    )


_PROBE = "zqcontent"


def _decode_json(text: str, position: int) -> tuple[Any, int]:
    """The JSON value that begins after white space at `position`, and where it ends.

    Raises:
        ValueError, RecursionError: it is not JSON, or too deep, or has too long a number.
    """
    position += len(text[position:]) - len(text[position:].lstrip())
    data, end = json.JSONDecoder().raw_decode(text, position)
    return data, end


def _name(schema: ToolSchema) -> str:
    return str(schema["function"]["name"])


def _only_name(tools: Sequence[ToolSchema]) -> str:
    return _name(tools[0]) if len(tools) == 1 else ""


def _first_parameter(schema: ToolSchema) -> str | None:
    properties = schema["function"].get("parameters", {}).get("properties", {})
    return next(iter(properties), None)


def _plain_parameter(tools: Sequence[ToolSchema]) -> str | None:
    """The parameter that a whole body stands for: the first of a sole tool that needs no other."""
    if len(tools) != 1:
        return None
    first = _first_parameter(tools[0])
    required = tools[0]["function"].get("parameters", {}).get("required", ())
    return first if set(required) <= {first} else None


def _call_from_body(body: str, tools: Sequence[ToolSchema], call_id: str) -> ToolCall:
    """The call that a body makes: JSON with a name and arguments, or where a sole tool needs one
    argument only, that argument."""
    body = textwrap.dedent(body).strip()
    if len(tools) == 1 and _first_parameter(tools[0]) is None:
        return ToolCall(_name(tools[0]), {}, call_id)
    plain = _plain_parameter(tools)
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        if plain is not None:
            return ToolCall(_name(tools[0]), {plain: body}, call_id)
        names = ", ".join(_name(t) for t in tools)
        reason = f'a call must be JSON like {{"name": ..., "arguments": {{...}}}}: {error}'
        return ToolCall("", {}, call_id, f"{reason}; tools: {names}" if names else reason)
    if plain is not None and not _is_call(data):
        return ToolCall(_name(tools[0]), {plain: body}, call_id)
    return _call_from_json(data, call_id, "arguments")


def _is_call(data: Any) -> bool:
    """Whether it names a tool, which may be one that there is not: no argument of another."""
    return (
        isinstance(data, dict)
        and data.keys() == {"name", "arguments"}
        and isinstance(data["name"], str)
        and isinstance(data["arguments"], dict)
    )


def _call_from_json(data: Any, call_id: str, arguments_key: str) -> ToolCall:
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return ToolCall("", {}, call_id, 'a call must be a JSON object with a "name"')
    arguments = data.get(arguments_key, data.get("arguments", {}))
    if not isinstance(arguments, dict):
        return ToolCall(data["name"], {}, call_id, f'"{arguments_key}" must be a JSON object')
    return ToolCall(data["name"], arguments, call_id)


def _bodies(call: ToolCall, tools: Sequence[ToolSchema]) -> list[str]:
    """What may stand for a call, the plainest first; the last is JSON."""
    value = _plain_value(call, tools)
    body = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
    return [body] if value is None else [value, body]


def _plain_value(call: ToolCall, tools: Sequence[ToolSchema]) -> str | None:
    """The argument that may stand for a whole call."""
    plain = _plain_parameter(tools)
    if plain is None or call.arguments.keys() != {plain} or call.name != _name(tools[0]):
        return None
    value = call.arguments[plain]
    return value if isinstance(value, str) else None


def _first_read_back(
    form: ToolFormat, call: ToolCall, tools: Sequence[ToolSchema], texts: Sequence[str]
) -> str:
    """The first text that is read as the call, white space around a plain body aside: code may
    hold what ends a call. Without one, the first of all."""
    meant = [dict(call.arguments)]
    value = _plain_value(call, tools)
    if value is not None:
        meant.append(dict.fromkeys(call.arguments, textwrap.dedent(value).strip()))
    for text in texts:
        found = [(c.name, c.arguments, c.error) for c in form.parse(text, tools)]
        if any(found == [(call.name, arguments, None)] for arguments in meant):
            return text
    return texts[0]


def _placeholder(tools: Sequence[ToolSchema]) -> str:
    plain = _plain_parameter(tools)
    if plain is not None:
        return plain
    if len(tools) == 1 and _first_parameter(tools[0]) is None:
        return ""
    return '{"name": ..., "arguments": {...}}'


def _describe_tools(tools: Sequence[ToolSchema]) -> str:
    lines = ["You can use these tools:"]
    for schema in tools:
        function = schema["function"]
        properties = function.get("parameters", {}).get("properties", {})
        signature = ", ".join(f"{k}: {v.get('type', 'any')}" for k, v in properties.items())
        lines.append(f"- {function['name']}({signature}): {function.get('description', '')}")
    return "\n".join(lines)
