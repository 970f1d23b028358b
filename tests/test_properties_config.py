"""Any valid config survives being written down; any damage to one is a `UserError`, never more."""

from __future__ import annotations

import copy
import datetime
import string
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from retrain.config import TrainingConfig, dump_yaml, load_config
from retrain.config.presets import PRESETS
from retrain.types import UserError

profile = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
BASE: dict[str, Any] = {
    "model": {"name_or_path": "some/model"},
    "prompt_source": {"type": "list", "prompts": ["a", "b"]},
    "reward_setup": {"rollout_reward_configs": {"exact_match": {}}},
}

# --- values of every key, by its annotation ---

texts = st.text(max_size=8) | st.sampled_from(
    ["null", "~", "yes", "1", "1e3", "0x1", ".inf", "- a", "a: b", "# c", "{x}", "'", '"',
     "\n a\n", "\x00\x85\u2028\ufeff\uffff", "2020-01-01", "!!int 1", "&a", "*a", "<<", "=", "%",
     "1_0", "1:2"]
)  # fmt: skip
names = st.text(string.ascii_letters + "_", min_size=1, max_size=6)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
overlays = st.fixed_dictionaries(
    {},
    optional={
        "algorithm": st.just({"hyperparameters": {"steps": 7}}),
        "environment": st.just({"type": "qa"}),
        "prompt_source": st.just({"limit": 1}),
    },
)
CHOSEN: dict[str, st.SearchStrategy[Any]] = {
    "AlgorithmConfig.backend": st.just("torch"),
    "AlgorithmConfig.name": st.sampled_from(sorted(PRESETS)),
    "SourceSection.prompt_template": st.sampled_from(["{prompt}!", "{{x}} {prompt:>5}"]),
    "TrainingConfig.stages": st.lists(overlays.map(lambda o: {"kind": "rl", **o}), min_size=1),
    "EvaluationMode.name": names,
}
"""Keys whose values their type alone does not describe."""


