"""The configs that come with the package: `recipe:NAME/FILE` wherever a path may stand."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from retrain.importing import suggest
from retrain.types import UserError

PREFIX = "recipe:"
_ROOT = Path(str(files("retrain"))) / "recipes"


def recipe_path(name: str) -> Path:
    """The file of `NAME/FILE`, with or without its `.yaml`; of `NAME` alone, the one of its name.

    Raises:
        UserError: there is no such recipe.
    """
    known = dict(recipes())
    wanted = name.removesuffix(".yaml")
    if wanted not in known and f"{wanted}/{wanted}" in known:
        wanted = f"{wanted}/{wanted}"
    if wanted not in known:
        raise UserError(f"there is no recipe {name!r}", suggest(wanted, list(known), "recipes"))
    return known[wanted]


def recipes() -> Iterator[tuple[str, Path]]:
    """(name, path) of each, in order."""
    for path in sorted(_ROOT.glob("*/*.yaml")):
        yield f"{path.parent.name}/{path.stem}", path


def about(path: Path) -> str:
    """The first sentence of the comment that a recipe opens with; empty where there is none."""
    said = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        said.append(line.lstrip("# ").rstrip())
    sentence, ends, _ = " ".join(said).partition(". ")
    return sentence + ends.rstrip()
