"""Programs that fail: whose fault it is, and what is left of the rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outside import END, play, program
from retrain.engines.base import Completion, GenerateRequest
from retrain.types import InfrastructureError, Rollout, UserError
from scripted import ScriptedEngine, check_ledger, plain_renderer

ANSWER = f"5{END}"


async def run(
    folder: Path, text: str, turns: Any = (ANSWER,), **settings: Any
) -> tuple[Rollout, ScriptedEngine]:
    given = {"command": program(folder, text), "working_dir": str(folder), "kill_after_s": 0.5}
    return await play(turns, **{**given, **settings})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("sys.exit(3)", r"ended without asking the model in task t; exit code 3"),
        ("pass", r"ended without asking the model in task t; exit code 0"),
        ("print('so far')\n1 / 0", r"(?s)exit code 1.*so far.*ZeroDivisionError"),
        ("reward(1)", "ended without asking the model"),
        ("ask({'role': 'jester', 'content': ''})", r"none of its \d requests|without asking"),
    ],
)
async def test_one_that_gets_nothing_from_the_model_stops_the_run(
    text: str, fault: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=fault) as failure:
        await run(tmp_path, text, retries=3)
    assert "agent.py" in failure.value.cause


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"command": ["no-such-program-here"]}, "there is no program 'no-such-program-here'"),
        ({"command": ["python", "absent.py"]}, "there is no file 'absent.py'"),
        ({"command": ["./agent.py"]}, "there is no program './agent.py'"),
        ({"command": ["python"], "working_dir": "/no/such"}, "there is no directory /no/such"),
        ({"function": "absent.py:agent"}, "there is no file 'absent.py'"),
        ({"function": "agent"}, "'agent' is not an import path"),
        ({"function": "no_such_module:agent"}, "ModuleNotFoundError: No module named 'no_such"),
        ({"function": "FILE:agnet"}, "does not define 'agnet'"),
        ({"function": "FILE:two"}, "two cannot be called with one argument, the task"),
        ({"function": "FILE:number"}, "number cannot be called with one argument, the task"),
        ({"function": "BROKEN:agent"}, r"raised ZeroDivisionError: .*broken.py, line \d+"),
        ({"function": "BROKEN:agent", "preload": False}, "raised ZeroDivisionError"),
    ],
)
async def test_what_cannot_be_started_is_refused(
    settings: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    program(tmp_path, "def two(a, b): ...\nnumber = 3\n")
    program(tmp_path, "1 / 0\n", "broken.py")
    if function := settings.get("function"):
        named = {"FILE": "agent.py", "BROKEN": "broken.py"}
        for name, file in named.items():
            function = function.replace(name, str(tmp_path / file))
        settings = {**settings, "function": function}
    with pytest.raises(UserError, match=fault):
        await play([ANSWER], **{"working_dir": str(tmp_path), **settings})


async def test_a_program_that_goes_away_between_check_and_start(tmp_path: Path) -> None:
    script = tmp_path / "agent"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(UserError, match="failed: No such file or directory"):
        await play([ANSWER], command=["./agent"], working_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("returns", "fault"),
    [
        ("float('nan')", "returned the reward nan"),
        ("{'reward': 'good'}", "reward 'good', which is no number"),
        ("{n: n for n in range(10_000)}", "bytes of numbers"),
    ],
)
async def test_a_reward_that_is_no_number_stops_the_run(
    returns: str, fault: str, tmp_path: Path
) -> None:
    program(tmp_path, f"def agent(task):\n    ask('?')\n    return {returns}\n")
    with pytest.raises(UserError, match=fault):
        await play([ANSWER], function=f"{tmp_path}/agent.py:agent")


FAILING = {
    "exit": "ask('?')\nprint('oh no')\nsys.exit(4)",
    "killed": "ask('?')\nprint('oh no')\nos.kill(os.getpid(), 9)",
    "late": "ask('?')\nreward(0.5)\nprint('oh no')\ntime.sleep(60)",
}


@pytest.mark.parametrize(
    ("how", "kinds", "cause"),
    [
        ("exit", ["environment"] * 2, "ended with exit code 4"),
        ("killed", ["environment"] * 2, "was killed by signal 9"),
        ("late", ["deadline"], "did not end within 2 s"),
    ],
)
async def test_a_failure_after_the_model_spoke_is_masked(
    how: str, kinds: list[str], cause: str, tmp_path: Path
) -> None:
    """Tried again first, except where it took too long."""
    rollout, engine = await run(tmp_path, FAILING[how], [ANSWER] * 2, retries=1, timeout_s=2.0)
    assert [f.kind for f in rollout.failures] == kinds
    assert len(engine.requests) == len(kinds)
    assert rollout.stop_reason == "error" and not rollout.messages
    assert cause in str(rollout.error) and "oh no" in str(rollout.error)


@pytest.mark.parametrize(
    ("how", "reward", "code"), [("exit", 0.0, 4.0), ("killed", 0.0, -9.0), ("late", 0.5, None)]
)
async def test_or_scored_as_it_stands(
    how: str, reward: float, code: float | None, tmp_path: Path
) -> None:
    rollout, engine = await run(tmp_path, FAILING[how], on_failure="score", timeout_s=2.0)
    check_ledger(rollout, engine)
    assert (rollout.error, rollout.stop_reason) == (None, "environment")
    assert rollout.env_rewards == [reward]
    assert rollout.metrics.get("external/exit_code") == code


@pytest.mark.parametrize("asks", ["", "ask('?')\n"])
async def test_exit_code_75_asks_for_another_attempt(asks: str, tmp_path: Path) -> None:
    """Whatever `on_failure` says, and also before the model was asked."""
    text = (
        f"{asks}if not os.path.exists('again'):\n    open('again', 'w')\n    sys.exit(75)\n"
        "ask('?')\nreward(1)\n"
    )
    rollout, _ = await run(tmp_path, text, [ANSWER] * 9, retries=1, on_failure="score")
    assert [f.kind for f in rollout.failures] == ["environment"]
    assert rollout.error is None and rollout.env_rewards[-1] == 1.0


async def test_one_that_never_asks_and_never_ends_is_late(tmp_path: Path) -> None:
    rollout, _ = await run(tmp_path, "time.sleep(60)", timeout_s=0.5, on_failure="score")
    assert [f.kind for f in rollout.failures] == ["deadline"]


class Failing(ScriptedEngine):
    async def generate(self, request: GenerateRequest) -> Completion:
        if self.requests:
            raise InfrastructureError("away")
        return await super().generate(request)


async def test_the_engines_failure_wins(tmp_path: Path) -> None:
    """Over what the program makes of it, and at once."""
    text = (
        "ask('?')\ntry:\n    ask('again?')\nexcept Exception:\n    reward(1)\n    time.sleep(60)\n"
    )
    engine = Failing(plain_renderer("chatml").codec, [ANSWER])
    rollout, _ = await run(tmp_path, text, engine=engine, on_failure="score")
    assert [f.kind for f in rollout.failures] == ["engine"]
    assert "away" in str(rollout.error)


async def test_its_reward_call_may_end_it(tmp_path: Path) -> None:
    text = "ask('?')\nreward(0.25)\ntime.sleep(60)\n"
    rollout, engine = await run(tmp_path, text, ends_on_reward=True)
    check_ledger(rollout, engine)
    assert rollout.env_rewards == [0.25] and rollout.metrics["external/seconds"] < 30
    assert "external/exit_code" not in rollout.metrics


async def test_a_turn_that_was_cut_is_the_stop_reason(tmp_path: Path) -> None:
    rollout, _ = await run(tmp_path, "ask('?')\nask('??')", [ANSWER, "cut"])
    assert rollout.stop_reason == "length"


class Full(ScriptedEngine):
    """Has room for some answers."""

    room = 1

    async def generate(self, request: GenerateRequest) -> Completion:
        if len(self.requests) < self.room:
            return await super().generate(request)
        self.turns = [*self.turns[: len(self.requests)], []]
        made = await super().generate(request)
        return Completion(made.token_ids, made.logprobs, made.versions, "context")


async def test_a_full_context_is_the_models_own_end(tmp_path: Path) -> None:
    """The program is refused a further turn; that it fails of it does not mask the rollout."""
    engine = Full(plain_renderer("chatml").codec, [ANSWER])
    rollout, _ = await run(tmp_path, "first = ask('?')\nask('?', first, 'on')", engine=engine)
    assert (rollout.error, rollout.stop_reason, rollout.env_rewards) == (None, "context", [0.0])
    assert [m.content for m in rollout.messages] == ["?", "5"]
    engine = Full(plain_renderer("chatml").codec, [ANSWER])
    engine.room = 0
    with pytest.raises(UserError, match="leaves no room in the context"):
        await run(tmp_path, "ask('?')", engine=engine)
