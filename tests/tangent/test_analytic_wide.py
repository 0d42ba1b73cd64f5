"""Infinite-width kernels against finite networks that grow wide, and the ResNTK against plain sums and networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from abyssal.nn import FullyConnectedNTK, LiLuoYipResNet
from abyssal.tangent.analytic.kernels import fully_connected, residual, resntk
from abyssal.tangent.analytic.quadrature import activation_of


def ours(x: Tensor, depth: int, activation: str, branch: str, **options) -> tuple[Tensor, Tensor]:
    if branch in ("fc", "huang-yau"):
        form = "dense" if branch == "fc" else branch
        return fully_connected(x, None, depth, activation, form=form, **options)
    return residual(x, None, depth, activation, branch=branch, **options)


def network(branch: str, d: int, m: int, depth: int, activation, options: dict, generator: torch.Generator):
    """Parameters and forward function of a finite network, written from SCIENCE.md's definitions."""
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    w, b, a = options.get("w_std", 1.0), options.get("b_std", 0.0), options.get("alpha", 1.0)
    c_s = 1 / float(activation_of(activation).second_moment())
    s = {"relu": torch.relu, "erf": torch.erf, "tanh": torch.tanh}[activation]
    shapes = {"pre": [(m, d)] + [(m, m)] * depth + [(1, m)], "two": [(m, d)] + [(m, m)] * 2 * depth + [(1, m)]}
    shapes["fc"] = [(m, d)] + [(m, m)] * (depth - 1) + [(1, m)]
    shapes["lly"] = shapes["huang-yau"] = shapes["fc"]
    weights = [normal(*shape) for shape in shapes[branch]]
    biases = [normal(shape[0]) for shape in shapes[branch]] if branch in ("pre", "two", "fc") else []

    def dense(p, k, u):
        return w / math.sqrt(u.shape[-1]) * p[0][k] @ u + b * p[1][k]

    def forward(p, x):
        if branch in ("lly", "huang-yau"):
            h = math.sqrt(c_s / m) * s(p[0][0] @ x)
            for k in range(1, depth):
                change = math.sqrt(c_s / m) * s(p[0][k] @ h)
                h = h + a / depth * change if branch == "lly" else change
            return (p[0][-1] @ h).squeeze()
        h = dense(p, 0, x)
        for k in range(depth):
            if branch == "pre":
                h = h + a * dense(p, k + 1, s(h))
            elif branch == "two":
                h = h + a * dense(p, 2 * k + 2, s(dense(p, 2 * k + 1, h)))
            else:
                h = dense(p, k + 1, s(h))
        return (h if branch == "fc" else dense(p, -1, s(h) if branch == "pre" else h)).squeeze()

    return (weights, biases), forward


def empirical(params, forward, x: Tensor) -> Tensor:
    """The tangent kernel from full Jacobians. [n, n]"""
    jacobians = torch.func.vmap(torch.func.jacrev(forward), (None, 0))(params, x)
    flat = [j.flatten(1) for group in jacobians for j in group]
    return sum(j @ j.T for j in flat)


