"""Powers with intervals, and verdicts that can be withheld."""

from __future__ import annotations

import math

import numpy as np
import pytest

from abyssal.papers.shared.powers import by_size, power
from abyssal.util.stats import Slope

SIZES = (8, 16, 32, 64)


def test_a_power_is_found_whatever_each_seeds_constant():
    values = np.array([[c * n**-1.5 for c in (1.0, 40.0, 1e-3)] for n in SIZES])
    slope = power(SIZES, values)
    assert slope.value == pytest.approx(-1.5, abs=1e-12)
    assert slope.high - slope.low < 1e-10


def test_the_interval_covers_the_power_as_often_as_it_promises():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        noise = random.standard_normal((4, 3)) * 0.2 + random.standard_normal((1, 3))
        slope = power(SIZES, np.exp(noise) * np.array(SIZES)[:, None] ** -1.0)
        hits += slope.low <= -1 <= slope.high
    assert abs(hits / 400 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 400)


def test_a_seed_with_a_value_of_zero_or_infinity_is_left_out():
    values = np.array([[n**-1.0, 0.0 if n == 8 else 1.0, math.inf if n == 64 else 1.0] for n in SIZES])
    assert power(SIZES, values).value == pytest.approx(-1)
    assert math.isnan(power(SIZES, values[:, 1:]).value)


@pytest.mark.parametrize(
    ("slope", "is_below", "is_above", "is_within"),
    [
        (Slope(-1, -1.05, -0.95), True, False, True),
        (Slope(-1, -1.5, -0.5), True, False, None),
        (Slope(0, -0.01, 0.2), None, None, False),
        (Slope(0.5, 0.4, 0.6), False, True, False),
        (Slope(math.nan, math.nan, math.nan), None, None, None),
    ],
)
def test_verdicts_are_withheld_where_the_interval_does_not_decide(slope, is_below, is_above, is_within):
    assert slope.below(0.1) is is_below
    assert slope.above(0.1) is is_above
    assert slope.between(-1.2, -0.8) is is_within


def test_rows_are_sorted_by_size_and_seed_and_a_missing_one_is_refused():
    rows = [{"n": n, "seed": seed, "y": n + seed / 10, "kind": "a"} for n in (4, 2) for seed in (1, 0)]
    sizes, values = by_size(rows, "n", "y", kind="a")
    assert sizes == [2, 4]
    assert values.tolist() == [[2.0, 2.1], [4.0, 4.1]]
    with pytest.raises(ValueError, match="not every seed"):
        by_size(rows[:-1], "n", "y")
    assert by_size(rows, "n", "y", kind="b")[0] == []
