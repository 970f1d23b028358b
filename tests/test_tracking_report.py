"""Intervals, result tables and transcripts."""

from __future__ import annotations

import math

import pytest

from retrain.tracking.report import (
    EvaluationResult,
    print_results,
    results_table,
    transcript,
    wilson,
)
from retrain.types import Message, MessageType, RewardPart, Rollout, Task, ToolCall


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Published: Newcombe (1998), table I, method 3; the 8/10 case worked by hand.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_matches_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_knows_nothing_without_a_rollout_and_refuses_nonsense() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)


RESULTS = [
    EvaluationResult("before", "T=1", 263, 81, 81 / 263, {"a|b": (20, 0), "c": (10, 8)}, ("c",)),
    EvaluationResult("after", "T=1", 263, 263, 1.0, {"a|b": (20, 20)}),
    EvaluationResult("after", "greedy", 4, 4, 2.5),
    EvaluationResult("after", "off", 0, 0, math.nan),
]


def test_the_table_has_a_column_per_stage_and_a_row_per_mode_and_group() -> None:
    assert results_table(RESULTS) == (
        "| success | before | after | n |\n"
        "| --- | --- | --- | --- |\n"
        "| T=1 | 0.31 [0.26, 0.37] | 1.00 [0.99, 1.00] | 263 |\n"
        "| T=1, a\\|b | 0.00 [0.00, 0.16] | 1.00 [0.84, 1.00] | 20 |\n"
        "| T=1, c (not in the total) | 0.80 [0.49, 0.94] | – | 10 |\n"
        "| greedy | – | 1.00 [0.51, 1.00] | 4 |\n"
        "| greedy, mean reward | – | 2.5 | 4 |\n"
        "| off | – | – | 0 |\n"
    )


def test_different_numbers_of_rollouts_are_all_shown() -> None:
    table = results_table(
        [EvaluationResult("a", "m", 10, 5, 0.5), EvaluationResult("b", "m", 20, 10, 0.5)]
    )
    assert table.splitlines()[2].endswith("| 10 / 20 |")


def test_the_terminal_shows_the_same_cells(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(RESULTS)
    shown = capsys.readouterr().out
    for cell in ("T=1, a|b", "0.31 [0.26, 0.37]", "1.00 [0.84, 1.00]"):
        assert cell in shown


def test_a_result_knows_its_share() -> None:
    assert RESULTS[0].success == 81 / 263
    assert RESULTS[0].interval == wilson(81, 263)
    assert math.isnan(RESULTS[3].success)


def test_a_transcript_tells_the_whole_story() -> None:
    question = Message("2*3?", MessageType.MESSAGE, role="user")
    call = ToolCall("python", {"code": "2*3"}, error="unknown argument")
    rollout = Rollout(
        id="r1",
        task=Task("t1", (question,), answer="6"),
        messages=[
            Message("Be brief.", MessageType.SYSTEM),
            question,
            Message("", MessageType.MODEL, reasoning="compute", tool_calls=(call,)),
            Message("6", MessageType.TOOL, name="python"),
            Message("It is 6.", MessageType.MODEL),
        ],
        reward=-0.5,
        reward_parts=[
            RewardPart("exact_match", "rollout", None, 1.0, 0.5, 0.5),
            RewardPart("short", "step", 1, -1.0, 1.0, -1.0, verifier="ends", error="boom"),
        ],
        stop_reason="answered",
        error="sandbox died",
    )
    assert transcript(rollout) == (
        "rollout r1, task t1\n"
        "expected answer: 6\n"
        "\n── system\nBe brief.\n"
        "\n── message, user\n2*3?\n"
        "\n── model, turn 0\n(reasoning) compute\n"
        "→ python(code='2*3')   ! unknown argument\n"
        "\n── tool, python\n6\n"
        "\n── model, turn 1\nIt is 6.\n"
        "\nstopped: answered\n"
        "masked, not scored: sandbox died\n"
        "reward: -0.5\n"
        "  +0.5  exact_match (rollout): raw 1, weight 0.5\n"
        "  -1  short (step, turn 1): raw -1, weight 1; verifier ends failed; boom\n"
    )
