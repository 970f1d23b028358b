"""A program of the user's as the environment: what it is given, and what becomes of its turns."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from outside import END, Stage, play, program
from retrain.engines.base import Completion, GenerateRequest
from retrain.rollout import to_samples
from retrain.types import Message, MessageType, Task, UserError
from scripted import ScriptedEngine, check_ledger, tag_renderer, tokenizer, user

TAGS = ("<code>", "</code>", "<interpreter>", "</interpreter>")
TASK = Task(
    "t1",
    (Message("Be brief.", MessageType.SYSTEM), user("What is 2 + 3?")),
    answer="5",
    metadata={"level": 3, "hint": "count"},
)


def texts(rollout: Any) -> list[str]:
    return [message.content for message in rollout.messages]


async def test_a_conversation_of_a_command_is_exact(tmp_path: Path) -> None:
    """The program sends text back; the ledger holds the very tokens that were sampled."""
    made = tokenizer("chatml")
    apart = [t for c in "print(" for t in made.encode(c)]
    assert apart != made.encode("print("), "it would be encoded otherwise"
    command = program(
        tmp_path,
        "first = ask(sys.argv[1])\n"
        "second = ask(sys.argv[1], first, 'Again.')\n"
        "reward(0.5, tries=2)\n",
    )
    said = [[*apart, made.convert_tokens_to_ids(END)], f"5{END}"]
    rollout, engine = await play(
        said, TASK, command=[*command, "{prompt}"], working_dir=str(tmp_path)
    )
    assert texts(rollout) == ["What is 2 + 3?", "print(", "Again.", "5"]
    check_ledger(rollout, engine)
    assert len(rollout.segments) == 1
    assert (rollout.env_rewards, rollout.stop_reason) == ([0.0, 0.5], "environment")
    seconds = rollout.metrics.pop("external/seconds")
    assert 0 < seconds < 60
    assert rollout.metrics == {
        "external/tries": 2.0,
        "external/requests": 2.0,
        "external/turns": 2.0,
        "external/exit_code": 0.0,
    }


@pytest.mark.parametrize(
    ("returns", "reward", "metrics"),
    [
        ("0.25", 0.25, {}),
        ("True", 1.0, {}),
        ("None", 0.0, {}),
        ("'the answer'", 0.0, {}),
        ("{'reward': 2, 'steps': 7, 'note': 'no number'}", 2.0, {"external/steps": 7.0}),
        ("{'steps': 7}", 0.0, {"external/steps": 7.0}),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_a_function_returns_its_reward(
    kind: str, returns: str, reward: float, metrics: dict[str, float], tmp_path: Path
) -> None:
    program(tmp_path, f"{kind} agent(task):\n    ask(task['prompt'])\n    return {returns}\n")
    rollout, engine = await play([f"5{END}"], function=f"{tmp_path}/agent.py:agent")
    check_ledger(rollout, engine)
    assert texts(rollout) == ["What is 2 + 3?", "5"]
    assert rollout.env_rewards == [reward]
    assert rollout.metrics.items() >= metrics.items()


async def test_what_is_returned_replaces_what_was_posted(tmp_path: Path) -> None:
    program(
        tmp_path, "def agent(task):\n    ask('?')\n    reward(3, a=1, b=1)\n    return {'b': 2}"
    )
    rollout, _ = await play([f"5{END}"], function=f"{tmp_path}/agent.py:agent")
    assert rollout.env_rewards == [3.0]
    assert (rollout.metrics["external/a"], rollout.metrics["external/b"]) == (1.0, 2.0)


@pytest.mark.parametrize("pass_answer", [False, True])
async def test_the_task_reaches_both_kinds_whole(pass_answer: bool, tmp_path: Path) -> None:
    """As a dictionary, and as JSON in a variable; the answer only where it is asked for."""
    command = program(
        tmp_path,
        "def agent(task):\n"
        "    ask('?')\n"
        "    with open('seen.json', 'w') as file:\n"
        "        json.dump([task, json.loads(os.environ['RETRAIN_TASK'])], file)\n"
        "if __name__ == '__main__':\n"
        "    agent(sys.argv[1:])\n",
    )
    expected: dict[str, Any] = {
        "id": "t1",
        "prompt": "What is 2 + 3?",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 2 + 3?"},
        ],
        "metadata": {"level": 3, "hint": "count"},
    }
    if pass_answer:
        expected["answer"] = "5"
    settings = {"working_dir": str(tmp_path), "pass_answer": pass_answer}
    await play([f"5{END}"], TASK, function=f"{tmp_path}/agent.py:agent", **settings)
    assert json.loads((tmp_path / "seen.json").read_text()) == [expected, expected]
    arguments = ["{prompt} {level}", "{{{id}}}", *(["{answer}"] if pass_answer else [])]
    await play([f"5{END}"], TASK, command=[*command, *arguments], **settings)
    given, task = json.loads((tmp_path / "seen.json").read_text())
    assert given == ["What is 2 + 3? 3", "{t1}", *(["5"] if pass_answer else [])]
    assert task == expected


@pytest.mark.parametrize(
    ("argument", "fault"),
    [
        ("{answer}", "task t1 has no 'answer' for the argument '{answer}'"),
        ("{level", "cannot be read"),
        ('{"a": 1}', "no plain name"),
        ("{}", "no plain name"),
        ("{hint.real}", "no plain name"),
    ],
)
async def test_fields_that_a_task_has_not_are_refused(
    argument: str, fault: str, tmp_path: Path
) -> None:
    command = [*program(tmp_path, "ask('?')"), argument]
    with pytest.raises(UserError, match=fault):
        await play([f"5{END}"], TASK, command=command, working_dir=str(tmp_path))


async def test_the_environment_of_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It inherits what leads nowhere else; keys of others only where they are asked for."""
    for name in ("OPENAI_ORG_ID", "MISTRAL_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PLAIN"):
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    monkeypatch.setenv("no_proxy", "intra.net")
    command = program(
        tmp_path,
        "ask('?')\njson.dump(dict(os.environ), open('seen.json', 'w'))\n"
        "assert not sys.stdin.read()",
    )
    await play(
        [f"5{END}"], command=command, working_dir=str(tmp_path), env={"HF_TOKEN": None, "MORE": "1"}
    )
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["PLAIN"], seen["MORE"], seen["HF_TOKEN"]) == ("mine", "1", "mine")
    assert not {"OPENAI_ORG_ID", "MISTRAL_API_KEY", "AWS_SECRET_ACCESS_KEY"} & set(seen)
    assert seen["no_proxy"] == "intra.net,127.0.0.1,localhost,::1"
    base = seen["ANTHROPIC_BASE_URL"]
    assert base.startswith("http://127.0.0.1:") and "/sessions/" in base
    assert seen["OPENAI_BASE_URL"] == seen["OPENAI_API_BASE"] == f"{base}/v1"
    assert seen["RETRAIN_REWARD_URL"] == f"{base}/v1/reward"
    key = seen["OPENAI_API_KEY"]
    assert (
        key.startswith("rk-") and key == seen["ANTHROPIC_API_KEY"] == seen["ANTHROPIC_AUTH_TOKEN"]
    )
    with pytest.raises(UserError, match="null, and the run's own environment has no NOT_THERE"):
        Stage([], command=command, working_dir=str(tmp_path), env={"NOT_THERE": None})


