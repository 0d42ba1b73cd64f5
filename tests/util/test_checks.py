"""Checks of arguments say which argument, what it has to be, and what it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from abyssal.util.checks import ascending, between, instance, number, one_of, positive, share, whole


@pytest.mark.parametrize(
    ("check", "given", "words"),
    [
        (whole, 0, "n has to be a whole number of at least 1, got 0."),
        (number, math.nan, "n has to be a finite number, got nan."),
        (number, -math.inf, "n has to be a finite number, got -inf."),
        (lambda name, value: number(name, value, 0), -1, "n has to be a finite number of at least 0, got -1."),
        (positive, 0, "n has to be a positive number, got 0."),
        (positive, math.inf, "n has to be a positive number, got inf."),
        (lambda name, value: between(name, value, 0.5, 1), 2, "n has to be a number from 0.5 to 1, got 2."),
        (share, 1.0, "n has to be a number strictly between 0 and 1, got 1.0."),
        (lambda name, value: one_of(name, value, ("a", "b")), "c", "n has to be one of a, b, got 'c'."),
        (ascending, [1, 1], "n have to be increasing, at least 1 of them; got [1, 1]."),
        (ascending, [], "n have to be increasing, at least 1 of them; got []."),
        (ascending, [1.0, math.nan], "n have to be increasing, at least 1 of them; got [1.0, nan]."),
    ],
)
def test_a_bad_value_is_refused_in_these_words(check: Callable[[str, Any], Any], given: Any, words: str) -> None:
    with pytest.raises(ValueError, match="n ha") as caught:
        check("n", given)
    assert str(caught.value) == words
    assert not isinstance(caught.value, TypeError)


@pytest.mark.parametrize("kind", [TypeError, ValueError])
@pytest.mark.parametrize(
    ("check", "given"), [(whole, 2.0), (whole, True), (number, "1"), (positive, None), (share, 1j)]
)
def test_a_wrong_kind_is_both_errors(kind: type[Exception], check: Callable[[str, Any], Any], given: Any) -> None:
    with pytest.raises(kind, match="n has to be"):
        check("n", given)


@pytest.mark.parametrize(
    ("check", "given"),
    [(whole, np.int64(3)), (number, 2), (number, np.float32(0.5)), (positive, 1e-300), (share, 0.5), (ascending, (1,))],
)
def test_a_good_value_comes_back(check: Callable[[str, Any], Any], given: Any) -> None:
    assert check("n", given) == given


def test_a_thing_of_another_class_is_shown_when_it_is_short() -> None:
    assert instance("n", 3, int, "a number") == 3
    with pytest.raises(TypeError, match=r"n has to be a list, such as \[1\], got 'one'\."):
        instance("n", "one", list, "a list, such as [1]")
    with pytest.raises(TypeError, match="got a tuple"):
        instance("n", tuple(range(100)), list, "a list")
