"""Reading a config: YAML, TOML or a dict, dotted overrides, errors that name the key."""

from __future__ import annotations

import difflib
import itertools
import math
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retrain.config.agents import AgentsConfig
from retrain.config.base import Section
from retrain.config.explain import explain, short
from retrain.config.guided import unfit_for_a_group_of_one, unfit_for_teachers
from retrain.config.idle import idle_keys
from retrain.config.presets import DECIDING
from retrain.config.recipes import PREFIX, recipe_path
from retrain.config.root import StageConfig, StageKind, TrainingConfig, rewards_train, rolls_out
from retrain.config.teachers import OnPolicyDistillation
from retrain.types import UserError

_LONGEST_INT_BITS = 4096


def load_config(
    source: str | Path | Mapping[str, Any] | TrainingConfig,
    overrides: Sequence[str] = (),
    *,
    only: StageKind | None = None,
    runs: bool = True,
) -> TrainingConfig:
    """Read, override and check a config, its stages (or those of the kind `only`) included, unless
    nothing of it `runs`.

    `overrides` are `dotted.key=value` strings whose values are YAML; list items go by index. Dates
    and times become text. A path `recipe:NAME/FILE` is a config of the package's own.

    Raises:
        UserError: the file cannot be read, an override does not fit, or keys are wrong.
    """
    raw: Mapping[str, Any]
    if isinstance(source, TrainingConfig):
        raw, where = _written(source), "config"
    elif isinstance(source, Mapping):
        raw, where = source, "config"
    else:
        where = str(source)
        found = where.startswith(PREFIX)
        raw = _read_file(recipe_path(where.removeprefix(PREFIX)) if found else Path(source))
    try:
        data = _plain(raw)
    except RecursionError:
        raise UserError(f"{where}: a value is nested too deeply, or in itself") from None
    for override in overrides:
        _apply_override(data, override)
    config = _validate(data, where)
    if not runs:
        return config
    stages = resolve_stages(config, where, only=only)
    for cause, next_step in idle_keys(config, stages) if only is None else ():
        raise UserError(f"{where}: {cause}", next_step)
    return config


def resolve_stages(
    config: TrainingConfig, where: str = "config", *, only: StageKind | None = None
) -> list[tuple[str, StageKind, TrainingConfig]]:
    """The pipeline as (name, kind, config with the stage's sections overlaid).

    `only` keeps the stages of one kind; a config without `stages` then has one such stage.

    Raises:
        UserError: a stage does not check, or lacks the section that it needs.
    """
    if config.stages is None:
        placed = [(where, stage) for stage in _default_stages(config, only)]
    else:
        placed = [
            (f"{where}: stages.{index}", stage)
            for index, stage in enumerate(config.stages)
            if only in (None, stage.kind)
        ]
    if not placed:
        raise UserError(f"{where}: stages has none of kind {only}", "Add one, or run them all.")
    base = config.model_dump(mode="json", exclude={"stages", "algorithm"})
    base["algorithm"] = config.algorithm.choices()
    taken = {stage.name for _, stage in placed if stage.name}
    resolved: list[tuple[str, StageKind, TrainingConfig]] = []
    for place, stage in placed:
        stage_config = _validate(merge(base, stage.overlays()), place)
        _require_sections(stage.kind, stage_config, place)
        name = stage.name or _free_name(stage.kind, taken)
        if any(name == other for other, _, _ in resolved):
            raise UserError(f"{place}: two stages have the name {name}", "Rename one of them.")
        taken.add(name)
        resolved.append((name, stage.kind, stage_config))
    return resolved


def _free_name(kind: str, taken: Collection[str]) -> str:
    names = (kind if number == 1 else f"{kind}-{number}" for number in itertools.count(1))
    return next(name for name in names if name not in taken)