async def test_branches_are_segments_of_one_rollout(tmp_path: Path) -> None:
    """Requests at the same time: each conversation goes on from its own tokens."""
    command = program(
        tmp_path,
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def talk(name):\n"
        "    first = ask(name)\n"
        "    return ask(name, first, 'on')\n"
        "with ThreadPoolExecutor(3) as pool:\n"
        "    list(pool.map(talk, ['red', 'green', 'blue']))\n"
        "reward(1)\n",
    )
    rollout, engine = await play(
        [f"{n}{END}" for n in range(6)], command=command, working_dir=str(tmp_path)
    )
    assert len(rollout.segments) == 3 and rollout.metrics["external/turns"] == 6.0
    assert rollout.env_rewards == [0.0] * 5 + [1.0]
    sampled = sorted(list(c.token_ids) for c in engine.completions)
    own = [
        list(segment.token_ids[span.start : span.end])
        for segment in rollout.segments
        for span in segment.turns
        if span.finish_reason is not None
    ]
    assert sorted(own) == sampled
    assert sum(sum(s.loss_mask) for s in to_samples(rollout)) == sum(map(len, sampled))


async def test_tools_need_a_format_and_are_called_in_it(tmp_path: Path) -> None:
    tools = (
        "tools = [{'type': 'function', 'function': {'name': 'run', 'description': 'Run code.',"
        " 'parameters': {'type': 'object', 'properties': {'code': {'type': 'string'}},"
        " 'required': ['code']}}}]\n"
    )
    command = program(
        tmp_path,
        f"{tools}first = ask('2 + 3?', tools=tools)\n"
        "call, = first['tool_calls']\n"
        "assert json.loads(call['function']['arguments']) == {'code': '2+3'}\n"
        "result = {'role': 'tool', 'tool_call_id': call['id'], 'content': '5'}\n"
        "ask('2 + 3?', first, result, tools=tools)\n",
    )
    said = ["<code>2+3</code>", f"five{END}"]
    renderer = tag_renderer("chatml", *TAGS)
    rollout, engine = await play(
        said, renderer=renderer, command=command, working_dir=str(tmp_path), describe_tools=True
    )
    check_ledger(rollout, engine)
    opening = rollout.messages[0]
    assert opening.type is MessageType.SYSTEM and "Run code." in opening.content
    assert texts(rollout)[1:] == ["2 + 3?", "<code>2+3</code>", "5", "five"]
    told, _ = await play(said, renderer=renderer, command=command, working_dir=str(tmp_path))
    assert texts(told)[0] == "2 + 3?"
    with pytest.raises(UserError, match=r"environment\.tool_format does not say"):
        await play(said, command=command, working_dir=str(tmp_path))


