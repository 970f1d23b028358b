"""Imports form a DAG.

`RULES` is the table: a node may import what it names and, since that is below it, whatever those
may import. A node is a package or module right under `retrain`, a dotted name for a part with a
rule of its own, or "retrain" for `retrain/__init__.py`. Imports inside functions and under
`TYPE_CHECKING` count like any other, except those that `LATE` names.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "retrain"

PIECES = (
    "types",
    "config",
    "models",
    "rendering",
    "sandbox",
    "tools",
    "rewards",
    "data",
    "engines",
    "engines.base",
    "engines.openai",
    "gateway",
    "teachers",
    "envs",
    "rollout",
    "algorithms",
    "learner",
    "tracking",
)
"""All that a loop is put together from."""

EVERYTHING = (*PIECES, "loops", "backends", "native", "viewer", "recipes")

RULES: dict[str, tuple[str, ...]] = {
    "types": (),
    "version": (),
    "importing": ("types",),
    "config": ("types",),
    "algorithms": (),
    "sandbox": ("types",),
    "viewer": (),
    "models": ("types", "config"),
    "rendering": ("types",),
    "engines.base": ("types",),
    "engines.openai": ("types",),
    "engines": ("types", "config", "models", "engines.base", "engines.openai"),
    "tools": ("types", "sandbox", "engines.openai"),
    "rewards": ("types", "sandbox", "engines.openai"),
    "data": ("types", "config"),
    "gateway": ("types", "rendering", "engines"),
    "teachers": ("types", "rendering", "engines", "models"),
    "envs": ("types", "rendering", "tools", "rewards", "sandbox", "gateway"),
    "rollout": ("envs", "rendering", "engines"),
    "learner": ("types", "config", "models", "algorithms"),
    "tracking": ("types", "config"),
    "loops.credit": ("types", "algorithms"),
    "loops": (*PIECES, "loops.credit", "version"),
    "backends": PIECES,
    "native": (*PIECES, "loops.credit"),
    "recipes": PIECES,
    "retrain": ("types", "config", "version"),
    "cli": ("config", "retrain"),
}

LATE: dict[str, tuple[str, ...]] = {
    "recipes": ("loops", "backends", "native"),
    "cli": EVERYTHING,
    "retrain": EVERYTHING,
}
"""What may be imported too, but only inside a function or under `TYPE_CHECKING`."""

ANYWHERE = "importing"
"""The reader of import paths: every node may use it, except those that it stands on."""

THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "types": (),
    "importing": (),
    "config": ("pydantic", "pydantic_core", "ruamel", "typing_extensions"),
    "algorithms": ("torch",),
}
"""The only packages from outside the standard library that these nodes may use."""


@dataclass(frozen=True)
class Import:
    line: int
    target: str
    """Absolute dotted name, `from a import b` giving `a.b`."""
    late: bool


def node_of(module: str) -> str:
    """The node of a dotted name under `retrain`: the longest name in RULES that begins it."""
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in RULES:
            return ".".join(parts[:length])
    return parts[0] if parts else "retrain"


def below(node: str) -> set[str]:
    """What a node may import: its row of RULES, and all that those rows reach."""
    found: set[str] = set()
    waiting = list(RULES[node])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(RULES[name])
    if node not in (ANYWHERE, *RULES[ANYWHERE]):
        found.add(ANYWHERE)
    return found


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def targets_of(node: ast.AST, package: str) -> list[str]:
    """Absolute names that one statement or call imports; `package` resolves relative ones."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            base = ".".join(package.split(".")[: len(package.split(".")) - level + 1])
            prefix = ".".join(part for part in (base if level else "", module) if part)
            return [f"{prefix}.{alias.name}" for alias in names]
        case ast.Call(func=func, args=[ast.Constant(value=str() as name), *_]):
            return [name] if ast.unparse(func).endswith("import_module") else []
    return []


