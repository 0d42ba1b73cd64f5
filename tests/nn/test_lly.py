"""The networks of the neural tangent hierarchy compute the papers' formulas, at the papers' scale."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import abyssal.models.find
from abyssal.nn import FullyConnectedNTK, LiLuoYipResNet
from abyssal.nn.lly import second_moment_scale


def samples(n: int, d: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=20, deadline=None)
@given(depth=st.integers(1, 6), width=st.integers(1, 9), d=st.integers(1, 5), c_res=st.floats(-2, 2))
def test_the_residual_network_is_the_formula_written_out(depth, width, d, c_res):
    model = LiLuoYipResNet(d, width, depth, c_res).double()
    weights = [p.detach() for p in model.parameters()]
    assert [tuple(w.shape) for w in weights] == [(width, d), *[(width, width)] * (depth - 1), (1, width)]
    x = samples(3, d)
    for i, sample in enumerate(x):
        h = math.sqrt(model.c_s / width) * torch.tanh(weights[0] @ sample)
        for w in weights[1:-1]:
            h = h + c_res / depth * math.sqrt(model.c_s / width) * torch.tanh(w @ h)
        torch.testing.assert_close(model(x)[i], weights[-1][0] @ h)


@settings(max_examples=20, deadline=None)
@given(depth=st.integers(1, 6), width=st.integers(1, 9), d=st.integers(1, 5))
def test_the_fully_connected_network_is_the_formula_written_out(depth, width, d):
    model = FullyConnectedNTK(d, width, depth, c_s=1.0).double()
    weights = [p.detach() for p in model.parameters()]
    x = samples(3, d)
    for i, sample in enumerate(x):
        h = sample
        for w in weights[:-1]:
            h = torch.tanh(w @ h) / math.sqrt(width)
        torch.testing.assert_close(model(x)[i], weights[-1][0] @ h)


@pytest.mark.parametrize(
    ("activation", "moment"),
    [
        ("relu", 0.5),
        ("erf", 2 / math.pi * math.asin(2 / 3)),  # Williams 1998: E erf(z)^2 = 2/pi asin(2 v / (1 + 2 v)), v = 1
        ("sin", (1 - math.exp(-2)) / 2),
        (torch.abs, 1.0),
        (lambda z: z**3, 15.0),
    ],
)
def test_the_scale_is_one_over_the_exact_second_moment(activation, moment):
    assert second_moment_scale(activation) == pytest.approx(1 / moment, rel=1e-13)


def test_the_scale_of_tanh_agrees_with_thirty_digit_quadrature():
    import mpmath

    with mpmath.workdps(30):
        moment = mpmath.quad(lambda z: mpmath.tanh(z) ** 2 * mpmath.npdf(z), [-mpmath.inf, 0, mpmath.inf])
    assert second_moment_scale("tanh") == pytest.approx(float(1 / moment), rel=1e-13)


@pytest.mark.parametrize("build", [LiLuoYipResNet, FullyConnectedNTK])
def test_samples_of_norm_one_have_first_states_of_norm_one_at_large_width(build):
    """|x^1|^2 is a mean of m independent terms c_s tanh^2 of mean 1 and variance v < c_s - 1."""
    width = 4000
    model = build(10, width, 2, generator=generator()).double()
    squares = model.first(samples(16, 10)).square().sum(-1)
    assert (squares - 1).abs().max() < 5 * math.sqrt((model.c_s - 1) / width)


@pytest.mark.parametrize("build", [LiLuoYipResNet, FullyConnectedNTK])
def test_weights_are_standard_normal_come_from_the_generator_and_are_all_trained(build):
    state = torch.random.get_rng_state()
    model, twin = (build(7, 100, 4, generator=generator(3)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    entries = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert abs(entries.mean()) < 5 / math.sqrt(len(entries))
    assert abs(entries.var() - 1) < 5 * math.sqrt(2 / len(entries))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("build", [LiLuoYipResNet, FullyConnectedNTK])
def test_outputs_are_one_number_for_each_sample_and_one_sample_needs_no_batch(build):
    model = build(5, 6, 3).double()
    x = samples(4, 5)
    assert model(x).shape == (4,)
    assert model(x[0]).shape == ()
    torch.testing.assert_close(torch.vmap(model)(x), model(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_equal(copied):
    model = LiLuoYipResNet(5, 6, 3)
    x = samples(4, 5).float()
    assert torch.equal(copied(model)(x), model(x))


def test_the_residual_steps_are_found_as_one_chain():
    chains = abyssal.find_blocks(LiLuoYipResNet(5, 6, 9))
    assert len(chains) == 8


@pytest.mark.parametrize("build", [LiLuoYipResNet, FullyConnectedNTK])
def test_bad_arguments_are_named(build):
    with pytest.raises(TypeError, match=r"width has to be a whole number of at least 1, got 6\.0"):
        build(5, 6.0, 3)
    with pytest.raises(ValueError, match="depth has to be a whole number of at least 1, got 0"):
        build(5, 6, 0)
    with pytest.raises(ValueError, match=r"one of tanh, erf, relu.*got 'softmax'"):
        build(5, 6, 3, activation="softmax")
    with pytest.raises(TypeError, match="elementwise function"):
        build(5, 6, 3, activation=nn.Tanh)
    with pytest.raises(ValueError, match=r"mean square .* has to be positive, got 0"):
        build(5, 6, 3, activation=torch.zeros_like)
    with pytest.raises(ValueError, match=r"c_s has to be a positive"):
        build(5, 6, 3, c_s=-1.0)


def test_a_residual_strength_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"c_res has to be a finite number, got nan"):
        LiLuoYipResNet(5, 6, 3, math.nan)