@pytest.mark.parametrize(
    ("branch", "activation", "options"),
    [
        ("pre", "relu", {"alpha": 0.6, "w_std": 1.4, "b_std": 0.3}),
        ("pre", "tanh", {"alpha": 0.6, "w_std": 1.4, "b_std": 0.3}),
        ("two", "erf", {"alpha": 0.8, "w_std": 1.2, "b_std": 0.2}),
        ("lly", "relu", {"alpha": 2.0}),
        ("lly", "tanh", {"alpha": 2.0}),
        ("fc", "relu", {"w_std": 1.4, "b_std": 0.3}),
        ("huang-yau", "tanh", {}),
    ],
)
def test_wide_networks_have_these_kernels_with_fluctuations_of_one_over_the_root_of_the_width(
    branch, activation, options
):
    """Means within 4 standard errors of the limit; a bias of order 1/m is 1/sqrt(m) of the fluctuation, allowed for."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    depth, count = 3, 24
    _, exact = ours(x, depth, activation, branch, **options)
    spreads = []
    for width in (32, 288):
        found = torch.stack(
            [empirical(*network(branch, 4, width, depth, activation, options, generator), x) for _ in range(count)]  # type: ignore[call-arg]  # of three
        )
        deviation = found.std(0)
        error = deviation / math.sqrt(count)
        # Fluctuations and bias have constants of the same order: bias ~ deviation^2 / kernel.
        bias = deviation.square() / exact.diagonal().mean()
        assert bool(((found.mean(0) - exact).abs() < 4 * error + 4 * bias).all()), (found.mean(0) - exact) / error
        spreads.append(float(deviation.square().mean().sqrt()))
    # 6 numbers that depend on one another at worst wholly: the log of a ratio of standard deviations of 24 has
    # standard error 1/sqrt(23) if they are Gaussian; narrow networks have heavier tails (twice that).
    assert math.log(spreads[0] / spreads[1]) == pytest.approx(math.log(3), abs=4 * 2 / math.sqrt(23))


@pytest.mark.parametrize(("activation", "c_res"), [("tanh", 1.0), ("relu", 3.0), ("gelu", 2.0)])
def test_the_librarys_own_networks_have_the_kernels_named_after_them(activation, c_res):
    generator = torch.Generator().manual_seed(8)
    x = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64, generator=generator), dim=-1)
    builds = {
        "lly": lambda: LiLuoYipResNet(4, 256, 3, c_res=c_res, activation=activation, generator=generator),
        "huang-yau": lambda: FullyConnectedNTK(4, 256, 3, activation=activation, generator=generator),
    }
    for branch, build in builds.items():
        _, exact = ours(x, 3, activation, branch, **({"alpha": c_res} if branch == "lly" else {}))
        found = []
        for _ in range(16):
            net = build().double()
            rows = [torch.autograd.grad(net(row[None]).sum(), list(net.parameters())) for row in x]
            flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            found.append(flat @ flat.T)
        kernels = torch.stack(found)
        deviation = kernels.std(0)
        allowed = 4 * deviation / math.sqrt(16) + 4 * deviation.square() / exact.diagonal().mean()
        assert bool(((kernels.mean(0) - exact).abs() < allowed).all()), branch


@pytest.mark.slow
def test_outputs_of_wide_networks_have_the_covariance_of_the_process():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    options = {"alpha": 0.6, "w_std": 1.4, "b_std": 0.3}
    exact, _ = residual(x, depth=2, activation="erf", branch="two", **options)
    outputs = []
    for _ in range(2000):
        params, forward = network("two", 4, 64, 2, "erf", options, generator)
        outputs.append(torch.stack([forward(params, row) for row in x]))
    found = torch.stack(outputs)
    products = found.unsqueeze(1) * found.unsqueeze(2)
    error = products.std(0) / math.sqrt(len(found))
    assert bool(((products.mean(0) - exact).abs() < 4 * error).all())


# --- the ResNTK ------------------------------------------------------------------------------------------------------


def plain_resntk(t: np.ndarray, depth: int, alpha: float) -> np.ndarray:
    """Sum over layers of forward and backward products, with arc-cosine kernels as they are usually written."""
    kappa0 = lambda u: (math.pi - np.arccos(u)) / math.pi  # noqa: E731
    kappa1 = lambda u: (u * (math.pi - np.arccos(u)) + np.sqrt(1 - u * u)) / math.pi  # noqa: E731
    forward = [t]  # cosines; norms are (1 + alpha^2)^(l/2)
    for layer in range(depth):
        size = (1 + alpha**2) ** layer
        forward.append(forward[-1] + alpha**2 * size * kappa1(forward[-1] / size))
    total, backward = np.zeros_like(t), np.ones_like(t)
    for layer in range(depth - 1, -1, -1):
        size = (1 + alpha**2) ** layer
        cosine = forward[layer] / size
        total += alpha**2 * backward * (size * kappa1(cosine) + forward[layer] * kappa0(cosine))
        backward = backward * (1 + alpha**2 * kappa0(cosine))
    return total / (2 * depth * alpha**2 * (1 + alpha**2) ** (depth - 1))


@pytest.mark.parametrize(("depth", "alpha"), [(1, 0.5), (3, 1.0), (40, 0.2)])
def test_resntk_is_the_sum_over_layers_normalised_to_1(depth, alpha):
    t = np.linspace(-0.999, 0.99, 201)
    found = resntk(torch.from_numpy(t), depth, alpha)
    np.testing.assert_allclose(found.numpy(), plain_resntk(t, depth, alpha), rtol=1e-11)
    assert float(resntk(torch.ones(1), depth, alpha)) == pytest.approx(1, rel=1e-13)


@pytest.mark.slow
def test_resntk_of_depth_2048_neither_overflows_nor_loses_the_kink_at_1():
    t = torch.tensor([1.0, 1 - 1e-12, 0.0, -1.0], dtype=torch.float64)
    found = resntk(t, 2048, 1.0)
    assert bool(found.isfinite().all())
    assert float(found[0]) == pytest.approx(1, rel=1e-12)
    # 1 - K ~ slope * angle: at an angle of 1.4e-6 the slope of a deep kernel shows.
    one = float(1 - resntk(t[1:2], 4, 1.0)) / math.sqrt(2e-12)
    ten = float(1 - resntk(1 - 100 * (1 - t[1:2]), 4, 1.0)) / math.sqrt(2e-10)
    assert one == pytest.approx(ten, rel=1e-4)


def test_resntk_tends_to_the_same_kernel_at_any_depth_as_alpha_vanishes():
    t = torch.linspace(-1, 1, 21, dtype=torch.float64)
    angle = t.acos()
    limit = (angle.sin() + (math.pi - angle) * t + t * (math.pi - angle)) / (2 * math.pi)
    for depth in (1, 50):
        # At cosine -1 the branch turns the signal by an angle of alpha.
        torch.testing.assert_close(resntk(t, depth, 1e-7), limit, rtol=0, atol=2e-7)


def test_resntk_is_that_of_wide_networks():
    """V and W trained, A and v not; normalised by the diagonal of the limit."""
    generator = torch.Generator().manual_seed(7)
    depth, alpha, m, count = 2, 0.8, 256, 24
    x = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64, generator=generator), dim=-1)
    scale = 2 * depth * alpha**2 * (1 + alpha**2) ** (depth - 1)
    found = []
    for _ in range(count):
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        first, last = normal(m, 4), normal(m)
        params = ([normal(m, m) for _ in range(depth)], [normal(m, m) for _ in range(depth)])

        def forward(p, u, first=first, last=last):
            h = first @ u / math.sqrt(m)
            for w, v in zip(*p, strict=True):
                h = h + alpha / math.sqrt(m) * v @ torch.relu(math.sqrt(2 / m) * w @ h)
            return last @ h

        found.append(empirical(params, forward, x))
    kernels = torch.stack(found) / scale
    exact = resntk((x @ x.T).clamp(-1, 1), depth, alpha)
    deviation = kernels.std(0)
    assert bool(((kernels.mean(0) - exact).abs() < 4 * deviation / math.sqrt(count) + 4 * deviation.square()).all())
