"""Built-in rewards that look at form: tags, JSON, tool calls."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from retrain.rewards.base import reward
from retrain.rewards.extract import Scope, judged_text, last_fenced
from retrain.rewards.text import check_scope
from retrain.types import Rollout, UserError

CALL_STATUSES = ("ok", "model_error", "tool_error", "timeout")


def _check_tags(params: Mapping[str, Any]) -> None:
    check_scope(params)
    tags = params["tags"]
    named = isinstance(tags, list | tuple) and all(isinstance(t, str) and t.strip() for t in tags)
    if not tags or not named or len(set(tags)) != len(tags):
        raise ValueError(f"tags is {tags!r}, expected a list of different tag names")


@reward(kind="rollout", range=(0.0, 1.0), check=_check_tags)
def format(
    rollout: Rollout,
    *,
    tags: Sequence[str],
    whole: bool = False,
    scope: Scope = "last",
) -> float:
    """1 when each tag opens and closes exactly once, in this order, none nested, else 0.

    Range [0, 1]. `tags` are names: `think` means `<think>...</think>`. With `whole` nothing but
    white space may stand outside of them.

    Example: `format: {params: {tags: [think, answer], whole: true}}`
    """
    text = judged_text(rollout, scope)
    wanted = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    marks = list(re.finditer("|".join(map(re.escape, wanted)), text))
    if [mark[0] for mark in marks] != wanted:
        return 0.0
    if not whole:
        return 1.0
    starts = [mark.start() for mark in marks[::2]] + [len(text)]
    ends = [0] + [mark.end() for mark in marks[1::2]]
    outside = (text[end:start] for end, start in zip(ends, starts, strict=True))
    return float(not any(piece.strip() for piece in outside))


def _check_schema(params: Mapping[str, Any]) -> None:
    check_scope(params)
    if importlib.util.find_spec("jsonschema") is None:
        raise UserError(
            "the reward json_schema needs the package jsonschema",
            "install it: pip install 'retrain[json]'",
        )
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    schema = params["schema"]
    if not isinstance(schema, dict):
        raise ValueError(f"schema is {schema!r}, expected a JSON schema (a mapping)")
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"schema is not a JSON schema: {error.message}") from error


@reward(kind="rollout", range=(0.0, 1.0), check=_check_schema)
def json_schema(rollout: Rollout, *, schema: dict[str, Any], scope: Scope = "last") -> float:
    """1 when the text is JSON that satisfies `schema`, else 0. Range [0, 1].

    The JSON may be all of the text or the last fenced block (```json or no label). NaN and
    Infinity are not JSON. References outside the schema are not fetched: they raise. Needs the
    extra `retrain[json]`.

    Example: `json_schema: {params: {schema: {type: object, required: [name]}}}`
    """
    from jsonschema.validators import validator_for
    from referencing import Registry

    text = judged_text(rollout, scope)
    fenced = last_fenced(text, "json")
    try:
        value = json.loads(text if fenced is None else fenced, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return 0.0
    validator = validator_for(schema)(schema, registry=Registry())
    return float(validator.is_valid(value))


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _check_tool_calls(params: Mapping[str, Any]) -> None:
    low, high, status = params["min_calls"], params["max_calls"], params["status"]
    if high is not None and low > high:
        raise ValueError(f"min_calls {low} is above max_calls {high}")
    if low <= 0 and high is None:
        raise ValueError("no bound is set; set min_calls above 0, or max_calls")
    if status != "any" and status not in CALL_STATUSES:
        choices = ", ".join((*CALL_STATUSES, "any"))
        raise ValueError(f"status is {status!r}, expected one of {choices}")


@reward(kind="rollout", range=(0.0, 1.0), check=_check_tool_calls)
def tool_calls(
    rollout: Rollout,
    *,
    min_calls: int = 1,
    max_calls: int | None = None,
    status: Literal["ok", "model_error", "tool_error", "timeout", "any"] = "ok",
    tool: str | None = None,
) -> float:
    """1 when the number of tool calls that ended with `status` is in range, else 0.

    Range [0, 1]; both ends are included. `any` counts every call, successful or not. With `tool`
    only the calls of the tool of that name count. 0 calls where the rollout has no such tool.

    Example: `tool_calls: {params: {tool: python, min_calls: 1, max_calls: 3}}`
    """
    count = count_tool_calls(rollout, CALL_STATUSES if status == "any" else (status,), tool)
    return float(count >= min_calls and (max_calls is None or count <= max_calls))


def count_tool_calls(
    rollout: Rollout, statuses: Sequence[str] = CALL_STATUSES, tool: str | None = None
) -> float:
    """How many calls, of one tool or of all, the environment recorded with these statuses."""
    place = "tool_calls" if tool is None else f"tool/{tool}"
    return sum(rollout.metrics.get(f"{place}/{status}", 0.0) for status in statuses)
