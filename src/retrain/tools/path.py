"""A small path into JSON: `results[].{title, link: url}`."""

from __future__ import annotations

import re
from typing import Any

_STEP = re.compile(r"\.?(?:(?P<key>[\w@$-]+)|\[(?P<index>-?\d*)\]|\{(?P<fields>[^{}]*)\}$)")


def find(path: str, value: Any) -> Any:
    """What `value` has at a path: keys joined by dots, `[]` for every item of a list, `[0]` for
    one, and at the end `{title, link: url}` for an object of some fields, each by a path of its own
    and, before a colon, a new name. None where there is nothing; of lists and objects that part is
    left out.

    Raises:
        ValueError: it is no such path, whatever the value.
    """
    if not path:
        return value
    step = _STEP.match(path)
    if step is None:
        raise ValueError(path)
    rest = path[step.end() :]
    if step["key"] is not None:
        return find(rest, value.get(step["key"]) if isinstance(value, dict) else None)
    if step["fields"] is not None:
        halves = (field.partition(":") for field in step["fields"].split(","))
        picked = {name.strip(): find((own or name).strip(), value) for name, _, own in halves}
        return {name: found for name, found in picked.items() if found is not None} or None
    if step["index"]:
        at = int(step["index"])
        inside = isinstance(value, list) and -len(value) <= at < len(value)
        return find(rest, value[at] if inside else None)
    items = [find(rest, item) for item in (value if isinstance(value, list) else [None])]
    return [item for item in items if item is not None]
