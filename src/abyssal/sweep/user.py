"""A user's own function, by file and name, as something that any process can call.

The text of the file travels with it: workers run what the file said when the sweep began, also where the disk has no
such file, or it has been changed since.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from abyssal.sweep.engine import seed_of
from abyssal.sweep.outcome import Cell
from abyssal.util.source import function_named, run_source

__all__ = ["FileFunction", "FunctionError", "check_cells", "file_function"]

_VERSION_DIGITS = 15  # in base 16: what SQLite's 8 bytes with a sign hold


class FunctionError(Exception):
    """A file or a function that cells cannot be computed with."""


@dataclass(frozen=True)
class FileFunction:
    """A function of a file, called with a cell's parameters as keyword arguments.

    Before each call the generators of Python, numpy and torch are seeded from the cell alone, so that a function that
    seeds nothing gives the same on every engine, in any order.

    Attributes:
        path: of the file, absolute.
        name: of the function in it.
        source: text of the file.
    """

    path: Path
    name: str
    source: str = field(repr=False)

    @property
    def study(self) -> str:
        """What its cells belong to in a store."""
        return f"{self.path.name}:{self.name}"

    @property
    def version(self) -> int:
        """A number that stands for the text of the file; part of the key of its cells."""
        return int(hashlib.sha256(self.source.encode()).hexdigest()[:_VERSION_DIGITS], 16)

    def function(self) -> Callable[..., Any]:
        """Return the function itself, running the file where this process has not yet.

        Raises:
            FunctionError: if the file fails, or has no such function.
        """
        try:
            return function_named(self.name, self._module())
        except LookupError as error:
            raise FunctionError(f"{self.path} has no function {self.name!r}. {error}") from None

    def _module(self) -> ModuleType:
        name = f"_abyssal_sweep_{self.path.stem}_{self.version:x}"
        if name in sys.modules:
            return sys.modules[name]
        try:
            return run_source(name, self.path, self.source, path_stays=True)
        except SystemExit as error:
            raise FunctionError(
                f"{self.path} ends with sys.exit({'' if error.code is None else repr(error.code)}) when run. It is "
                'run to find the function in it: put what is a script under if __name__ == "__main__".'
            ) from error
        except Exception as error:
            raise FunctionError(f"{self.path} failed when run: {type(error).__name__}: {error}") from error

    def __call__(self, cell: Cell) -> Mapping[str, Any]:
        """Compute one cell.

        Returns:
            What the function returned; a single number under the name `result`.
        """
        from abyssal.util.randomness import seed_all  # torch takes long to import

        function = self.function()
        seed_all(seed_of(cell))
        values = function(**cell)
        if isinstance(values, Mapping):
            return values
        if values is None:
            raise TypeError(f"{self.name} returned None; expected a number, or numbers by name such as {{'loss': 0.1}}")
        return {"result": values}


def file_function(spec: str) -> FileFunction:
    """Return the function that `path.py:name` means; the file is run once, here.

    Raises:
        FunctionError: naming what is wrong with it.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise FunctionError(f"{spec!r}: expected a file and a function in it, such as train.py:train.")
    path = Path(file)
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FunctionError(f"{file}: cannot be read ({error.strerror}).") from error
    found = FileFunction(path.resolve(), name, source)
    found.function()
    return found


def check_cells(function: FileFunction, cells: Sequence[Cell]) -> None:
    """Raise unless the function can be called with the parameters of every cell.

    Raises:
        FunctionError: naming the function, its parameters, and what does not fit.
    """
    try:
        signature = inspect.signature(function.function())
    except ValueError:  # written in C
        return
    for cell in cells:
        try:
            signature.bind(**cell)
        except TypeError as error:
            raise FunctionError(
                f"{function.study}{signature} cannot be called with the cell {dict(cell)}: {error}. Cells are given as "
                "keyword arguments."
            ) from None
