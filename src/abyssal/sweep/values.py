"""What a cell may return, brought into the form that the store gives back.

A fresh result and one out of the store have to be equal, whatever the function returned, or a sweep that was killed
would end with other types than one that was not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["plain"]

_MOST_BITS = 10_000  # Python writes no more than 4300 digits


def plain(values: Any) -> dict[str, Any]:
    """Return a cell's results with Python's own numbers and numpy arrays.

    Args:
        values: results by name: texts, numbers (numpy's and torch's too), truth values, None, lists and mappings of
            them, and at the top numpy arrays and torch tensors of any number of dimensions; tensors without
            dimensions become numbers.

    Raises:
        TypeError: naming what cannot be kept.
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            f"A cell has to return its results by name, as a dict; got {_called(values)}. "
            'Return for example {"loss": loss}.'
        )
    found = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise TypeError(f"Results have to be named by texts; got the name {name!r}.")
        value = _without_torch(value, name)
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            raise TypeError(f"{name}: an array of Python objects cannot be kept; give numbers or texts.")
        # A copy: the function may use the same memory for its next cell.
        found[name] = value.copy() if isinstance(value, np.ndarray) else _simple(value, name)
    return found


def _without_torch(value: Any, where: str) -> Any:
    """Return a tensor as numpy's array, or as a number where it has no dimensions; anything else as it is."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    if value.ndim == 0:
        return value.item()
    if value.dtype == torch.bfloat16:
        raise TypeError(f"{where}: numpy has no bfloat16; return the tensor as float32, which holds it exactly.")
    return value.detach().cpu().numpy()


def _simple(value: Any, where: str) -> Any:
    value = _without_torch(value, where)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise TypeError(f"{where}: a whole number of {value.bit_length():,} bits cannot be kept. Return its logarithm.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_simple(part, f"{where}[{i}]") for i, part in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError(f"{where}: names have to be texts, got {list(value)!r}.")
        return {name: _simple(part, f"{where}[{name!r}]") for name, part in value.items()}
    raise TypeError(
        f"{where}: {_called(value)} cannot be kept. Return numbers, texts, lists and dicts of them, and arrays or "
        "tensors as values of their own."
    )


def _called(value: Any) -> str:
    return f"a {type(value).__name__}"
