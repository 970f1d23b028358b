"""ReTool's only reward: was the answer right."""

from __future__ import annotations

from typing import Literal

from retrain.rewards import reward
from retrain.rewards.equivalence import math_equivalence
from retrain.rewards.extract import accepted_answers, judged_text, last_between_tags, last_boxed
from retrain.rewards.numeric import same_latex
from retrain.types import Rollout


@reward(kind="rollout", range=(-1.0, 1.0))
async def outcome(rollout: Rollout, *, judge: Literal["text", "math"] = "text") -> float:
    r"""1 when the last `<answer>\boxed{...}</answer>` of the last turn is right, else -1.

    `text`: equal up to notation, as in `boxed_answer`. `math`: mathematically equal, which needs
    the extra `retrain[math]`. Raises ValueError when the task has no answer.
    """
    if judge == "math":
        return 2.0 * await math_equivalence(rollout, tag="answer", boxed=True) - 1.0
    answers = accepted_answers(rollout)
    found = last_boxed(last_between_tags(judged_text(rollout), "answer") or "")
    right = found is not None and any(same_latex(found, str(answer)) for answer in answers)
    return 1.0 if right else -1.0
