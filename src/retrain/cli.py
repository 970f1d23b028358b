"""The command line. Heavy imports come inside the commands: `--help` answers at once."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from retrain import __version__
from retrain.types import UserError

if TYPE_CHECKING:
    from retrain.config.root import TrainingConfig

Only = Literal["sft", "distill", "eval"]

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit codes: a mistake in config, data or code of the user's; any other error; Ctrl-C. SIGTERM is
143; docs/failures.md lists them."""

_THIRD_PARTY = ("accelerate", "huggingface_hub", "peft", "torch", "transformers")

app = typer.Typer(
    name="retrain",
    help="Train language models to act: tools, several turns, verifiable rewards.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML or TOML file, or recipe:NAME.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, such as algorithm.hyperparameters.steps=5; may be repeated.",
    ),
]
OutputDir = Annotated[
    Path | None, typer.Option(help="Where run directories go, instead of the config's output_dir.")
]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="[RUN]",
        help="Go on with a run that was stopped: the newest one; with `auto`, that one unless it "
        "is complete or there is none; with the path of a run directory, that one.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"retrain {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Train language models to act: tools, several turns, verifiable rewards."""


class ResumingCommand(TyperCommand):
    """A command whose `--resume` may stand alone, for `--resume latest`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for arg, after in itertools.zip_longest(args, args[1:], fillvalue="-"):
            alone = arg == "--resume" and after.startswith("-")
            given.append("--resume=latest" if alone else arg)
        return super().parse_args(ctx, given)


@app.command("run", cls=ResumingCommand)
def run_command(
    config: ConfigFile,
    overrides: Set = None,
    output_dir: OutputDir = None,
    resume: Resume = None,
    debug: Debug = False,
) -> None:
    """Run a config: all of its stages."""
    with _errors(debug):
        _run(config, _overrides(overrides, output_dir), resume=resume)


@app.command()
def check(config: ConfigFile, overrides: Set = None, debug: Debug = False) -> None:
    """Check a config and print what a run of it would do."""
    with _errors(debug):
        loaded = _load(config, _overrides(overrides))
        from retrain.loops.check import check as check_config

        typer.echo(check_config(loaded))


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this one, to start from.")
    ] = None,
    debug: Debug = False,
) -> None:
    """List the configs that come with the package; `retrain run recipe:NAME` runs one."""
    with _errors(debug):
        from retrain.config.recipes import about, recipe_path
        from retrain.config.recipes import recipes as known

        if name is not None:
            typer.echo(recipe_path(name).read_text(encoding="utf-8"), nl=False)
            return
        for found, path in known():
            typer.echo(f"{found}\n    {about(path)}" if about(path) else found)


@app.command(cls=ResumingCommand)
def demo(
    overrides: Set = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
    output_dir: OutputDir = None,
    resume: Resume = None,
    debug: Debug = False,
) -> None:
    """Teach a tiny model to use a tool, from scratch: the whole loop in about a minute."""
    with _errors(debug):
        _run(Path("recipe:demo"), _overrides(overrides, output_dir, seed), resume=resume)


@app.command(cls=ResumingCommand)
def sft(
    config: ConfigFile,
    overrides: Set = None,
    output_dir: OutputDir = None,
    resume: Resume = None,
    debug: Debug = False,
) -> None:
    """Run only the SFT stages of a config."""
    with _errors(debug):
        _run(config, _overrides(overrides, output_dir), only="sft", resume=resume)


@app.command(cls=ResumingCommand)
def distill(
    config: ConfigFile,
    *,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="PATH",
            help="Another agent's log to learn from, instead of distillation.sources; may be "
            "repeated.",
        ),
    ] = None,
    overrides: Set = None,
    output_dir: OutputDir = None,
    resume: Resume = None,
    debug: Debug = False,
) -> None:
    """Learn from other agents: the distillation stages of a config, with its evaluations where it
    lists no stages."""
    given = _overrides(overrides, output_dir)
    if source:
        given = ["distillation.type=traces", f"distillation.sources={json.dumps(source)}", *given]
    with _errors(debug):
        _run(config, given, only="distill", resume=resume)


@app.command("eval")
def eval_command(
    config: ConfigFile,
    overrides: Set = None,
    output_dir: OutputDir = None,
    debug: Debug = False,
) -> None:
    """Run only the evaluation stages of a config."""
    with _errors(debug):
        _run(config, _overrides(overrides, output_dir), only="eval")


