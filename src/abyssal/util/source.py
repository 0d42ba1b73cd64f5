"""Functions out of a user's file."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["function_named", "run_source"]


def run_source(name: str, path: Path, source: str, *, path_stays: bool) -> ModuleType:
    """Run the text of a file as a module, and return it; what the file imports from its own folder is found.

    Args:
        name: of the module, which is entered under it.
        path: of the file.
        source: its text.
        path_stays: whether its folder stays in `sys.path`, for what its functions import when they are called.

    Raises:
        Exception, SystemExit: whatever the file raises; no module is left then.
    """
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look it up
    folder = str(path.resolve().parent)
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)  # as `python path.py` does, for what the file imports beside it
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        if added and not path_stays:
            sys.path.remove(folder)
    return module


def function_named(name: str, module: ModuleType) -> Callable[..., Any]:
    """Return a function of a module.

    Raises:
        LookupError: if there is none that can be called; its text says in a sentence what there is.
    """
    found = getattr(module, name, None)
    if callable(found):
        function: Callable[..., Any] = found
        return function
    defined = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    raise LookupError(f"It has {', '.join(defined)}." if defined else "It defines no function.")