class Echo(ScriptedEngine):
    """Says the prompt's last number again, after a while that differs."""

    async def generate(self, request: GenerateRequest) -> Completion:
        text = self.codec.decode(request.prompt_ids)
        number = text.rpartition("number ")[2].partition("<")[0]
        await asyncio.sleep(int(number) % 7 / 100)
        self.turns = [[*self.codec.encode(number), *self.codec.encode(END)]] * 1000
        return await super().generate(request)


async def test_many_at_once_do_not_mix(tmp_path: Path) -> None:
    program(
        tmp_path,
        "def agent(task):\n"
        "    own = task['metadata']['own']\n"
        "    said = ask(f'number {own}')\n"
        "    again = ask(f'number {own}', said, f'number {own}')\n"
        "    return own if said['content'] == again['content'] == str(own) else -1\n",
    )
    async with Stage([], function=f"{tmp_path}/agent.py:agent") as stage:
        stage.sampler = type(stage.sampler)(
            **{**stage.sampler.__dict__, "engine": Echo(stage.renderer.codec, [])}
        )
        tasks = [Task(f"t{n}", (user("?"),), metadata={"own": n}) for n in range(100, 132)]
        rollouts = await asyncio.gather(*map(stage.play, tasks))
    for number, rollout in enumerate(rollouts, 100):
        assert texts(rollout) == [f"number {number}", str(number)] * 2
        assert rollout.env_rewards == [0.0, number]


async def test_what_programs_print_is_kept(tmp_path: Path) -> None:
    command = program(tmp_path, "print('x' * 100_000, 'the end')\nask('?')\n")
    kept = tmp_path / "kept"
    await play([f"5{END}"], command=command, working_dir=str(tmp_path), output_dir=str(kept))
    (file,) = kept.iterdir()
    assert file.name == "0-t-0.txt"
    assert len(file.read_text()) == 65_536 and file.read_text().endswith("x the end\n")


async def test_anthropics_own_client(tmp_path: Path) -> None:
    """By the variables alone; streamed, and made in the function of a module imported before."""
    pytest.importorskip("anthropic")
    text = (
        "import anthropic\n"
        "def agent(task):\n"
        "    said = [{'role': 'user', 'content': task['prompt']}]\n"
        "    client = anthropic.Anthropic()\n"
        "    with client.messages.stream(model='m', max_tokens=64, messages=said) as stream:\n"
        "        first = stream.get_final_text()\n"
        "    said.append({'role': 'assistant', 'content': first})\n"
        "    said.append({'role': 'user', 'content': 'On.'})\n"
        "    second = client.messages.create(model='m', max_tokens=64, messages=said)\n"
        "    return float(second.content[0].text)\n"
    )
    program(tmp_path, text)
    rollout, engine = await play([f"4{END}", f"5{END}"], function=f"{tmp_path}/agent.py:agent")
    check_ledger(rollout, engine)
    assert texts(rollout) == ["What is 2 + 3?", "4", "On.", "5"]
    assert rollout.env_rewards == [0.0, 5.0] and len(rollout.segments) == 1
