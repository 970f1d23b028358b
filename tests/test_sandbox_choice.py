"""Which sandbox a config gets, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from retrain.sandbox import (
    AutoSandbox,
    Capabilities,
    HttpSandbox,
    JailSandbox,
    MontySandbox,
    SandboxUnavailable,
    Session,
    make_sandbox,
)
from retrain.tools import ToolRunner
from retrain.tools.python import PythonTool
from retrain.types import InfrastructureError, ToolCall, UserError
from sandboxes import need_jail


class Broken:
    """An executor whose self-test fails."""

    stateful = True
    capabilities = MontySandbox().capabilities

    def __init__(self) -> None:
        self.closed = False

    async def start(self) -> None:
        raise UserError("it does not hold here", "use another")

    async def session(self) -> Session:
        raise AssertionError("nothing may run in it")

    async def close(self) -> None:
        self.closed = True


def test_a_name_makes_its_executor() -> None:
    assert isinstance(make_sandbox("jail"), JailSandbox)
    assert isinstance(make_sandbox("monty"), MontySandbox)
    assert isinstance(make_sandbox("http", url="http://127.0.0.1:1", stateful=False), HttpSandbox)
    assert isinstance(make_sandbox(), AutoSandbox)
    assert isinstance(make_sandbox("monty", packages=[]), MontySandbox)


def test_auto_falls_back_to_monty_only_when_monty_can_do_what_is_asked() -> None:
    for params, names in (
        ({}, ["jail", "monty"]),
        ({"packages": [], "memory_mb": 64}, ["jail", "monty"]),
        ({"packages": ["numpy"]}, ["jail"]),
        ({"writable": True}, ["jail"]),
        ({"bubblewrap": True}, ["jail"]),
    ):
        sandbox = make_sandbox("auto", **params)
        assert isinstance(sandbox, AutoSandbox)
        assert list(sandbox.candidates) == names


def test_what_an_executor_cannot_do_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.csv")
    refusals: list[tuple[str, dict[str, object], str]] = [
        ("docker", {}, "no sandbox type 'docker'.*auto, jail, monty, http"),
        ("monty", {"packages": ["numpy"]}, "'monty' has no 'packages'.*use .* jail or http"),
        ("monty", {"writable": True}, "'monty' has no 'writable'"),
        ("monty", {"files": {}}, "'monty' has no 'files'"),
        ("monty", {"memory": 3}, "'monty' has no parameter 'memory'.*it takes: timeout_s"),
        ("auto", {"url": "http://x"}, "'auto' has no 'url'.*use sandbox type: http"),
        ("http", {"stateful": False}, "needs sandbox.url"),
        ("http", {"url": "http://x", "stateful": True}, "keeps no variables.*stateful: false"),
        ("http", {"url": "http://x", "writable": True}, "'http' has no 'writable'"),
        ("jail", {"timeout_s": 0}, "sandbox.timeout_s is 0"),
        ("jail", {"files": {"../x": "y"}}, "'../x' is no name of a file"),
        ("jail", {"files": {"x.csv": missing}}, "missing.csv cannot be read: No such file"),
    ]
    for kind, params, message in refusals:
        with pytest.raises(UserError) as caught:
            make_sandbox(kind, **params)
        assert caught.match("(?s)" + message), kind


async def test_auto_takes_the_first_that_passes_its_self_test_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "retrain.sandbox")
    broken, monty = Broken(), MontySandbox()
    sandbox = AutoSandbox({"broken": broken, "monty": monty})
    session = await sandbox.session()
    assert (await session.run("1")).stdout == "1\n"
    assert broken.closed
    assert sandbox.capabilities == monty.capabilities
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("sandbox: monty (broken: it does not hold here")
    await session.close()
    await sandbox.close()


async def test_auto_fails_closed() -> None:
    sandbox = AutoSandbox({"broken": Broken()})
    with pytest.raises(UserError, match="no sandbox works here: broken: it does not hold here"):
        await sandbox.session()


async def test_auto_is_the_jail_where_it_works() -> None:
    need_jail()
    sandbox = make_sandbox("auto", packages=[])
    await sandbox.start()
    assert "Landlock" in sandbox.capabilities.isolation
    await sandbox.close()
    with pytest.raises(UserError, match=r"no sandbox works here: jail: .*no package 'nonesuch'"):
        await make_sandbox("auto", packages=["nonesuch"]).start()


class Fails(Session):
    """Answers once, then its sandbox is gone."""

    def __init__(self, inner: Session) -> None:
        self.inner = inner
        self.calls = 0

    async def run(self, code: str):  # type: ignore[no-untyped-def]
        self.calls += 1
        if self.calls > 1:
            raise SandboxUnavailable("it is gone")
        return await self.inner.run(code)

    async def close(self) -> None:
        await self.inner.close()


class Losing(MontySandbox):
    @property
    def capabilities(self) -> Capabilities:
        return super().capabilities

    async def session(self) -> Fails:  # type: ignore[override]
        return Fails(await super().session())


@pytest.mark.parametrize("stateful", [True, False])
async def test_a_session_that_held_variables_is_not_replaced_by_an_empty_one(
    stateful: bool,
) -> None:
    """Retrying in a fresh session would blame the model for names that the sandbox lost."""
    sandbox = Losing(stateful=stateful)
    calls = [ToolCall("python", {"code": code}) for code in ("x = 1", "2 + 2")]
    async with ToolRunner([PythonTool(sandbox)], backoff_s=0.01) as runner:
        await runner.run(calls[:1])
        if stateful:
            with pytest.raises(InfrastructureError, match="it is gone"):
                await runner.run(calls[1:])
        else:
            assert (await runner.run(calls[1:]))[0].text == "4"
    await sandbox.close()
