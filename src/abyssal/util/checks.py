"""Checks of arguments: each returns what it was given, or raises with the name, what was expected, and what was given.

A thing of a wrong kind raises :class:`WrongKindError`, one that is out of range or not among the choices a ValueError.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterable
from itertools import pairwise
from typing import Any, TypeVar

__all__ = ["WrongKindError", "ascending", "between", "instance", "number", "one_of", "positive", "share", "whole"]

T = TypeVar("T")


class WrongKindError(TypeError, ValueError):
    """An argument is of a kind that it cannot have: to be caught as a TypeError, or with all bad values."""


def instance(name: str, value: T, kind: type[Any], expected: str) -> T:
    """Return a value of a class, or raise saying what was expected, such as `"a torch.nn.Module"`."""
    if not isinstance(value, kind):
        # A model prints as hundreds of lines.
        text = repr(value)
        given = text if len(text) <= 40 and not text.startswith("<") else f"a {type(value).__name__}"
        raise WrongKindError(f"{name} has to be {expected}, got {given}.")
    return value


def whole(name: str, value: Any, least: int = 1, expected: str = "a whole number") -> int:
    """Return a whole number of at least `least`; True and 2.0 are none."""
    return int(_checked(name, value, numbers.Integral, f"{expected} of at least {least}", lambda n: n >= least))


def number(name: str, value: Any, least: float = -math.inf) -> float:
    """Return a finite number of at least `least`."""
    expected = "a finite number" + (f" of at least {least:g}" if math.isfinite(least) else "")
    return float(_checked(name, value, numbers.Real, expected, lambda x: least <= x < math.inf and x > -math.inf))


def positive(name: str, value: Any) -> float:
    """Return a finite number above 0."""
    return float(_checked(name, value, numbers.Real, "a positive number", lambda x: 0 < x < math.inf))


def between(name: str, value: Any, low: float, high: float) -> float:
    """Return a number from `low` to `high`."""
    expected = f"a number from {low:g} to {high:g}"
    return float(_checked(name, value, numbers.Real, expected, lambda x: low <= x <= high))


def share(name: str, value: Any) -> float:
    """Return a number strictly between 0 and 1, such as a probability."""
    expected = "a number strictly between 0 and 1"
    return float(_checked(name, value, numbers.Real, expected, lambda x: 0 < x < 1))


def one_of(name: str, value: T, choices: Collection[Any]) -> T:
    """Return one of some choices."""
    if value not in choices:
        raise ValueError(f"{name} has to be one of {', '.join(map(str, choices))}, got {value!r}.")
    return value


def ascending(name: str, values: Iterable[T], least: int = 1) -> tuple[T, ...]:
    """Return values that increase, `least` of them or more."""
    given = tuple(values)
    if len(given) < least or any(not before < after for before, after in pairwise(given)):  # type: ignore[operator]
        raise ValueError(f"{name} have to be increasing, at least {least} of them; got {list(given)!r}.")
    return given


def _checked(name: str, value: Any, kind: type, expected: str, fits: Callable[[Any], bool]) -> Any:
    right = isinstance(value, kind) and not isinstance(value, bool)
    if not right or not fits(value):
        raise (ValueError if right else WrongKindError)(f"{name} has to be {expected}, got {value!r}.")
    return value