def _default_stages(config: TrainingConfig, only: StageKind | None) -> list[StageConfig]:
    if only in ("sft", "rl", "eval"):
        return [StageConfig(kind=only)]
    kind: StageKind = "rl"
    if only == "distill" or config.distillation is not None:
        kind = "distill"
    elif config.prompt_source is None and config.sft is not None:
        kind = "sft"
    if config.evaluation is None:
        return [StageConfig(kind=kind)]
    before, after = (StageConfig(kind="eval", name=name) for name in ("before", "after"))
    return [before, StageConfig(kind=kind), after]


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Overlay nested mappings; a section whose `type` changes is replaced as a whole."""
    merged = dict(base)
    for key, value in overlay.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            retyped = "type" in value and value["type"] != old.get("type", value["type"])
            merged[key] = dict(value) if retyped else merge(old, value)
        else:
            merged[key] = value
    return merged


def dump_yaml(config: TrainingConfig) -> str:
    """Every key with its value, nulls too: loading the text gives an equal config, and equal
    stages. Where a stage changes what a preset fills in, `algorithm` keeps to what was given."""
    from io import StringIO

    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        """With text that YAML would fold or strip, such as U+0085, in escapes."""

        def represent_str(self, text: str) -> Any:
            style = None if text.replace("\n", "").isprintable() else '"'
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Representer.add_representer(str, Representer.represent_str)
    stream = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(_written(config), stream)
    return stream.getvalue()


def _written(config: TrainingConfig) -> dict[str, Any]:
    written = config.model_dump(mode="json")
    if any(_fits_anew(stage.algorithm) for stage in config.stages or ()):
        written["algorithm"] = config.algorithm.choices()
    return written


def _fits_anew(overlay: Mapping[str, Any]) -> bool:
    """Whether what a preset fills in depends on the overlay, and so on what was given."""
    changed = overlay.get("hyperparameters")
    return "name" in overlay or (
        isinstance(changed, Mapping) and not DECIDING.keys().isdisjoint(changed)
    )


_NEEDED: dict[StageKind, str] = {
    "sft": "sft",
    "rl": "prompt_source",
    "distill": "distillation",
    "eval": "evaluation",
}


def _require_sections(kind: StageKind, config: TrainingConfig, place: str) -> None:
    needed = _NEEDED[kind]
    if getattr(config, needed) is None:
        raise UserError(
            f"{place}: a stage of kind {kind} needs section {needed}", f"Add `{needed}:`."
        )
    rewards = config.reward_setup
    has_reward = (
        rewards.step_reward_configs
        or rewards.rollout_reward_configs
        or rewards.group_reward_configs
        or config.environment.type in ("python", "gymnasium", "openenv", "verifiers", "external")
        or (isinstance(config.environment, AgentsConfig) and config.environment.path is not None)
    )
    if rolls_out(kind, config) and rewards_train(kind, config) and not has_reward:
        raise UserError(
            f"{place}: reward_setup has no reward, so there is nothing to learn from",
            "Add an entry under reward_setup.rollout_reward_configs.",
        )
    settings, section = config.algorithm.hyperparameters, config.distillation
    if kind == "distill" and isinstance(section, OnPolicyDistillation):
        if config.prompt_source is None:
            raise UserError(
                f"{place}: distillation.type: on_policy needs section prompt_source, the tasks "
                "that the student acts on",
                "Add `prompt_source:`.",
            )
        for cause, next_step in unfit_for_teachers(section, settings):
            raise UserError(f"{place}: {cause}", next_step)
    if kind == "rl" and (reason := unfit_for_a_group_of_one(settings)):
        raise UserError(f"{place}: {reason}")


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.isoformat() if isinstance(value, date | time) else value


def _parse_yaml(text: str) -> Any:
    """
    Raises:
        YAMLError, ValueError, RecursionError: it is not YAML, or a value does not fit its tag.
    """
    from ruamel.yaml import YAML

    try:
        return YAML(typ="safe", pure=True).load(text)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"a value does not fit its tag: {error}") from error


def _read_file(path: Path) -> dict[str, Any]:
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(
            path.name, [p.name for p in _siblings(path)], n=1, cutoff=0.5
        )
        hint = f"Did you mean {path.parent / near[0]}?" if near else "Check the path."
        raise UserError(f"config file {path} does not exist", hint) from None
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 text: {error}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"config file {path} cannot be read: {reason}", "Check the path.") from None
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else _parse_yaml(text)
    except (YAMLError, ValueError, RecursionError) as error:
        reason = _syntax_error(error)
        raise UserError(f"{path} is not valid {_language(path)}: {reason}") from None
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise UserError(
            f"{path} {found}; expected a mapping of sections",
            "Start with `model:`; docs/guide.md shows a whole file.",
        )
    return data


def _syntax_error(error: Exception) -> str:
    from ruamel.yaml.error import MarkedYAMLError

    if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _siblings(path: Path) -> Iterable[Path]:
    return path.parent.iterdir() if path.parent.is_dir() else ()


def _language(path: Path) -> str:
    return "TOML" if path.suffix == ".toml" else "YAML"


def _apply_override(data: dict[str, Any], override: str) -> None:
    from ruamel.yaml.error import YAMLError

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"--set {override!r} is not key=value",
            "Example: --set algorithm.hyperparameters.steps=5",
        )
    try:
        value = _plain(_parse_yaml(text)) if text else None
    except (YAMLError, ValueError, RecursionError):
        value = text
    node: Any = data
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(
                    f"--set {key}: {'.'.join(parts[:depth])} is a list of {len(node)}; "
                    f"{part!r} is not an index into it"
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise UserError(f"--set {key}: {'.'.join(parts[:depth])} is a value, not a section")
        if last:
            node[index] = value
        else:
            node = node[index]


def _validate(data: Mapping[str, Any], where: str) -> TrainingConfig:
    try:
        config = TrainingConfig.model_validate(data)
    except ValidationError as error:
        lines = [f"{where}: {line}" for line in explain(error.errors())]
        raise UserError("\n".join(lines), "See docs/config.md for every key.") from None
    for path, value in _leaves(config.model_dump()):
        if not _writable(value):
            raise UserError(
                f"{where}: {path}: a value cannot be written as YAML: {short.repr(value)}",
                "Use numbers, strings, booleans, lists and mappings only.",
            )
    return config


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What a value holds, keys too, with dotted paths."""
    if isinstance(value, Mapping):
        yield from ((path, key) for key in value)
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, value


def _writable(value: Any) -> bool:
    """Whether a file gives a scalar back as it was."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode() == value
    if isinstance(value, int):
        return value.bit_length() <= _LONGEST_INT_BITS
    return value is None or (isinstance(value, float) and not math.isnan(value))