@app.command()
def gateway(
    config: ConfigFile,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- COMMAND...]",
            help="A program that finds the gateway in its environment; the gateway ends with it.",
        ),
    ] = None,
    *,
    overrides: Set = None,
    debug: Debug = False,
) -> None:
    """Serve the APIs of OpenAI and Anthropic to agents, and write down what is said."""
    with _errors(debug):
        loaded = _load(config, _overrides(overrides), runs=False)
        if loaded.gateway is None:
            raise UserError(f"{config} has no section gateway", "Add `gateway:`.")
        from retrain.loops.gateway import serve

        report = asyncio.run(serve(loaded, command=command or (), say=_say))
        _say(
            f"served {report.exchanges} answers in {report.sessions} sessions"
            + (f"; {report.rollouts} rollouts" if report.rollouts else "")
        )
        if report.exit_code:
            raise typer.Exit(report.exit_code)


@app.command()
def doctor(
    sandbox_url: Annotated[
        str | None, typer.Option(help="Also try a server that speaks SandboxFusion's /run_code.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Say instead what a vLLM or SGLang server at this address can do."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Say what works on this machine: which sandboxes, and how to get a stronger one; or what an
    inference server can do."""
    with _errors(debug):
        if engine is not None:
            from retrain.engines.server.doctor import report as report_engine

            said, good = asyncio.run(report_engine(engine))
            typer.echo(said)
            if not good:
                raise typer.Exit(FAILURE)
            return
        from retrain.sandbox.doctor import report

        typer.echo(asyncio.run(report(sandbox_url)))


def main() -> None:
    app()


def _run(
    path: Path, overrides: list[str], only: Only | None = None, resume: str | None = None
) -> None:
    config = _load(path, overrides, only)
    from retrain.loops.interrupt import Interrupted
    from retrain.loops.run import run

    try:
        asyncio.run(run(config, only=only, resume=resume))
    except Interrupted as interrupted:
        if interrupted.checkpoint is None:
            _say("interrupted; there was nothing to save yet")
        else:
            _say(f"interrupted; saved: {interrupted.checkpoint}")
            _say("  Go on with the same command and --resume.")
        raise typer.Exit(interrupted.exit_code) from None


def _load(
    path: Path, overrides: list[str], only: Only | None = None, *, runs: bool = True
) -> TrainingConfig:
    from retrain.config.load import load_config

    config = load_config(path, overrides, only=only, runs=runs)
    _set_up_logging(config.logging_level)
    return config


def _overrides(
    given: list[str] | None, output_dir: Path | None = None, seed: int | None = None
) -> list[str]:
    """The `--set` values, then the dedicated options: those win."""
    overrides = list(given or ())
    if output_dir is not None:
        overrides.append(f"output_dir={json.dumps(str(output_dir))}")
    if seed is not None:
        overrides.append(f"seed={seed}")
    return overrides


def _set_up_logging(level: str) -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("retrain").setLevel(level.upper())
    if level != "debug":
        _quiet_third_parties()


def _quiet_third_parties() -> None:
    """Progress bars and advice of the libraries below, off; they read these when imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _THIRD_PARTY:
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Turn exceptions into a few lines on standard error and an exit code."""
    try:
        yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        if debug:
            traceback.print_exc()
        _say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except typer.Exit:
        raise
    except BaseExceptionGroup as group:
        _fail(_first(group), group, debug)
    except Exception as error:
        _fail(error, error, debug)


def _fail(error: BaseException, shown: BaseException, debug: bool) -> None:
    if debug:
        traceback.print_exception(shown)
    if isinstance(error, UserError):
        _say(f"error: {error}")
        raise typer.Exit(USER_ERROR)
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted")
        raise typer.Exit(INTERRUPTED)
    message = " ".join(str(error).split())
    _say(f"error: {type(error).__name__}: {message}".removesuffix(": "))
    if not debug:
        _say("  Run again with --debug for the traceback.")
    raise typer.Exit(FAILURE)


def _first(error: BaseException) -> BaseException:
    """The exception to report of a group: an interrupt or the user's mistake, if there is one."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_first(inner) for inner in error.exceptions]
    urgent = [e for e in leaves if isinstance(e, KeyboardInterrupt | UserError)]
    return (urgent or leaves)[0]


def _say(text: str) -> None:
    typer.echo(text, err=True)
