"""What both systems of `vs_trl.py` train on: tasks, tools, the reward, the chat template.

Imports neither system, so that each can load it by its path.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import json
import operator
import random
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

THINGS = ("pens", "nails", "eggs", "cards", "coins", "books", "seeds", "bolts")
DIRECT, RIGHT = 0.4, 0.78
"""The teacher guesses in `DIRECT` of its traces; of the others `RIGHT` use the right expression."""

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")
CALL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\nYou answer questions about numbers. Mental arithmetic '
        + 'goes wrong, so call a function for it when there is one. These are the signatures of '
        + 'the functions, one to a line, between <tools> and </tools>:\\n<tools>' }}
    {%- for tool in tools %}
        {%- set function = tool.function %}
        {{- '\\n{"type": "function", "function": {"name": ' + function.name | tojson }}
        {{- ', "description": ' + (function.description or '').split() | join(' ') | tojson }}
        {{- ', "parameters": {"type": "object", "properties": {' }}
        {%- for name, about in (function.parameters.properties or {}).items() %}
            {{- ('' if loop.first else ', ') + name | tojson }}
            {{- ': {"type": ' + about.type | tojson }}
            {{- ', "description": ' + (about.description | default('')) | tojson + '}' }}
        {%- endfor %}
        {{- '}, "required": ' + (function.parameters.required or []) | tojson + '}}}' }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nTo call one, write a JSON object with its name and arguments between '
        + '<tool_call> and </tool_call>:\\n<tool_call>\\n{"name": <function-name>, "arguments": '
        + '<arguments>}\\n</tool_call>\\nThen answer with the number and nothing '
        + 'else.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '' if loop.first and not message.content else '\\n' }}
            {{- '<tool_call>\\n{"name": ' + call.function.name | tojson }}
            {{- ', "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Of Qwen3's format. It writes tools field by field, because the two systems' schemas of one
function differ in keys that say nothing here (`return`, `additionalProperties`), and the prompts
must be equal token for token."""


