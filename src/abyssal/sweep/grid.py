"""Cells from a text file, so that a sweep needs no code.

[fixed]                                 # in every cell
epochs = 5

[grid]                                  # every combination
beta = [0.25, 0.5, 1.0]
lr = { logspace = [1e-4, 1.0, 5] }      # 5 values from 1e-4 to 1, evenly spaced as logarithms
hurst = { linspace = [0.1, 0.9, 9] }    # 9 values from 0.1 to 0.9, evenly spaced
seed = { range = 3 }                    # 0, 1, 2

[[cells]]                               # and these besides
beta = 0.5
lr = 0.3
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abyssal.sweep.store import canonical

__all__ = ["Grid", "GridError", "grid_of", "read_grid"]

_PARTS = ("fixed", "grid", "cells")
_HELPERS = ("linspace", "logspace", "range")


class GridError(ValueError):
    """A grid that does not say what the cells are."""


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep.

    Attributes:
        cells: the parameters of each, no two alike; the first axis varies slowest, explicit cells come last.
        axes: values by parameter, of what is crossed.
        fixed: parameters that all cells share.
    """

    cells: tuple[dict[str, Any], ...]
    axes: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any]


def read_grid(path: str | Path) -> Grid:
    """Read a grid from a TOML file.

    Args:
        path: of a file with `[grid]` (lists to be crossed), `[[cells]]` (explicit cells), or both, and `[fixed]`
            (values in every cell, which an explicit one may replace).

    Raises:
        GridError: naming the file and the entry that makes no sense.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GridError(f"{path}: is no TOML ({error}).") from error
    try:
        return grid_of(data)
    except GridError as error:
        raise GridError(f"{path}: {error}") from None


def grid_of(data: Mapping[str, Any]) -> Grid:
    """Return the grid that a mapping with `grid`, `cells` and `fixed` describes, as in the file.

    Raises:
        GridError: naming the entry that makes no sense.
    """
    if unknown := [name for name in data if name not in _PARTS]:
        raise GridError(f"{', '.join(unknown)} is unknown here; a grid has [grid], [[cells]] and [fixed].")
    fixed, crossed = (_mapping(data, name) for name in ("fixed", "grid"))
    explicit = data.get("cells", [])
    if not isinstance(explicit, list) or not all(isinstance(cell, Mapping) for cell in explicit):
        raise GridError("cells has to be a list of cells: write [[cells]], with two brackets.")
    if not crossed and not explicit:
        raise GridError("there are no cells; write [grid] with a list for each parameter, or [[cells]].")
    if both := sorted(set(fixed) & set(crossed)):
        raise GridError(f"{', '.join(both)} is in [fixed] and in [grid].")
    axes = {name: _values(name, value) for name, value in crossed.items()}
    combinations = itertools.product(*axes.values()) if axes else ()
    found = [{**fixed, **dict(zip(axes, values, strict=True))} for values in combinations]
    found += [{**fixed, **cell} for cell in explicit]
    distinct: dict[str, dict[str, Any]] = {}
    for cell in found:
        try:
            distinct.setdefault(canonical(cell), cell)
        except (TypeError, ValueError) as error:  # a date, or a number that is not finite
            raise GridError(str(error).removeprefix("parameters")) from None
    return Grid(tuple(distinct.values()), axes, fixed)


def _mapping(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name, {})
    if not isinstance(value, Mapping):
        raise GridError(f"{name} has to be a table: write [{name}].")
    return dict(value)


def _values(name: str, value: Any) -> tuple[Any, ...]:
    """Return the values of one axis."""
    if isinstance(value, list):
        if not value:
            raise GridError(f"[grid] {name} is empty; an empty list crossed with others leaves no cell.")
        return tuple(value)
    if isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in _HELPERS:
        helper, arguments = next(iter(value.items()))
        return _range(name, arguments) if helper == "range" else _spaced(name, helper, arguments)
    raise GridError(
        f"[grid] {name} = {value!r}: expected a list of values, {{ linspace = [first, last, count] }}, "
        "{ logspace = [first, last, count] } or { range = count }; what all cells share goes under [fixed]."
    )


def _spaced(name: str, helper: str, arguments: Any) -> tuple[float, ...]:
    good = (
        isinstance(arguments, list)
        and len(arguments) == 3
        and all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in arguments)
        and isinstance(arguments[2], int)
        and arguments[2] >= 2
    )
    if not good:
        raise GridError(
            f"[grid] {name}: {helper} = {arguments!r}; expected [first, last, count], the count a whole number from 2."
        )
    first, last, count = arguments
    if helper == "logspace" and (first <= 0 or last <= 0):
        raise GridError(
            f"[grid] {name}: logspace = {arguments!r}; its ends are the values themselves, not exponents, and have to "
            "be positive."
        )
    spaced = np.linspace if helper == "linspace" else np.geomspace
    return tuple(float(f"{value:.12g}") for value in spaced(first, last, count))  # 0.3, not 0.30000000000000004


def _range(name: str, arguments: Any) -> tuple[int, ...]:
    bounds = arguments if isinstance(arguments, list) else [0, arguments]
    whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds)
    if len(bounds) != 2 or not whole or bounds[0] >= bounds[1]:
        raise GridError(f"[grid] {name}: range = {arguments!r}; expected a count, or [first, end], as Python's range.")
    return tuple(range(*bounds))
