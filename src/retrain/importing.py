"""Import paths: how a config names the user's own code."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from retrain.types import UserError


def import_object(path: str, kind: str) -> object:
    """The object that `pkg.module:name` or `path/to/file.py:name` points at.

    Modules are also looked for in the working directory. A file is imported once, however often
    it is named. `kind` ("tool", "reward", ...) says in an error what was being looked for.

    Raises:
        UserError: the path has another form, the module cannot be imported, or it does not
            define the name.
    """
    module_path, colon, name = path.rpartition(":")
    if not colon or not module_path or not name:
        raise UserError(
            f"{kind} '{path}' is not an import path",
            "write pkg.module:name or path/to/file.py:name",
        )
    is_file = module_path.endswith(".py")
    module = _import_file(module_path, kind) if is_file else _import_module(module_path, kind)
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(
                f"{kind} '{path}': {module_path} does not define '{name}'",
                suggest(name, _defined_in(module), "it defines"),
            )
        found = getattr(found, part)
    return found


def suggest(name: str, known: Iterable[str], label: str) -> str:
    """The next step after an unknown name: the nearest known one, and all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    listing = f"{label}: {', '.join(names) or 'nothing'}"
    return f"did you mean '{nearest[0]}'? {listing}" if nearest else listing


def _import_module(name: str, kind: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"{kind}: there is no module '{error.name}'",
                f"install it, or run from the directory that holds it (now {os.getcwd()})",
            ) from error
        raise _failed(name, kind, error) from error
    except Exception as error:
        raise _failed(name, kind, error) from error


def _import_file(path: str, kind: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise UserError(f"{kind}: there is no file '{path}'", f"looked for {file}")
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    name = f"retrain_user_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{kind}: cannot import '{path}'", "name a Python source file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed(path, kind, error) from error
    return module


def _failed(module: str, kind: str, error: Exception) -> UserError:
    return UserError(
        f"{kind}: importing '{module}' raised {type(error).__name__}: {error}",
        "fix the module, then run again",
    )


def _defined_in(module: ModuleType) -> list[str]:
    """Public names of a module that it defines itself, or imports but could serve (callables)."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
    ]
    if own:
        return own
    return [n for n, v in vars(module).items() if not n.startswith("_") and not inspect.ismodule(v)]
