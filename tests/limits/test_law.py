"""The statistics by which laws and rates are judged."""

from __future__ import annotations

import math

import numpy as np
import pytest

from abyssal.limits.law import Empirical, Normal, kolmogorov_smirnov, moments, root_mean_square, slope, wasserstein

stats = pytest.importorskip("scipy.stats")


def test_kolmogorov_smirnov_agrees_with_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.1, 1.3, 400), rng.normal(0, 1, 300)
    ours, theirs = kolmogorov_smirnov(x, Normal(0, 1)), stats.ks_1samp(x, stats.norm.cdf)
    assert ours.statistic == pytest.approx(theirs.statistic, abs=1e-12)
    assert ours.p_value == pytest.approx(stats.kstwobign.sf(math.sqrt(400) * theirs.statistic), abs=1e-9)
    ours, theirs = kolmogorov_smirnov(x, Empirical(y)), stats.ks_2samp(x, y)
    assert ours.statistic == pytest.approx(theirs.statistic, abs=1e-12)


def test_kolmogorov_smirnov_counts_the_jumps_of_tied_samples():
    ours = kolmogorov_smirnov([0, 0, 1, 1], Empirical([0, 1, 1, 1]))
    assert ours.statistic == pytest.approx(stats.ks_2samp([0, 0, 1, 1], [0, 1, 1, 1]).statistic) == pytest.approx(0.25)


def test_the_critical_value_is_exceeded_at_its_level_by_equal_laws():
    rng = np.random.default_rng(1)
    repeats, level = 1000, 0.05
    rejected = sum(kolmogorov_smirnov(rng.normal(size=500), Normal(0, 1), level).rejects for _ in range(repeats))
    assert abs(rejected / repeats - level) < 4 * math.sqrt(level * (1 - level) / repeats)


def test_wasserstein_agrees_with_scipy_and_its_noise_is_what_equal_laws_give():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=500), rng.normal(0.3, 2, size=500)
    assert wasserstein(x, Empirical(y)).distance == pytest.approx(stats.wasserstein_distance(x, y), rel=1e-12)
    assert wasserstein(x + 5, Normal(0, 1)).distance == pytest.approx(5 + x.mean(), abs=1e-2)
    found = [wasserstein(rng.normal(size=1000), Normal(0, 1)) for _ in range(300)]
    distances = np.array([w.distance for w in found])
    expected = np.mean([w.noise for w in found])
    assert abs(distances.mean() - expected) < 4 * distances.std() / math.sqrt(300)


def test_standard_errors_of_mean_and_variance_are_what_repeated_samples_show():
    rng = np.random.default_rng(3)
    found = [moments(rng.exponential(size=2000)) for _ in range(400)]
    for value, error in (("mean", "mean_error"), ("variance", "variance_error")):
        spread = np.std([getattr(m, value) for m in found])
        # The standard deviation of 400 numbers is known to 1 part in sqrt(800).
        assert np.mean([getattr(m, error) for m in found]) == pytest.approx(spread, rel=4 / math.sqrt(800))
    assert moments([1.0, 2.0, 3.0]).variance == pytest.approx(1.0)


def test_the_interval_of_a_slope_covers_the_true_power_as_often_as_it_says():
    rng, depths = np.random.default_rng(4), (10, 20, 40, 80)
    covered = 0
    for seed in range(200):
        common = rng.chisquare(5, (60, 1))  # one path is good or bad at all depths
        squares = common * rng.chisquare(5, (60, 4)) / np.array(depths) ** 1.5
        found = slope(depths, squares, resamples=500, seed=seed)
        covered += found.low <= -0.75 <= found.high
    # 95 %, less what the bootstrap with 60 paths is known to lose (a few per cent).
    assert covered / 200 > 0.95 - 0.03 - 4 * math.sqrt(0.05 * 0.95 / 200)
    exact = slope((1, 2, 4), np.array([[1, 1 / 4, 1 / 16]] * 3))
    assert (exact.value, exact.low, exact.high) == pytest.approx((-1, -1, -1))
    assert str(exact).startswith("-1.000 (95% interval")


def test_root_mean_square_has_the_delta_methods_error():
    squares = np.array([[1.0], [3.0], [5.0], [7.0]])
    root, error = root_mean_square(squares)
    assert root == pytest.approx([2.0])
    assert error == pytest.approx([squares.std(ddof=1) / 2 / 4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments([1.0]), "at least two draws, got 1"),
        (lambda: moments([1.0, math.nan]), "1 values that are not"),
        (lambda: kolmogorov_smirnov([1.0, 2.0], Normal(0, 1), 1.0), "strictly between 0 and 1, got 1.0"),
        (lambda: Normal(0, 0), "positive variance"),
        (lambda: slope((4, 4), np.ones((3, 2))), "two different depths"),
        (lambda: slope((4, 8), np.ones((1, 2))), "two paths"),
        (lambda: slope((4, 8), np.zeros((3, 2))), "not zero at any depth"),
    ],
)
def test_bad_samples_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