def of_annotation(annotation: Any, constraints: typing.Sequence[Any]) -> st.SearchStrategy[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return of_annotation(arguments[0], [*constraints, *arguments[1:]])
    if origin in (Union, types.UnionType):
        return st.one_of([of_annotation(a, constraints) for a in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    least = max(bounds(constraints, "min_length"), default=0)
    if origin is list:
        return st.lists(of_annotation(arguments[0], ()), min_size=least, max_size=2)
    if origin is dict:
        return st.dictionaries(texts, of_annotation(arguments[1], ()), max_size=2)
    if origin is tuple:
        return st.tuples(*(of_annotation(a, ()) for a in arguments)).map(list)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return st.deferred(lambda: of_section(annotation))
    if annotation in (int, float):
        return of_number(annotation, constraints)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        type(None): st.none(),
        bool: st.booleans(),
        Any: json_values,
    }
    if annotation is str:
        patterned = any(getattr(c, "pattern", None) for c in constraints)
        return names if patterned or least else texts
    return simple[annotation]


def bounds(constraints: typing.Sequence[Any], name: str) -> list[Any]:
    return [getattr(c, name) for c in constraints if hasattr(c, name)]


def of_number(kind: type, constraints: typing.Sequence[Any]) -> st.SearchStrategy[Any]:
    low = max(bounds(constraints, "ge"), default=None)
    above = max(bounds(constraints, "gt"), default=None)
    high = min(bounds(constraints, "le"), default=None)
    below = min(bounds(constraints, "lt"), default=None)
    if kind is int:
        least = low if above is None else above + 1
        return st.integers(least, (least or 0) + 9) | st.integers(least)
    return st.floats(
        low if above is None else above,
        high if below is None else below,
        exclude_min=above is not None,
        exclude_max=below is not None,
        allow_nan=False,
        allow_infinity=False,
    )


def of_field(model: type[BaseModel], name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    for owner in model.__mro__:
        if (chosen := CHOSEN.get(f"{owner.__name__}.{name}")) is not None:
            return chosen
    return of_annotation(field.annotation, field.metadata)


@st.composite
def of_section(draw: st.DrawFn, model: type[BaseModel], most: int = 3) -> dict[str, Any]:
    """A few keys of a section; those without a default and its `type` always."""
    fields = model.model_fields
    optional = [name for name, f in fields.items() if not f.is_required() and name != "type"]
    chosen = (
        draw(st.lists(st.sampled_from(optional), max_size=most, unique=True)) if optional else []
    )
    needed = [name for name, f in fields.items() if f.is_required() or name == "type"]
    return {name: draw(of_field(model, name, fields[name])) for name in (*needed, *chosen)}


SECTIONS = {
    name: of_field(TrainingConfig, name, field)
    for name, field in TrainingConfig.model_fields.items()
    if name not in ("model", "prompt_source", "reward_setup")
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly valid: two sections of any kind, besides what a run needs."""
    chosen = draw(st.lists(st.sampled_from(sorted(SECTIONS)), max_size=2, unique=True))
    drawn = {name: draw(SECTIONS[name]) for name in chosen}
    return {**BASE, **{name: value for name, value in drawn.items() if value is not None}}


def loaded(source: Any, overrides: typing.Sequence[str] = ()) -> TrainingConfig | None:
    """The config, or None where it was refused in words; anything else fails the test."""
    try:
        return load_config(source, overrides)
    except UserError as error:
        assert error.cause.strip()
        assert str(error).startswith(error.cause)
        return None


def check_round_trip(config: TrainingConfig, file: Path) -> None:
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    assert load_config(config) == config


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.yaml"


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_is_drawn_from(name: str) -> None:
    """The strategies above reach valid values of every section, so the rest is not in vain."""
    loads: list[bool] = []

    @settings(profile, max_examples=25)
    @given(SECTIONS[name])
    def draw(value: Any) -> None:
        loads.append(value is not None and loaded({**BASE, name: value}) is not None)

    draw()
    assert sum(loads) >= 2


@settings(profile, max_examples=40)
@given(configs())
def test_a_config_that_is_written_loads_to_an_equal_one(file: Path, data: dict[str, Any]) -> None:
    config = loaded(data)
    assume(config is not None)
    assert config is not None
    check_round_trip(config, file)


def params(value: Any) -> dict[str, Any]:
    return {**BASE, "environment": {"type": "python", "path": "a:B", "params": {"x": value}}}


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("\x85", "\x85"),
        ("\u2028 a\n\tb", "\u2028 a\n\tb"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.datetime(2026, 1, 2, 3), "2026-01-02T03:00:00"),
    ],
)
def test_text_that_yaml_would_fold_and_dates_are_kept_as_text(
    file: Path, value: Any, read: str
) -> None:
    config = load_config(params(value))
    assert config.environment.params == {"x": read}  # type: ignore[union-attr]
    check_round_trip(config, file)


@pytest.mark.parametrize("value", [float("nan"), {"k": {1, 2}}, 10**2000, "\ud800", {"\ud800": 1}])
def test_what_a_file_would_not_give_back_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UserError, match=r"config: environment\.params\.x.*: a value cannot be"):
        load_config(params(value))


@pytest.mark.parametrize("text", ["!!int ''", "!!float ''", "!!bool x", "!!timestamp x"])
def test_a_tag_that_does_not_fit_its_value_is_no_yaml(file: Path, text: str) -> None:
    file.write_text(f"seed: {text}\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(file)


# --- damage ---


class Odd:
    """Something that no config file holds."""


circle: list[Any] = []
circle.append(circle)
junk = st.sampled_from(
    [None, True, -1, 0, 10**400, -0.0, 1e308, float("nan"), float("inf"), "", " ", "\ud800", b"x",
     [], {}, [None], {"": None}, {1: 2}, {"type": 3}, {"type": "list"}, {None: {}}, (), {1, 2},
     Odd(), Odd, circle, "x" * 5000, [[[[]]]], {"type": []}]
) | json_values  # fmt: skip
junk = junk.map(copy.deepcopy)


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A config in full with one or two values replaced, dropped, renamed or added."""
    valid = draw(st.sampled_from(WHOLE))
    data: Any = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 2))):
        node: Any = data
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = node[key]
            if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
                node = inner
                continue
            damage(draw, node, key)
            break
    return data


def damage(draw: st.DrawFn, node: Any, key: Any) -> None:
    how = draw(st.sampled_from(["replace", "replace", "drop", "rename", "add"]))
    if how == "drop":
        del node[key]
    elif how == "replace" or isinstance(node, list):
        node[key] = draw(junk)
    elif how == "rename":
        node[draw(texts | st.just(f"{key}s"))] = node.pop(key)
    else:
        node[draw(texts)] = draw(junk)


USER = {"type": "model", "model": {"name_or_path": "u"}, "system_prompt": "s {prompt}"}
WHOLE = [
    load_config({**BASE, **sections}).model_dump(mode="json")
    for sections in (
        {"sft": {"dataset": "a:b", "params": {"x": 1}},
         "stages": [{"kind": "sft"}, {"kind": "rl"}]},
        {"environment": {"type": "smolagent", "tools": ["python", {"name": "a:b"}]},
         "prompt_source": {"type": "file", "path": "x.jsonl", "holdout": {"part": "test"}}},
        {"environment": {"type": "dialogue", "user": USER}, "algorithm": {"name": "ppo"},
         "prompt_source": {"type": "hf_dataset", "path": "x", "streaming": True}},
        {"model": {"from_scratch": {"tokenizer": {"corpus": "a:b"}}, "peft": {}},
         "evaluation": {"prompt_source": {"type": "reasoning_gym", "dataset": "d"}},
         "algorithm": {"name": "dapo", "hyperparameters": {"kl": {}, "correction": {}}}},
        {"environment": {"type": "python", "path": "a:B"},
         "prompt_source": {"type": "python", "function": "a:b", "params": {"x": [1, {"y": None}]}}},
    )
]  # fmt: skip


@settings(profile, max_examples=250)
@given(damaged())
def test_a_damaged_config_is_refused_in_words_or_round_trips(file: Path, data: Any) -> None:
    config = loaded(data)
    if config is not None:
        check_round_trip(config, file)


def paths(value: Any, prefix: str = "") -> typing.Iterator[str]:
    keys: typing.Iterable[Any] = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield f"{prefix}{key}"
        yield from paths(value[key], f"{prefix}{key}.")


PATHS = sorted({path for data in WHOLE for path in paths(data)})
YAML_VALUES = texts | st.sampled_from(
    ["[", "{", "{a: 1}", "[1, 2]", "*x", "&x [*x]", "!!python/object:a.b {}", "!x y", "? a", "---",
     "2020-13-45", "2020-01-01T25:00:00Z", "!!binary x", "!!timestamp x", "!!float x", "{[1]: 2}",
     "{{}: 1}", "{a: 1, a: 2}", "<<: 1", "1" * 5000, "!!set {a}", "!!omap [a]", "0o9", "0b2",
     "!!int ''", "!!bool x", "..", "-", "%YAML 9.9", "\t", "'", "|", "!!null x"]
)  # fmt: skip


@settings(profile, max_examples=150)
@given(
    st.sampled_from(WHOLE),
    st.lists(
        st.tuples(
            st.sampled_from(PATHS)
            | st.builds("{}.{}".format, st.sampled_from(PATHS), texts)
            | texts,
            YAML_VALUES,
        ).map("=".join)
        | texts,
        min_size=1,
        max_size=2,
    ),
)
def test_any_override_is_refused_in_words_or_round_trips(
    file: Path, data: dict[str, Any], overrides: list[str]
) -> None:
    config = loaded(data, overrides)
    if config is not None:
        check_round_trip(config, file)


TEXTS = [dump_yaml(load_config(data)) for data in WHOLE]


@settings(profile, max_examples=60)
@given(st.data())
def test_a_torn_or_scribbled_file_loads_or_is_refused_in_words(
    file: Path, data: st.DataObject
) -> None:
    text = data.draw(st.sampled_from(TEXTS))
    start = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.just(len(text)) | st.integers(0, 20))
    damaged = text[:start] + data.draw(YAML_VALUES) + text[start + cut :]
    file.write_text(damaged, encoding="utf-8", errors="surrogatepass")
    loaded(file)


@settings(profile, max_examples=150)
@given(YAML_VALUES, YAML_VALUES, st.sampled_from(["yaml", "toml"]))
def test_any_small_file_loads_or_is_refused_in_words(
    file: Path, first: str, second: str, suffix: str
) -> None:
    path = file.with_suffix(f".{suffix}")
    glue = ": " if suffix == "yaml" else " = "
    path.write_text(f"{first}{glue}{second}", encoding="utf-8", errors="surrogatepass")
    assert loaded(path) is None
