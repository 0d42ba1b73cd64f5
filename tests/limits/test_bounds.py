"""Bounds with a stated probability: their moments, how often they fail, how loose they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import abyssal.limits
from abyssal.limits.bounds import check_bounds, gradient_ratios, hidden_bound, hidden_moments, norm_interval
from abyssal.limits.law import moments
from abyssal.limits.networks import norms, propagate, uniform_directions


@pytest.mark.parametrize(("depth", "width", "beta"), [(20, 6, 0.5), (3, 40, 0.3), (100, 10, 0.75)])
def test_moments_are_those_of_simulated_networks(depth, width, beta):
    exact = hidden_moments(depth, width, beta)
    size, moved = norms(depth, width, 300_000 // depth, beta=beta, rng=np.random.default_rng(depth))
    pairs = {
        "norm": size,
        "norm_square": size**2,
        "moved": moved,
        "moved_square": moved**2,
        "product": size * moved,
    }
    for name, draws in pairs.items():
        m = moments(draws)
        assert abs(m.mean - getattr(exact, name)) < 4 * m.mean_error, name


def test_second_moments_tend_to_those_of_the_sdes_lognormal_law():
    d = 40
    found = hidden_moments(100_000, d)
    mean, variance = 0.5 - 1 / d, 2 / d
    assert found.norm == pytest.approx(math.exp(mean + variance / 2), rel=1e-5) == pytest.approx(math.sqrt(math.e))
    assert found.norm_square == pytest.approx(math.exp(2 * mean + 2 * variance), rel=1e-4)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_mean_squares_hold_for_any_symmetric_weights_and_for_gradients_too(distribution):
    depth, width, count = 12, 5, 6000
    exact = (1 + 0.5 / depth) ** depth - 1
    start = uniform_directions(count, width, torch.Generator().manual_seed(0)).unsqueeze(1)
    end = propagate("res3", start, depth, distribution=distribution, generator=torch.Generator().manual_seed(1))
    for squares in (
        (end - start).square().sum((1, 2)).numpy(),
        gradient_ratios("res3", depth, width, count, distribution=distribution) ** 2,
    ):
        m = moments(squares)
        assert abs(m.mean - exact) < 4 * m.mean_error


@pytest.mark.parametrize("network", ["res1", "res3"])
def test_gradients_are_those_of_autograd(network):
    depth, width, count, beta = 6, 4, 3, 0.4
    ratios = gradient_ratios(network, depth, width, count, beta=beta, seed=5)
    g = torch.Generator().manual_seed(5)
    start = uniform_directions(count, width, g).unsqueeze(-1).requires_grad_()
    h = start
    for _ in range(depth):
        shape = (count, width, width)
        inner = torch.empty(shape).normal_(0, width**-0.5, generator=g) if network == "res3" else torch.eye(width)
        outer = torch.empty(shape).normal_(0, width**-0.5, generator=g)
        h = h + depth**-beta * (outer @ (inner @ h).relu())
    last = uniform_directions(count, width, g).unsqueeze(-1)
    (first,) = torch.autograd.grad((h * last).sum(), start)
    assert ratios == pytest.approx((first - last).flatten(1).norm(dim=-1).numpy(), rel=1e-5)


@pytest.mark.parametrize("network", ["res1", "res3"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("delta", [0.05, 0.3])
def test_no_bound_fails_more_often_than_it_promises(network, distribution, delta):
    options = {"depth": 30, "width": 6, "count": 4000, "gradients": 2000}
    found = check_bounds(network, delta=delta, distribution=distribution, **options)
    bounds = [v for v in found if "SDE" not in v.what]
    assert len(bounds) == (4 if (network, distribution) == ("res3", "normal") else 2)
    for v in bounds:
        assert v.interval[0] <= v.frequency <= v.interval[1] < delta
        assert v.looseness > 1


def test_the_sdes_interval_fails_as_often_as_it_says_and_is_no_bound():
    found = check_bounds("res3", 400, 20, delta=0.1, count=10_000, gradients=0)
    sde = found[-1]
    assert "SDE" in sde.what and sde.interval[0] < 0.1 < sde.interval[1]
    assert sde.looseness == pytest.approx(1, abs=0.02)
    assert "promised to fail with at most 0.1" in str(sde)


def test_cantelli_is_sharper_than_markov_at_small_levels_and_needs_what_it_needs():
    markov = hidden_bound("res3", 100, delta=0.01)
    assert hidden_bound("res3", 100, delta=0.01, method="cantelli", width=40) < markov / 2
    assert markov == pytest.approx(math.sqrt(((1 + 0.005) ** 100 - 1) / 0.01))
    assert abyssal.limits.gradient_bound("res3", 100, delta=0.01) == markov
    assert hidden_bound("res1", 100) > hidden_bound("res3", 100)
    with pytest.raises(ValueError, match="needs res3 and a width"):
        hidden_bound("res1", 100, method="cantelli", width=40)


@pytest.mark.parametrize("network", ["res1", "res3"])
def test_bounds_show_the_regimes(network):
    # Identity above beta = 1/2, a limit at it, an explosion below: L^(1 - 2 beta) in the exponent.
    depths = (100, 10_000)
    frozen, limit, exploded = ([hidden_bound(network, n, beta=b) for n in depths] for b in (1.0, 0.5, 0.25))
    assert frozen[1] == pytest.approx(frozen[0] / 10, rel=0.01)
    assert limit[1] == pytest.approx(limit[0], rel=0.01)
    assert exploded[1] > 1e6 * exploded[0]


def test_norm_interval_closes_around_the_mean_as_width_grows():
    narrow, wide = (norm_interval(100, d) for d in (40, 4000))
    assert narrow[0] < wide[0] < (1 + 0.005) ** 50 < wide[1] < narrow[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hidden_bound("res2", 10), ValueError, "got 'res2'"),
        (lambda: hidden_bound("res3", 0), ValueError, "depth has to be a whole number of at least 1"),
        (lambda: hidden_bound("res3", 10, delta=0.0), ValueError, "strictly between 0 and 1"),
        (lambda: hidden_bound("res3", 10, beta=math.nan), ValueError, "beta has to be a finite number, got nan"),
        (lambda: hidden_bound("res3", 10, method="chernoff"), ValueError, "markov, cantelli"),
        (lambda: norm_interval(10, 2.5), TypeError, "width has to be a whole number"),
        (lambda: norm_interval(10, 4, delta=1.0), ValueError, "delta"),
        (lambda: check_bounds(width=1), ValueError, "width has to be a whole number of at least 2"),
        (lambda: check_bounds(count=10), ValueError, "count has to be a whole number of at least 100"),
        (lambda: check_bounds(distribution="laplace"), ValueError, "normal, uniform"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
