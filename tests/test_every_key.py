"""No key of a config does nothing: each names the test that sees what it does, or its refusal."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest

from every_key import EVERY_KEY
from retrain.config.base import Section
from retrain.config.root import TrainingConfig

TESTS = Path(__file__).parent


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a value may be or hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def only_sections(annotation: Any) -> bool:
    """Nothing but sections below, in lists or mappings or not: their keys are the leaves."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return True
    parts = [part for part in get_args(annotation) if part not in (NoneType, str)]
    return bool(sections_of(annotation)) and all(
        only_sections(part) for part in parts if isinstance(part, type) or get_args(part)
    )


def leaves(model: type[Section], seen: set[type[Section]]) -> Iterator[tuple[str, str]]:
    """(class that declares the key, key) of every key below a section."""
    if model in seen:
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        owner = next(base for base in reversed(model.__mro__) if name in vars(base).get(
            "__annotations__", {}))  # fmt: skip
        if not only_sections(field.annotation):
            yield owner.__name__, name
        for section in sections_of(field.annotation):
            yield from leaves(section, seen)


LEAVES = sorted(set(leaves(TrainingConfig, set())))
ENTRIES = sorted((section, key) for section, keys in EVERY_KEY.items() for key in keys)


def test_every_key_has_an_entry_and_every_entry_a_key() -> None:
    assert [f"{s}.{k} has no entry in tests/every_key.py" for s, k in LEAVES if
            (s, k) not in ENTRIES] == []  # fmt: skip
    assert [f"{s}.{k} is no key any more" for s, k in ENTRIES if (s, k) not in LEAVES] == []


def test_the_walk_reaches_lists_mappings_unions_and_what_is_inherited() -> None:
    assert {
        ("EvaluationMode", "top_k"),
        ("RewardConfig", "weight"),
        ("RolloutRewardConfig", "distribution_strategy"),
        ("FencedFormat", "language"),
        ("SourceSection", "shuffle"),
        ("FileSourceConfig", "format"),
        ("Optimization", "betas"),
        ("LoraConfig", "r"),
        ("StageConfig", "algorithm"),
    } <= set(LEAVES)
    assert not {("Hyperparameters", "kl"), ("EvaluationConfig", "modes")} & set(LEAVES)
    assert len(LEAVES) > 200


@functools.cache
def definitions(file: str) -> dict[str, list[ast.stmt]]:
    """What a test module defines and imports at its top level, by name."""
    found: dict[str, list[ast.stmt]] = {}
    for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names = [node.name]
            case ast.ImportFrom():
                names = [alias.name for alias in node.names]
            case _:
                names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and
                         isinstance(n.ctx, ast.Store)]  # fmt: skip
        for name in names:
            found.setdefault(name, []).append(node)
    return found


@functools.cache
def said(file: str, name: str) -> frozenset[str]:
    """Every word of a test and of what it uses: helpers, fixtures, constants, parameters."""
    words: set[str] = set()
    todo, seen = [(file, name)], set()
    while todo:
        place = todo.pop()
        if place in seen:
            continue
        seen.add(place)
        module, wanted = place
        for node in definitions(module).get(wanted, []):
            if isinstance(node, ast.ImportFrom):
                if (TESTS / f"{node.module}.py").is_file():
                    todo.append((f"{node.module}.py", wanted))
                continue
            for inner in ast.walk(node):
                todo += [(module, used) for used in uses(inner)]
                words |= set(spoken(inner))
    return frozenset(words)


def uses(node: ast.AST) -> list[str]:
    match node:
        case ast.Name(id=name) | ast.arg(arg=name):
            return [name]
    return []


def spoken(node: ast.AST) -> list[str]:
    match node:
        case ast.Constant(value=str(text)):
            return re.findall(r"\w+", text)
        case ast.keyword(arg=str(name)) | ast.Name(id=name) | ast.Attribute(attr=name):
            return [name]
        case ast.arg(arg=name):
            return [name]
    return []


@pytest.mark.parametrize(("section", "key"), ENTRIES, ids=map(".".join, ENTRIES))
def test_its_test_is_there_and_speaks_of_it(section: str, key: str) -> None:
    file, _, name = EVERY_KEY[section][key].partition("::")
    assert (TESTS / file).is_file(), f"there is no tests/{file}"
    kinds = [type(node) for node in definitions(file).get(name, [])]
    assert name.startswith("test_") and set(kinds) <= {ast.FunctionDef, ast.AsyncFunctionDef}
    assert kinds, f"tests/{file} has no {name}"
    assert key in said(file, name), f"{name} in tests/{file} never says {key}"


def test_a_word_that_the_test_does_not_use_is_not_found() -> None:
    words = said("test_every_key.py", "test_a_word_that_the_test_does_not_use_is_not_found")
    assert {"said", "frozenset"} <= words
    assert "EVERY" + "_KEY" not in words