def calculator(expression: str) -> str:
    """Work out an arithmetic expression over integers, exactly, and return its value as text.

    Args:
        expression: Integers joined by +, - and *, with parentheses where needed, such as 12*(3+4).
    """
    try:
        return str(_value(ast.parse(expression, mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: not an expression of integers"


@functools.wraps(calculator)
async def slow_calculator(expression: str) -> str:
    await asyncio.sleep(0.05)
    return calculator(expression)


def convert_units(amount: str, source: str, target: str) -> str:
    """Convert an amount from one unit of measurement to another one of the same kind. Lengths,
    weights, volumes and durations are known; currencies are not, because their rates change from
    day to day. The result is rounded to six digits.

    Args:
        amount: The number to convert, written without a unit and without separators, such as 12.5.
        source: The unit that the amount is in, in the singular and in lower case, such as mile.
        target: The unit wanted, in the singular and in lower case, such as kilometre or metre.
    """
    sizes = {"metre": 1.0, "kilometre": 1000.0, "mile": 1609.344, "second": 1.0, "hour": 3600.0}
    try:
        return f"{float(amount) * sizes[source] / sizes[target]:.6g}"
    except (KeyError, ValueError):
        return "error: unknown unit or amount"


def days_between(start: str, end: str) -> str:
    """Count the days from one date to another in the Gregorian calendar. The first day is not
    counted and the last one is, so that a date is no day away from itself. When the second date
    comes before the first one, the count is negative.

    Args:
        start: The date to count from, as year, month and day with hyphens, such as 2024-02-29.
        end: The date to count up to, in the same form as the first one, such as 2025-01-31.
    """
    try:
        return str((date.fromisoformat(end) - date.fromisoformat(start)).days)
    except ValueError:
        return "error: a date looks like 2024-02-29"


def look_up_price(article: str, shop: str, day: str) -> str:
    """Look up what an article costs in a shop of the chain on a given day, in whole cents. Prices
    change over night and never during the day. Articles that a shop does not carry have no price
    there; ask for them in another shop, or leave them out of the sum.

    Args:
        article: The name of the article in the plural and in lower case, such as nails or coins.
        shop: The number of the shop, from 1 to 40, or the word all for the mean over every shop.
        day: The day for which the price is asked, such as 2024-02-29, or the word today.
    """
    return str(len(article) * 7) if article in THINGS else "error: no such article"


def summarise_numbers(numbers: str, statistic: str) -> str:
    """Describe a list of numbers by one statistic: their sum, mean, median, smallest or largest
    value. The median of an even count of numbers is the mean of the two in the middle. An empty
    list has a sum of zero and no other statistic.

    Args:
        numbers: The numbers, separated by commas and without brackets around them, such as 3,5,8.
        statistic: Which statistic to return: one of sum, mean, median, smallest and largest.
    """
    known: dict[str, Callable[[list[float]], float]] = {
        "sum": sum,
        "mean": lambda values: sum(values) / len(values),
        "median": lambda values: sorted(values)[len(values) // 2],
        "smallest": min,
        "largest": max,
    }
    try:
        return f"{known[statistic]([float(n) for n in numbers.split(',')]):g}"
    except (KeyError, ValueError):
        return "error: unknown statistic or numbers"


TOOLS = {
    "a": ("calculator",),
    "b": (
        "convert_units",
        "days_between",
        "calculator",
        "look_up_price",
        "summarise_numbers",
    ),
    "c": ("slow_calculator",),
}
"""Names of this module, by workload."""


def tasks(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` distinct problems: rows with `prompt` and `answer`."""
    generator = random.Random(f"{seed}:tasks")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        prompt, right, _ = _problem(generator)
        rows[prompt] = {"prompt": prompt, "answer": calculator(right)}
    return list(rows.values())


def traces(n: int, seed: int = 0, as_text: bool = False) -> Iterator[dict[str, Any]]:
    """`n` conversations of a teacher that is often wrong, as rows of OpenAI-style messages.

    `as_text` writes calls into the content, as the chat template would: such a trace can be
    learned without the long description of the tools before it.
    """
    generator = random.Random(f"{seed}:traces")
    for _ in range(n):
        prompt, right, wrong = _problem(generator)
        question = {"role": "user", "content": prompt}
        if generator.random() < DIRECT:
            yield {"messages": [question, {"role": "assistant", "content": _guess(right)}]}
            continue
        expression = right if generator.random() < RIGHT else wrong
        result = calculator(expression)
        yield {
            "messages": [
                question,
                _call(expression, as_text),
                {"role": "tool", "name": "calculator", "tool_call_id": "0", "content": result},
                {"role": "assistant", "content": result},
            ]
        }


def _guess(expression: str) -> str:
    """A wrong answer that is easy to learn: a hundred times the first number."""
    return expression.lstrip("(")[:3] + "00"


def _call(expression: str, as_text: bool) -> dict[str, Any]:
    function = {"name": "calculator", "arguments": {"expression": expression}}
    if as_text:
        content = f"<tool_call>\n{json.dumps(function)}\n</tool_call>"
        return {"role": "assistant", "content": content}
    call = {"id": "0", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def corpus() -> Iterator[str]:
    """Texts for the tokenizer: tasks, calls, template and tools; then this file, for more words."""
    for row in traces(400, seed=1):
        yield "\n".join(str(message) for message in row["messages"]).replace("'", '"')
    for _ in range(40):
        yield CHAT_TEMPLATE
        for name in TOOLS["b"]:
            yield f"{name} {globals()[name].__doc__}"
    yield Path(__file__).read_text(encoding="utf-8")


def is_right(text: str, answer: str) -> float:
    """The reward: 1 for exactly the number, else 0."""
    return float(text.strip() == answer)


def reward_of_rollout(rollout: Any) -> float:
    """As `retrain` calls a reward: the last words of the policy count."""
    return is_right(rollout.messages[rollout.model_messages[-1]].content, rollout.task.answer)


def reward_of_completions(
    completions: list[list[dict[str, Any]]], answer: list[str], **_: Any
) -> list[float]:
    """As TRL calls one, a batch at a time."""
    last = [next(m for m in reversed(c) if m["role"] == "assistant") for c in completions]
    return [is_right(m["content"], right) for m, right in zip(last, answer, strict=True)]


def _problem(generator: random.Random) -> tuple[str, str, str]:
    """A prompt, its right expression and a wrong one."""
    a, b, c = (generator.randint(*r) for r in ((100, 999), (10, 99), (10, 99)))
    right, wrong = generator.choice(
        [(f"{a}*{b}+{c}", f"{a}+{b}*{c}"), (f"({a}-{b})*{c}", f"{a}-{b}*{c}")]
    )
    if generator.random() < 0.5:
        return f"What is {right}?", right, wrong
    thing = generator.choice(THINGS)
    if right.startswith("("):
        return f"Of {a} {thing} {b} are lost. The rest sell for {c} each. How much?", right, wrong
    return f"{b} boxes of {a} {thing} and {c} loose {thing}. How many {thing}?", right, wrong


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not an expression of integers")
