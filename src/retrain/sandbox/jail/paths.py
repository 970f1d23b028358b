"""What jailed code may read: the standard library, the packages that it is given, little else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from retrain.types import UserError

_SYSTEM_FILES = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/dev/zero",
    "/dev/urandom",
    "/dev/random",
)
_WORKPLACES = ("/tmp", "/var/tmp", "/mnt", "/srv")
_INSTALLED = ("site-packages", "dist-packages", "ensurepip", "__pycache__")
"""Names in the standard library's directory that are not the standard library's."""


@dataclass
class Readable:
    path: list[str] = field(default_factory=list)
    """The sandbox's `sys.path`: standard library only."""
    readable: list[str] = field(default_factory=list)
    """Files, and directories with all below."""
    listable: list[str] = field(default_factory=list)
    """Directories whose names can be listed, with those of all below."""
    importable: dict[str, str] = field(default_factory=dict)
    """Third-party module name to the directory that it is found in."""
    workplace: str = ""
    """A directory that hides none of these when a file system is mounted on it."""


_OUTSIDE = ("..", "/")
"""First parts of a distribution's files that lie elsewhere, such as its scripts."""


def readable_paths(packages: tuple[str, ...]) -> Readable:
    """
    Args:
        packages: import names; what they depend on can be read and imported too.

    Raises:
        UserError: a package that is not installed here.
    """
    found = Readable()
    for name in packages:
        _add_package(found, name)
    _add_standard_library(found)
    found.readable += [p for p in (*_SYSTEM_FILES, *_library_directories()) if os.path.exists(p)]
    found.readable += _python_libraries()
    found.readable = list(dict.fromkeys(found.readable))
    found.workplace = _workplace([*found.readable, *found.listable])
    return found


def _workplace(paths: list[str]) -> str:
    for directory in _WORKPLACES:
        if os.path.isdir(directory) and not any(p.startswith(f"{directory}/") for p in paths):
            return directory
    raise UserError(
        f"the jail finds no directory of {', '.join(_WORKPLACES)} that holds no package",
        "install Python or its packages elsewhere",
    )


def _add_standard_library(found: Readable) -> None:
    directories = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    for directory in sorted(directories):
        if not os.path.isdir(directory):
            continue
        found.listable.append(directory)
        for entry in sorted(os.listdir(directory)):
            if entry not in _INSTALLED:
                found.readable.append(os.path.join(directory, entry))
    extensions = sysconfig.get_config_var("DESTSHARED")
    found.path += [p for p in (*sorted(directories), extensions) if p and os.path.isdir(p)]
    if extensions and os.path.isdir(extensions):
        found.readable.append(extensions)


def _library_directories() -> list[str]:
    """Where the system keeps shared libraries, as the loader knows them."""
    multiarch = sysconfig.get_config_var("MULTIARCH")
    directories = ["/lib64", "/usr/lib64"]
    if multiarch:
        directories += [f"/lib/{multiarch}", f"/usr/lib/{multiarch}"]
    return directories


def _python_libraries() -> list[str]:
    """Shared libraries beside the interpreter's own: libpython, and a conda environment's."""
    directory = Path(sys.base_prefix, "lib")
    return [str(path) for path in sorted(directory.glob("lib*.so*"))]


def _add_package(found: Readable, name: str) -> None:
    if name in found.importable or name in sys.stdlib_module_names:
        return
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise UserError(
            f"sandbox.packages: there is no package '{name}' here",
            "install it, or take it off the list; the names are those that code imports",
        )
    locations = spec.submodule_search_locations
    path = Path(next(iter(locations)) if locations else spec.origin)
    found.importable[name] = str(path.parent)
    found.readable.append(str(path))
    for distribution in _distributions(name):
        _add_distribution(found, distribution, set())


def _distributions(module: str) -> list[str]:
    """The names of the distributions that a module may come from; mostly it has its own name."""
    try:
        return [importlib.metadata.distribution(module).metadata["Name"]]
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.packages_distributions().get(module, [])


def _add_distribution(found: Readable, name: str, seen: set[str]) -> None:
    """A distribution's top-level files and directories, and those of all that it requires."""
    if name in seen:
        return
    seen.add(name)
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return
    for entry in {
        file.parts[0] for file in distribution.files or () if file.parts[0] not in _OUTSIDE
    }:
        path = Path(str(distribution.locate_file(entry)))
        if entry == "__pycache__" or path.suffix == ".pth" or not path.exists():
            continue
        found.readable.append(str(path))
        module = entry.removesuffix(".py")
        if module.isidentifier():
            found.importable.setdefault(module, str(path.parent))
    for line in distribution.requires or ():
        requirement = _requirement(line)
        if requirement is not None:
            _add_distribution(found, requirement, seen)


def _requirement(line: str) -> str | None:
    """The name of a requirement that holds here without extras."""
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return None
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    return requirement.name
