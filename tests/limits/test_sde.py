"""The SDE limits: laws, joint laws, strong errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import abyssal.limits
from abyssal.limits.law import Empirical, Normal, kolmogorov_smirnov, moments
from abyssal.limits.networks import normal_image, norms, propagate, uniform_directions
from abyssal.limits.sde_limit import arc_cosine_kernel
from abyssal.limits.strong import _res1, _res3, strong_errors

# A claim of equal laws is tested at this level: a fixed seed either passes for good or shows a fault.
LEVEL = 1e-3


def slow_network(network, start, depth, beta=0.5, generator=None):
    """Every matrix drawn, one network at a time. [networks, inputs, width]"""
    out = []
    width = start.shape[-1]
    for h in start:
        for _ in range(depth):
            inner = torch.randn(width, width, generator=generator) / math.sqrt(width)
            outer = torch.randn(width, width, generator=generator) / math.sqrt(width)
            hidden = h @ inner.T if network == "res3" else h
            h = h + depth**-beta * hidden.relu() @ outer.T
        out.append(h)
    return torch.stack(out)


def same_law(x, y):
    return not kolmogorov_smirnov(np.asarray(x), Empirical(np.asarray(y)), LEVEL).rejects


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.25, 0.5])
def test_norms_drawn_with_five_numbers_per_layer_have_the_networks_law(beta):
    width, depth, count = 5, 6, 4000
    start = uniform_directions(count, width, torch.Generator().manual_seed(0)).unsqueeze(1)
    end = slow_network("res3", start, depth, beta, torch.Generator().manual_seed(1))
    size, moved = norms(depth, width, count, beta=beta, rng=np.random.default_rng(2))
    assert same_law(size, end.square().sum((1, 2)))
    assert same_law(moved, (end - start).square().sum((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["res1", "res3"])
def test_states_drawn_without_matrices_have_the_joint_law_of_several_inputs(network):
    width, depth, count = 5, 6, 4000
    pair = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    start = pair.expand(count, -1, -1)
    slow = slow_network(network, start, depth, generator=torch.Generator().manual_seed(1))
    fast = propagate(network, start, depth, generator=torch.Generator().manual_seed(2))
    for figure in (
        lambda h: (h[:, 0] * h[:, 1]).sum(-1),
        lambda h: h[:, 0].square().sum(-1),
        lambda h: h[:, 0, 0] * h[:, 1, 1],
        lambda h: (h[:, 0] - h[:, 1]).norm(dim=-1),
    ):
        assert same_law(figure(fast), figure(slow))


def test_dependent_inputs_have_dependent_images():
    x = torch.randn(7, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image = normal_image(torch.cat([x, -3 * x, 0 * x], dim=1), torch.Generator().manual_seed(1))
    # The root of a Gram matrix is good to the root of float64's resolution.
    assert torch.allclose(image[:, 1], -3 * image[:, 0], atol=1e-6)
    assert image[:, 2].abs().max() < 1e-6


@pytest.mark.slow
def test_log_ratio_at_great_depth_is_the_normal_law_of_the_sde():
    found = abyssal.limits.sde("res3", 40).compare([10, 100, 1000], strong_depths=())
    first, last = found.laws[0], found.laws[-1]
    assert first.ks.rejects and not last.ks.rejects
    assert abs(last.moments.mean - 0.475) < 4 * last.moments.mean_error + 1.3e-4  # first order in 1/L
    assert abs(last.moments.variance - 0.05) < 4 * last.moments.variance_error
    assert first.wasserstein.distance > 4 * first.wasserstein.noise
    assert last.wasserstein.distance < 4 * last.wasserstein.noise
    assert str(found).count("laws differ") == 1 and "(exact)" in str(found)


@pytest.mark.slow
def test_mean_at_finite_depth_follows_its_expansion():
    limit = abyssal.limits.sde("res3", 40)
    m = moments(np.log(norms(40, 40, 400_000, rng=np.random.default_rng(0))[0]))
    assert abs(m.mean - limit.law_at_depth(40)[0]) < 4 * m.mean_error
    assert abs(m.mean - limit.law().mean) > 6 * m.mean_error


@pytest.mark.slow
def test_variance_at_finite_depth_follows_its_expansion():
    limit = abyssal.limits.sde("res3", 4)
    m = moments(np.log(norms(30, 4, 800_000, rng=np.random.default_rng(0))[0]))
    assert abs(m.variance - limit.law_at_depth(30)[1]) < 4 * m.variance_error
    assert abs(m.variance - limit.law().variance) > 6 * m.variance_error


def test_exact_means_of_res3():
    for depth in (10, 100):
        size, moved = (moments(x) for x in norms(depth, 40, 20_000, rng=np.random.default_rng(depth)))
        exact = (1 + 0.5 / depth) ** depth
        assert abs(size.mean - exact) < 4 * size.mean_error
        assert abs(moved.mean - (exact - 1)) < 4 * moved.mean_error


@pytest.mark.parametrize("width", [3, 20])
def test_euler_maruyama_reaches_the_exact_law_of_res3(width):
    limit = abyssal.limits.sde("res3", width)
    ends = limit.sample(4000, steps=200).double()
    assert ends.shape == (4000, width)
    assert not kolmogorov_smirnov(ends.square().sum(-1).log().numpy(), limit.law(), LEVEL).rejects
    assert not kolmogorov_smirnov(limit.log_ratios(4000, seed=1), limit.law(), LEVEL).rejects


@pytest.mark.slow
@pytest.mark.parametrize("network", ["res1", "res3"])
def test_two_inputs_through_one_sde_are_correlated_as_in_the_network(network):
    pair = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.6, 0.8, 0.0, 0.0]])
    ends = abyssal.limits.sde(network, 4).sample(4000, start=pair, steps=100)
    assert ends.shape == (4000, 2, 4)
    network_ends = propagate(network, pair.expand(4000, -1, -1), 400, generator=torch.Generator().manual_seed(9))
    inner, other = ((h[:, 0] * h[:, 1]).sum(-1) for h in (ends, network_ends))
    assert same_law(inner, other)
    independent = (ends[:, 0] * ends[:, 1].roll(1, 0)).sum(-1)
    assert not same_law(independent, other)


def test_arc_cosine_kernel_is_the_expectation_it_stands_for():
    h = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h[2] = 2 * h[0]
    draws = (torch.randn(400_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) @ h.T).relu()
    products = draws.unsqueeze(2) * draws.unsqueeze(1)
    error = products.std(dim=0) / math.sqrt(len(draws))
    assert ((products.mean(dim=0) - arc_cosine_kernel(h)).abs() < 4 * error).all()
    assert arc_cosine_kernel(torch.zeros(2, 6)).abs().max() == 0


def test_uniform_weights_have_the_same_limit():
    limit = abyssal.limits.sde("res3", 8)
    found = limit.compare([200], count=1500, distribution="uniform")
    assert not found.laws[0].ks.rejects and not found.strong
    assert "uniform weights" in str(found)


@pytest.mark.slow
def test_strong_error_of_res1_falls_with_the_root_of_depth():
    (found,) = strong_errors("res1", 40, (16, 64, 256))
    assert abs(found.slope.value + 0.5) < 0.05 and found.slope.low < -0.5 < found.slope.high
    # SCIENCE.md, part 2. Its figures have an error of their own, taken to be as large as ours.
    for error, standard, reference in zip(found.errors, found.standard_errors, (0.116, 0.059, 0.030), strict=True):
        assert abs(error - reference) < 4 * math.sqrt(2) * standard


@pytest.mark.slow
def test_strong_error_of_res3_falls_with_the_root_of_depth_on_the_networks_own_clock():
    # Below a depth of about 50 the distance falls a little faster still.
    at_one, on_clock = strong_errors("res3", 40, (64, 256, 1024), paths=100)
    assert abs(on_clock.slope.value + 0.5) < 0.05
    standard = (at_one.slope.high - at_one.slope.low) / (2 * 1.96)
    assert abs(at_one.slope.value + 0.25) < 4 * standard
    assert at_one.slope.low > on_clock.slope.high


def test_res1_with_the_sdes_own_steps_is_the_sde():
    squares = _res1(6, (8, 16), 5, 1, torch.Generator().manual_seed(0))
    assert squares[0, :, 1].max() == 0 and squares[0, :, 0].min() > 0


def test_both_sides_of_the_coupling_of_res3_have_the_laws_they_should():
    width, depth, paths = 4, 5, 4000
    network, at_one, _ = _res3(width, depth, paths, 12, torch.Generator().manual_seed(0))
    size, _ = norms(depth, width, paths, rng=np.random.default_rng(1))
    assert same_law(network.square().sum(-1), size)
    law = Normal(0.5 - 1 / width, 2 / width)
    assert not kolmogorov_smirnov(at_one.square().sum(-1).log().numpy(), law, LEVEL).rejects


def test_comparison_is_shown_and_plotted(tmp_path):
    found = abyssal.limits.sde("res1", 6).compare([5, 20], count=300, strong_depths=(4, 8), paths=4)
    text = str(found)
    assert "300 simulated paths" in text and "power of the depth" in text and "time 1" in text
    assert found.plot(tmp_path / "law.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"there is no folder .*missing\. Make it"):
        found.plot(tmp_path / "missing" / "law.png")
    with pytest.raises(ValueError, match="has to end in one of"):
        found.plot(tmp_path / "law.txt")


def test_a_seed_gives_the_same_figures_again():
    a, b = (abyssal.limits.sde("res1", 6).compare([5], count=50, strong_depths=(4, 8), paths=3) for _ in range(2))
    assert np.array_equal(a.laws[0].sample, b.laws[0].sample)
    assert a.strong[0].errors == b.strong[0].errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: abyssal.limits.sde("res2"), ValueError, "one of res1, res3, got 'res2'"),
        (lambda: abyssal.limits.sde("res3", 1), ValueError, "width has to be a whole number of at least 2, got 1"),
        (lambda: abyssal.limits.sde("res3", 40.5), TypeError, "width has to be a whole number of at least 2, got 40.5"),
        (
            lambda: abyssal.limits.sde("res3").compare([10, 0]),
            ValueError,
            "depth has to be a whole number of at least 1, got 0",
        ),
        (lambda: abyssal.limits.sde("res3").compare([]), ValueError, "at least one depth"),
        (
            lambda: abyssal.limits.sde("res3").compare([5], count=1),
            ValueError,
            "count has to be a whole number of at least 2",
        ),
        (lambda: abyssal.limits.sde("res3").compare([5], distribution="cauchy"), ValueError, "normal, uniform"),
        (lambda: abyssal.limits.sde("res3").compare([5], level=0), ValueError, "level"),
        (lambda: abyssal.limits.sde("res3").compare([5], strong_depths=(4,)), ValueError, "two different depths"),
        (lambda: abyssal.limits.sde("res3").sample(3, start=torch.ones(7)), ValueError, "width 40, got"),
        (lambda: abyssal.limits.sde("res3", 2).sample(3, start=torch.tensor([1, math.nan])), ValueError, "finite"),
        (
            lambda: abyssal.limits.sde("res3").sample(3, steps=0),
            ValueError,
            "steps has to be a whole number of at least 1",
        ),
        (lambda: abyssal.limits.sde("res1").law_at_depth(3), ValueError, "res3 only"),
    ],
)
def test_bad_input_is_refused_before_any_work(call, error, message):
    with pytest.raises(error, match=message):
        call()