def imports_in(tree: ast.AST, package: str, late: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        for target in targets_of(node, package):
            yield Import(getattr(node, "lineno", 0), target, late)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports_in(node, package, late or inside or is_type_checking(node))


def fault_of(node: str, found: Import, nodes: set[str]) -> str | None:
    """What is wrong with one import of a module that belongs to `node`, if anything.

    A name that is neither in RULES nor in `nodes`, those on disk, is one of `retrain/__init__.py`.
    """
    top = found.target.partition(".")[0]
    if top != "retrain":
        allowed_outside = THIRD_PARTY.get(node)
        if allowed_outside is None or top in sys.stdlib_module_names or top in allowed_outside:
            return None
        outside = ", ".join(allowed_outside) or "only the standard library"
        return f"{node} -> {top}, but {node} may use {outside}"
    other = node_of(found.target)
    if other not in RULES and other not in nodes:
        other = "retrain"
    allowed = below(node) | (set(LATE.get(node, ())) if found.late else set())
    if other == node or other in allowed:
        return None
    if other in LATE.get(node, ()):
        return f"{node} -> {other} only inside a function or under TYPE_CHECKING"
    return f"{node} -> {other}, but {node} may import {', '.join(sorted(allowed)) or 'nothing'}"


def violations(root: Path) -> list[str]:
    """Every import under `root` that breaks the table, as `file:line: the rule`."""
    files = sorted(root.rglob("*.py"))
    nodes = {node_of(module_name(path, root)) for path in files}
    faults = []
    for path in files:
        module = module_name(path, root)
        where = path.relative_to(root.parent)
        node = node_of(module)
        if node not in RULES:
            faults.append(f"{where}:1: {node} has no rule; add one to RULES")
            continue
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for found in imports_in(ast.parse(path.read_text(encoding="utf-8")), package):
            fault = fault_of(node, found, nodes)
            if fault is not None:
                faults.append(f"{where}:{found.line}: {fault}")
    return faults


def test_the_package_follows_the_table() -> None:
    assert (SRC / "types.py").exists()
    faults = violations(SRC)
    assert not faults, "\n" + "\n".join(faults)


def test_the_table_names_only_nodes_it_has() -> None:
    for table in (RULES, LATE):
        for row in table.values():
            assert set(row) <= set(RULES)
    assert set(LATE) | set(THIRD_PARTY) <= set(RULES)


def test_the_table_has_no_cycle() -> None:
    """Late imports included: they are taken as edges too."""
    edges = {node: {*below(node), *LATE.get(node, ())} for node in RULES}
    while edges:
        leaves = {node for node, targets in edges.items() if not targets & edges.keys()}
        assert leaves, f"a cycle among {sorted(edges)}"
        edges = {node: targets for node, targets in edges.items() if node not in leaves}


def test_the_learner_stays_clear_of_generation() -> None:
    assert below("learner").isdisjoint({"rollout", "envs", "engines", "engines.base"})


def test_reach_follows_the_rows() -> None:
    assert below("tools") == {"types", "sandbox", "engines.openai", "importing"}
    assert below("algorithms") == {"importing"}
    assert below("types") == set()
    assert {"types", "engines", "gateway"} <= below("rollout")


PLANTED = {
    "top level": ("learner/a.py", "import os\nfrom retrain.envs import base\n", "learner -> envs"),
    "inside a function": (
        "learner/a.py",
        "def f():\n    import retrain.rollout.pool\n",
        "learner -> rollout",
    ),
    "from the root": ("learner/a.py", "\nfrom retrain import engines\n", "learner -> engines"),
    "the root itself": ("learner/a.py", "\nfrom retrain import Rollout\n", "learner -> retrain"),
    "relative": ("tools/a.py", "\nfrom ..engines.torch import x\n", "tools -> engines,"),
    "relative from the root": ("tools/__init__.py", "\nfrom .. import loops\n", "tools -> loops"),
    "by name": (
        "sandbox/a.py",
        "import importlib\nimportlib.import_module('retrain.config')\n",
        "sandbox -> config",
    ),
    "under TYPE_CHECKING": (
        "data/a.py",
        "if TYPE_CHECKING:\n    from retrain.rollout import pool\n",
        "data -> rollout",
    ),
    "early in the cli": ("cli.py", "\nimport retrain.loops\n", "cli -> loops only inside"),
    "a base that leans on its package": (
        "engines/base.py",
        "\nfrom retrain.engines.torch import x\n",
        "engines.base -> engines",
    ),
    "torch in the config": ("config/a.py", "\nimport torch.nn\n", "config -> torch"),
    "the helper that types would stand on": (
        "types.py",
        "\nfrom retrain.importing import load\n",
        "types -> importing",
    ),
}


def make_tree(root: Path, files: dict[str, str]) -> Path:
    """A `retrain` of the named files only."""
    for name, text in files.items():
        path = root / "retrain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "retrain"


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_found_with_its_line(case: str, tmp_path: Path) -> None:
    name, text, rule = PLANTED[case]
    faults = violations(make_tree(tmp_path, {name: text}))
    assert len(faults) == 1
    assert faults[0].startswith(f"retrain/{name}:2: ")
    assert rule in faults[0]


def test_a_package_without_a_rule_is_found(tmp_path: Path) -> None:
    faults = violations(make_tree(tmp_path, {"extras/a.py": "import os\n"}))
    assert faults == ["retrain/extras/a.py:1: extras has no rule; add one to RULES"]


def test_what_the_table_allows_passes(tmp_path: Path) -> None:
    files = {
        "cli.py": "def main():\n    from retrain.loops import rl\n",
        "__init__.py": "if TYPE_CHECKING:\n    from retrain.loops import rl\n",
        "tools/a.py": "from retrain.engines.openai import ChatEndpoint\nfrom . import base\n",
        "algorithms/a.py": "import math\nimport torch\nfrom retrain.importing import load\n",
        "importing.py": "from retrain.types import UserError\n",
        "rollout/a.py": "from retrain.types import Rollout\nimport numpy\n",
    }
    assert violations(make_tree(tmp_path, files)) == []
