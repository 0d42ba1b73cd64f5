"""Kernels of infinitely wide networks, against many-digit arithmetic and finite differences."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
import torch
from torch import Tensor

from abyssal.tangent.analytic import kernels
from abyssal.tangent.analytic.dual import Erf, Relu
from abyssal.tangent.analytic.kernels import fully_connected, residual, resntk
from abyssal.tangent.analytic.quadrature import Quadrature, activation_of

# The twin in mpmath, shared with the benchmark.
_SPEC = importlib.util.spec_from_file_location(
    "analytic_reference", Path(__file__).parents[2] / "benchmarks" / "analytic_reference.py"
)
assert _SPEC is not None and _SPEC.loader is not None
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

TARGET = 1e-10  # the issue's, relative
SETTINGS = [
    ("pre", {"alpha": 0.5, "w_std": 1.4, "b_std": 0.1}),
    ("pre", {"alpha": 1.0, "w_std": 1.3}),
    ("two", {"alpha": 0.3, "w_std": 1.5, "b_std": 0.3}),
    ("two", {"alpha": 1.0}),
    ("lly", {"alpha": 1.0}),
    ("lly", {"alpha": 3.0}),
    ("fc", {"w_std": 1.4, "b_std": 0.1}),
    ("fc", {"w_std": 3.0}),  # chaotic for erf: doubles small distances in each layer
    ("huang-yau", {}),
]


def inputs() -> tuple[Tensor, dict[str, Tensor]]:
    """One input and partners at every kind of place, the hard ones included."""
    generator = torch.Generator().manual_seed(3)
    x, other, nudge = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    partners = {"off-diagonal": other, "diagonal": x, "parallel": 2.7 * x, "antipodal": -x, "antiparallel": -0.6 * x}
    for size in (1e-4, 1e-7, 1e-10):
        partners[f"near by {size:g}"] = x + size * nudge
        partners[f"nearly parallel by {size:g}"] = 1.7 * x + size * nudge
        partners[f"nearly antipodal by {size:g}"] = -x + size * nudge
    return x, partners


def ours(x: Tensor, y: Tensor, depth: int, activation, branch: str, **options) -> tuple[Tensor, Tensor]:
    if branch in ("fc", "huang-yau"):
        form = "dense" if branch == "fc" else branch
        return fully_connected(x, y, depth, activation, form=form, **options)
    return residual(x, y, depth, activation, branch=branch, **options)


def relative(found: Tensor, exact: mp.mpf) -> float:
    if exact == 0:
        return abs(float(found))
    return float(abs(mp.mpf(float(found)) - exact) / abs(exact))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize(("branch", "options"), SETTINGS)
def test_closed_forms_agree_with_80_digit_arithmetic_at_every_kind_of_pair(branch, options, activation):
    x, partners = inputs()
    y = torch.stack(list(partners.values()))
    with mp.workdps(reference.DIGITS):
        for depth in (1, 2, 7, 64):
            found = ours(x[None], y, depth, activation, branch, **options)
            for k, (place, partner) in enumerate(partners.items()):
                exact = reference.kernels(x, partner, depth, getattr(reference, activation), branch, **options)
                for name, kernel, value in zip(("NNGP", "NTK"), found, exact, strict=True):
                    assert relative(kernel[0, k], value) < TARGET, (name, depth, place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "branch", "options", "depths"),
    [
        ("tanh", "pre", {"alpha": 0.5, "w_std": 1.4, "b_std": 0.1}, (2,)),
        ("tanh", "two", {"alpha": 0.5, "w_std": 1.4, "b_std": 0.3}, (2,)),
        ("tanh", "lly", {"alpha": 1.0}, (2, 64)),
        ("gelu", "pre", {"alpha": 0.5, "w_std": 1.4, "b_std": 0.1}, (1,)),
        ("gelu", "lly", {"alpha": 2.0}, (1,)),
        ("tanh", "huang-yau", {}, (2,)),
    ],
)
def test_quadrature_agrees_with_dense_integration_in_30_digit_arithmetic(activation, branch, options, depths):
    x, partners = inputs()
    places = ["off-diagonal", "diagonal", "parallel", "antipodal"]
    y = torch.stack([partners[place] for place in places])
    with mp.workdps(30):
        for depth in depths:
            found = ours(x[None], y, depth, activation, branch, **options)
            for k, place in enumerate(places):
                exact = reference.kernels(x, partners[place], depth, getattr(reference, activation), branch, **options)
                for kernel, value in zip(found, exact, strict=True):
                    assert relative(kernel[0, k], value) < TARGET, (depth, place)


@pytest.mark.slow
@pytest.mark.parametrize(("branch", "options"), [s for s in SETTINGS if s[0] != "two"])
def test_quadrature_of_erf_agrees_with_its_closed_form_in_deep_networks(branch, options):
    def slope(u: Tensor) -> Tensor:
        return 2 / math.sqrt(math.pi) * torch.exp(-u * u)

    x, partners = inputs()
    y = torch.stack(list(partners.values()))
    depth = 64 if branch == "fc" else 24
    closed = ours(x[None], y, depth, "erf", branch, **options)
    summed = ours(x[None], y, depth, Quadrature(torch.erf, slope), branch, **options)
    for a, b in zip(closed, summed, strict=True):
        assert float(((a - b) / a).abs().max()) < TARGET


def test_a_quadrature_is_as_accurate_as_it_says_up_to_the_deviation_it_reaches():
    for name in ("tanh", "gelu"):
        activation = activation_of(name)
        assert isinstance(activation, Quadrature)
        for deviation in (0.3, 1.0, 3.0, 7.5):
            nodes = activation.nodes(deviation)
            _, moments = activation._moments(torch.tensor([deviation], dtype=torch.float64), nodes, 8)
            z = np.linspace(-10, 10, 100_001)
            weights = np.exp(-(z**2) / 2)
            u = deviation * z
            values = np.tanh(u) if name == "tanh" else u * torch.special.ndtr(torch.from_numpy(u)).numpy()
            exact = (values**2 * weights).sum() / weights.sum()
            assert float(moments[1]) == pytest.approx(exact, rel=activation.tolerance)


@pytest.mark.parametrize(
    ("function", "jump", "point"),
    [
        (torch.relu, 1, 0),
        (torch.nn.ReLU(), 1, 0),
        (torch.abs, 2, 0),
        (torch.nn.functional.hardswish, 0.5, -3),
        (lambda u: torch.tanh(u) + 0.01 * (u - 0.3).abs(), 0.02, 0.3),
    ],
)
def test_an_activation_with_a_kink_is_told_where_it_is_and_what_relu_is_called(function, jump, point):
    with pytest.raises(ValueError, match=f'jumps by {jump} at {point}, .* For ReLU pass activation="relu"'):
        residual(torch.ones(1, 3), activation=function)


@pytest.mark.parametrize(
    "function", [torch.tanh, torch.square, torch.nn.functional.softsign, lambda u: (99 * u).tanh()]
)
def test_smooth_activations_have_no_kink(function):
    assert Quadrature(function)._kink() is None


def test_too_wide_signals_and_kinks_are_refused_with_the_deviation_that_can_be_reached():
    x = torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"tanh .* up to a standard deviation of 8, and signals here have 20"):
        fully_connected(x, w_std=20.0, activation="tanh")
    with pytest.raises(ValueError, match=r"leaky_relu has a kink: .* jumps by 0.99 at 0, .* tolerance=1e-2"):
        fully_connected(x, activation=torch.nn.functional.leaky_relu)
    loose = Quadrature(torch.nn.functional.relu, tolerance=1e-2, name="relu")
    y = torch.tensor([[1.0, 2, 3], [3.0, -1, 0]], dtype=torch.float64)
    rough, exact = fully_connected(y, depth=1, activation=loose), fully_connected(y, depth=1, activation="relu")
    # Each moment is within 1 %; the tangent kernel sums two of them.
    torch.testing.assert_close(rough[1], exact[1], rtol=3e-2, atol=0)


def test_a_function_without_a_derivative_is_differentiated_automatically():
    x = torch.randn(3, 4, dtype=torch.float64)
    named, given = (residual(x, depth=3, activation=a) for a in ("tanh", lambda u: torch.tanh(u)))
    for a, b in zip(named, given, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize("activation", ["relu", "erf", "tanh", "gelu"])
@pytest.mark.parametrize("branch", ["pre", "two", "lly", "fc"])
def test_a_kernel_of_one_set_is_that_of_two_equal_sets_and_exactly_symmetric(activation, branch, monkeypatch):
    x = torch.randn(7, 5, dtype=torch.float64)
    x = torch.cat([x, x[:1], -x[1:2], 2 * x[2:3]])
    alone, twice = ours(x, None, 5, activation, branch), ours(x, x, 5, activation, branch)
    for a, b in zip(alone, twice, strict=True):
        assert torch.equal(a, a.T)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    monkeypatch.setattr(kernels, "_PAIRS_AT_ONCE", 17)  # blocks of one or two rows
    for a, b in zip(alone, ours(x, None, 5, activation, branch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("activation", ["relu", "erf", "tanh", "gelu"])
@pytest.mark.parametrize("branch", ["pre", "two", "lly", "fc"])
def test_kernels_are_positive_semidefinite_to_rounding(activation, branch):
    x = torch.randn(12, 3, dtype=torch.float64)
    x = torch.cat([x, x[:2] + 1e-6, -x[2:3], x[3:4]])
    for kernel in ours(x, None, 10, activation, branch):
        values = torch.linalg.eigvalsh(kernel)
        # Errors of 16 entries in a row, each a few units of rounding for each of 10 layers.
        assert float(values[0]) > -16 * 100 * torch.finfo(torch.float64).eps * float(values[-1])


@pytest.mark.slow
def test_depth_2048_keeps_its_digits():
    x, partners = inputs()
    y = torch.stack([partners[place] for place in ("off-diagonal", "near by 1e-07", "antipodal")])
    options = {"alpha": 1 / 45, "w_std": 1.4, "b_std": 0.1}
    found = residual(x[None], y, 2048, "relu", **options)
    with mp.workdps(reference.DIGITS):
        exact = reference.kernels(x, partners["off-diagonal"], 2048, reference.relu, "pre", **options)
    for kernel, value in zip(found, exact, strict=True):
        assert relative(kernel[0, 0], value) < TARGET
        assert bool(kernel.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "erf", "tanh"])
@pytest.mark.parametrize("branch", ["pre", "two", "lly", "fc"])
def test_derivatives_in_inputs_and_hyperparameters_are_those_of_finite_differences(activation, branch):
    x, y = torch.randn(2, 2, 3, dtype=torch.float64)
    values = [torch.tensor(v, dtype=torch.float64) for v in (0.7, 1.3, 0.4)]
    names = {"lly": ["alpha"], "fc": ["w_std", "b_std"]}.get(branch, ["alpha", "w_std", "b_std"])
    values = values[-2:] if branch == "fc" else values[: len(names)]
    leaves = [t.requires_grad_() for t in (x, y, *values)]

    def both(x: Tensor, y: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        options = dict(zip(names, given, strict=True))
        return *ours(x, y, 2, activation, branch, **options), *ours(x, None, 2, activation, branch, **options)

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize("activation", ["relu", "erf", "tanh", "gelu"])
@pytest.mark.parametrize("branch", ["pre", "two", "lly", "fc"])
def test_derivatives_are_finite_at_coincident_parallel_antipodal_and_vanishing_inputs(activation, branch):
    x = torch.randn(2, 4, dtype=torch.float64)
    x = torch.cat([x, x[:1], -x[:1], 3 * x[1:], -0.5 * x[1:], torch.zeros(1, 4), x[:1] + 1e-9]).requires_grad_()
    alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    options = {} if branch == "fc" else {"alpha": alpha}
    found = ours(x, None, 6, activation, branch, **options)
    assert all(bool(k.isfinite().all()) for k in found)
    sum(k.sum() for k in found).backward()
    assert bool(x.grad.isfinite().all())
    assert branch == "fc" or bool(alpha.grad.isfinite())


def test_near_coincident_derivatives_keep_their_digits():
    """Along a direction across x, the ReLU tangent kernel falls by the angle, at a rate that is exact at any size."""
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    found = []
    for size in (1e-5, 1e-9):
        y = torch.tensor([[1.0, size, 0.0]], dtype=torch.float64, requires_grad=True)
        _, ntk = fully_connected(x, y, depth=1)
        found.append(torch.autograd.grad(ntk.sum(), y)[0][0, 1])
    # T = (k_1(angle) + k_0(angle) c) / 3 with dk_0/dangle = -1/(2 pi), dk_1/dangle = 0 at 0, c = 1/3.
    assert float(found[1]) == pytest.approx(-1 / (2 * math.pi) / 3, rel=1e-8)
    assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-4)


def test_one_alpha_for_each_block_is_a_network_of_that_many_blocks():
    x = torch.randn(3, 4, dtype=torch.float64)
    for branch in ("pre", "two"):
        same = residual(x, depth=4, alpha=0.3, branch=branch)
        each = residual(x, depth=4, alpha=torch.full((4,), 0.3, dtype=torch.float64), branch=branch)
        switched = residual(x, depth=4, alpha=torch.tensor([0.3, 0, 0.3, 0], dtype=torch.float64), branch=branch)
        two = residual(x, depth=2, alpha=0.3, branch=branch)
        for a, b, c, d in zip(same, each, switched, two, strict=True):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(c, d, rtol=1e-14, atol=0)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: residual(x, activation="swish"), ValueError, "Unknown activation 'swish': choose from .*'erf'"),
        (lambda x: residual(x, activation=3), TypeError, "a name, a function or an Activation, got int"),
        (lambda x: residual(x, activation=lambda u: u.sum()), ValueError, "elementwise on float64"),
        (lambda x: residual(x, activation=lambda u: u - u.mean()), ValueError, "not elementwise"),
        (lambda x: residual(x, activation=lambda u: u.sqrt()), ValueError, "not finite"),
        (lambda x: residual(x, activation=lambda u: 0 * u + 1), ValueError, "constant"),
        (lambda x: residual(x, branch="post"), ValueError, "branch has to be one of pre, two, lly, got 'post'"),
        (lambda x: fully_connected(x, form="ntk"), ValueError, "form has to be one of .*, got 'ntk'"),
        (lambda x: residual(x, branch="lly", w_std=1.0), ValueError, '"lly" has no w_std'),
        (lambda x: residual(x, branch="lly", b_std=0.0), ValueError, '"lly" has no b_std'),
        (lambda x: fully_connected(x, form="huang-yau", w_std=1.0), ValueError, '"huang-yau" has no w_std'),
        (lambda x: residual(x, torch.zeros(2, 5)), ValueError, r"same width and device, got \[3, 4\].*\[2, 5\]"),
        (lambda x: residual(x, depth=0), ValueError, "depth has to be a whole number of at least 1, got 0"),
        (lambda x: residual(x, depth=2.0), TypeError, "depth has to be a whole number of at least 1, got 2.0"),
        (lambda x: residual(x.long()), TypeError, r"x1 has to be a floating-point tensor, got a tensor of torch.int64"),
        (lambda x: residual(x.numpy()), TypeError, "got ndarray"),
        (lambda x: residual(x * math.nan), ValueError, "x1 has values that are not finite"),
        (lambda x: residual(x, x / 0), ValueError, "x2 has values that are not finite"),
        (lambda x: residual(x[0]), ValueError, r"\[samples, width\], neither 0, got \[4\]"),
        (lambda x: residual(x[:0]), ValueError, "neither 0"),
        (lambda x: residual(x, w_std=-1.0), ValueError, "w_std is a standard deviation"),
        (lambda x: residual(x, alpha=math.inf), ValueError, "alpha has to be finite"),
        (lambda x: residual(x, alpha="1"), TypeError, "alpha has to be a number or a tensor, got str"),
        (lambda x: residual(x, depth=3, alpha=torch.ones(4)), ValueError, "one for each of 3 blocks"),
        (lambda x: residual(x, alpha=torch.ones(64), branch="lly"), ValueError, "alpha has to be a single number"),
        (lambda x: residual(x, depth=800, w_std=3.0), ValueError, "overflows float64"),
        (lambda x: resntk(x * 100, 2, 0.5), ValueError, "Cosines have to be from -1 to 1"),
        (lambda x: resntk(x.long(), 2, 0.5), TypeError, "cosine has to be a floating-point tensor"),
        (lambda x: resntk(x / 100, 0, 0.5), ValueError, "depth has to be a whole number of at least 1"),
        (lambda x: resntk(x / 100, 2, 0.0), ValueError, "positive alpha"),
        (lambda x: Quadrature(torch.tanh, tolerance=1e-20), ValueError, "from 1e-13 to 1"),
        (lambda x: Quadrature("tanh"), TypeError, "needs functions"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3, 4))


def test_inputs_that_vanish_have_the_kernel_of_the_biases_alone():
    x = torch.cat([torch.zeros(1, 4), torch.randn(1, 4)]).double()
    for activation, branch in itertools.product(("relu", "erf", "tanh"), ("pre", "two", "lly", "fc")):
        nngp, ntk = ours(x, None, 3, activation, branch)
        assert float(nngp[0, 0]) == float(ntk[0, 0]) == float(nngp[0, 1]) == float(ntk[0, 1]) == 0, (activation, branch)
    with mp.workdps(reference.DIGITS):
        exact = reference.kernels(x[0], x[1], 3, reference.erf, "pre", b_std=0.5)
    found = residual(x, depth=3, activation="erf", b_std=0.5)
    assert [relative(k[0, 1], v) for k, v in zip(found, exact, strict=True)] == pytest.approx([0, 0], abs=1e-13)


def test_closed_forms_know_the_second_moment_of_a_standard_normal():
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    weights = torch.exp(-z * z / 2)
    for activation, function in ((Relu(), torch.relu), (Erf(), torch.erf), (activation_of("tanh"), torch.tanh)):
        exact = float((function(z).square() * weights).sum() / weights.sum())
        assert activation.second_moment() == pytest.approx(exact, rel=1e-12)
