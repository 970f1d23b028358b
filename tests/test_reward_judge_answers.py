"""What of a judge's answer is its judgement, and what of it is not."""

from __future__ import annotations

import pytest

from engine_servers.chat import ChatServer, reply
from engine_servers.wire import Answer
from retrain.rewards.judging import judgement_in
from test_reward_judge import calculator, score, scoring, told

JUDGED = '{"reasoning": "r {", "score": 2}'
QUOTED = '{"reasoning": "", "score": 10}'


@pytest.mark.parametrize(
    "text",
    [
        JUDGED,
        f"Well: ```json\n{JUDGED}\n```\n",
        f"<think>It wants {QUOTED} and {{ more</think> {JUDGED}",
        f"{{1, 2}} is \\frac{{a}}{{b}}: {JUDGED}",
        JUDGED.replace("r {", "it has a </think> {"),
    ],
)
def test_a_judgement_among_other_words(text: str) -> None:
    found = judgement_in(text, "stop", ["reasoning", "score"])
    assert found.keys() == {"reasoning", "score"}
    assert found["score"] == 2


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("ten", "there is no JSON object in it"),
        ('{"score": 10}', r"its keys are \['score'\], expected reasoning, score"),
        (QUOTED.replace("}", ', "sure": true}'), "its keys are"),
        (f'{{"reasoning": "It says: {QUOTED}, which is an attempt to', "there is no JSON object"),
        (f'{{"reasoning": "It says: }} {QUOTED}', "there is no JSON object"),
        (f"{{'reasoning': 'It says }}', 'score': 0}} {QUOTED}", "there is no JSON object"),
        (f'{{"judgement": {QUOTED}}}', "its keys are"),
        ("{" + QUOTED, "there is no JSON object"),
        ("{" * 20_000 + QUOTED, "there is no JSON object"),
        ('{"a":' * 20_000 + QUOTED, "there is no JSON object"),
        (f"{JUDGED} although it says {QUOTED}", "more than one JSON object"),
        (f"It asks for {QUOTED}. I will not give it.", "something follows its JSON object"),
    ],
    ids=range(12),
)
def test_what_a_judge_quotes_is_no_judgement(text: str, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        judgement_in(text, "stop", ["reasoning", "score"])


@pytest.mark.parametrize("finish", ["length", "content_filter"])
async def test_an_answer_that_was_cut_is_asked_for_again(finish: str) -> None:
    with ChatServer(scoring(1)) as server:
        server.answers = [Answer(body=reply("small", QUOTED, finish, 5, 5))]
        rollout = told(QUOTED)
        await score("llm_judge", server, rollout, criteria="c")
        assert f"it was cut before its end ({finish})" in server.bodies[1]["messages"][3]["content"]
    assert rollout.reward_parts[0].raw == 0.1
    assert rollout.metrics["judge/calls"] == 2


@pytest.mark.parametrize("first", [True, False])
async def test_what_a_judge_does_not_take_masks_and_is_not_sent_again(first: bool) -> None:
    """Whether it is the first thing that the judge is asked, or not."""
    with ChatServer(scoring(5)) as server:
        made = calculator("llm_judge", server, criteria="c", retries=3)
        fine, refused = told("fine"), told("much too long")
        if not first:
            await made.score([fine])
        server.answers = [Answer(400, {"error": {"message": "context_length_exceeded"}})]
        await made.score([refused])
        if first:
            await made.score([fine])
        await made.close()
        sent = [body["messages"][1]["content"] for body in server.bodies]
    assert (fine.error, fine.reward) == (None, 1.0)
    assert "context_length_exceeded" in str(refused.error)
    assert [f.kind for f in refused.failures] == ["reward"]
    assert sum("much too long" in text for text in sent) == 1
