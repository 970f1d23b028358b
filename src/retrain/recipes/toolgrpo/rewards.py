"""The four rewards of ToolGRPO. Their weights stand in the YAML files."""

from __future__ import annotations

import re

from retrain.rewards import reward
from retrain.rewards.extract import judged_text, last_boxed
from retrain.rewards.numeric import boxed_answer
from retrain.rewards.structure import count_tool_calls
from retrain.types import MessageType, Rollout

_INTEGER = re.compile(r"[-+]?\d+")


@reward(kind="rollout", range=(0.0, 1.0))
def correct(rollout: Rollout) -> float:
    r"""1 when the last `\boxed{}` of the last turn holds the task's answer, else 0."""
    return boxed_answer(rollout)


@reward(kind="rollout", range=(0.0, 1.0))
def integer(rollout: Rollout) -> float:
    r"""1 when the last `\boxed{}` of the last turn holds an integer, right or wrong, else 0."""
    found = last_boxed(judged_text(rollout))
    return float(found is not None and _INTEGER.fullmatch(found.strip()) is not None)


@reward(kind="rollout", range=(0.0, 3.0))
def structure(rollout: Rollout) -> float:
    r"""How many of three hold: the last turn has exactly one `\boxed{}`; the box, or a full stop or
    `$` after it, ends that turn; no turn before it has a box."""
    *earlier, last = [rollout.messages[i].content for i in rollout.model_messages] or [""]
    closed = last_boxed(last) is not None
    one = closed and last.count(r"\boxed{") == 1
    ends = closed and last.rstrip().rstrip(".$").endswith("}")
    first = not any(r"\boxed{" in text for text in earlier)
    return float(one + ends + (one and first))


@reward(kind="rollout", range=lambda params: (0.0, sum(params.values())))
def python(rollout: Rollout, *, called: float = 0.1, ran: float = 0.5, used: float = 0.5) -> float:
    r"""`called` for at least one call, `ran` where one succeeded, `used` where what is in the last
    `\boxed{}` is a word of the last result. Range [0, called + ran + used]."""
    if count_tool_calls(rollout) == 0:
        return 0.0
    results = [m.content for m in rollout.messages if m.type is MessageType.TOOL]
    answer = last_boxed(judged_text(rollout))
    succeeded = count_tool_calls(rollout, ("ok",)) > 0
    taken = answer is not None and bool(results) and answer.strip() in results[-1].split()
    return called + ran * succeeded + used * taken
