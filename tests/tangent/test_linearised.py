"""Training with a constant kernel, against models that are linear in their parameters and a wide network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from abyssal.tangent.empirical.ntk import ntk
from abyssal.tangent.hierarchy.hierarchy import Hierarchy
from abyssal.tangent.training.linearised import linearised

D = torch.float64


def problem(n: int = 6, m: int = 3, k: int = 2, features: int = 20) -> tuple[Tensor, ...]:
    """Gradients of all outputs on training and test samples, first outputs, targets."""
    J = torch.randn(n + m, k, features, dtype=D)
    f0, y = torch.randn(n + m, k, dtype=D), torch.randn(n, k, dtype=D)
    return J[:n], J[n:], f0[:n], f0[n:], y


def flow(J: Tensor, J_test: Tensor, f0: Tensor, f0_test: Tensor, y: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Gradient flow of a model that is linear in its parameters, by the exponential of the parameters' own matrix."""
    n, _, p = J.shape
    flat, r = J.reshape(-1, p), (f0 - y).reshape(-1)
    A = flat.T @ flat / n
    # theta' = -A theta - b with b = J^T r / n; [theta, 1] has the generator [[-A, -b], [0, 0]].
    generator = torch.zeros(p + 1, p + 1, dtype=D)
    generator[:p, :p], generator[:p, p] = -A, -(flat.T @ r) / n
    theta = torch.linalg.matrix_exp(generator * time)[:p, p]
    return f0 + (J @ theta), f0_test + (J_test @ theta)


@given(st.floats(0, 30), st.integers(1, 7), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_all_outputs_follow_the_flow_of_a_model_that_is_linear_in_its_parameters(time: float, n: int, k: int) -> None:
    J, J_test, f0, f0_test, y = problem(n=n, k=k, features=8)
    K = torch.einsum("iap,jbp->ijab", J, J)
    K_test = torch.einsum("iap,jbp->ijab", J_test, J)
    found = linearised(K, f0, y, [time], K_test=K_test, f0_test=f0_test)
    train, test = flow(J, J_test, f0, f0_test, y, time)
    # The exponential of a matrix of norm up to |J|^2 t / n ~ 1e3 by scaling and squaring loses about that many eps.
    assert torch.allclose(found.outputs[0], train, rtol=0, atol=1e-9)
    assert found.test_outputs is not None
    assert torch.allclose(found.test_outputs[0], test, rtol=0, atol=1e-9)
    assert float(found.loss[0]) == pytest.approx(float((train - y).square().sum() / (2 * n)), abs=1e-9)


def test_outputs_of_their_own_kernels_are_as_many_single_outputs() -> None:
    J, J_test, f0, f0_test, y = problem()
    K, K_test = torch.einsum("iap,jap->ija", J, J), torch.einsum("iap,jap->ija", J_test, J)
    times = [0.0, 0.5, 3.0, math.inf]
    found = linearised(K, f0, y, times, K_test=K_test, f0_test=f0_test)
    assert found.test_outputs is not None
    assert found.outputs.shape == (4, 6, 2)
    for a in range(2):
        one = linearised(K[..., a], f0[:, a], y[:, a], times, K_test=K_test[..., a], f0_test=f0_test[:, a])
        assert one.test_outputs is not None
        assert torch.allclose(found.outputs[..., a], one.outputs, rtol=0, atol=1e-12)
        assert torch.allclose(found.test_outputs[..., a], one.test_outputs, rtol=0, atol=1e-12)


def test_one_kernel_serves_every_output_alike() -> None:
    J, J_test, f0, f0_test, y = problem()
    K, K_test = J[:, 0] @ J[:, 0].T, J_test[:, 0] @ J[:, 0].T
    found = linearised(K, f0, y, [0.7], K_test=K_test, f0_test=f0_test)
    assert found.test_outputs is not None
    for a in range(2):
        train, test = flow(J[:, [0]], J_test[:, [0]], f0[:, [a]], f0_test[:, [a]], y[:, [a]], 0.7)
        assert torch.allclose(found.outputs[0, :, a], train[:, 0], rtol=0, atol=1e-11)
        assert torch.allclose(found.test_outputs[0, :, a], test[:, 0], rtol=0, atol=1e-11)


def test_the_end_of_training_is_kernel_regression() -> None:
    J, J_test, f0, f0_test, y = (value[:, 0] for value in problem(k=1))
    K, K_test = J @ J.T, J_test @ J.T
    found = linearised(K, f0, y, [math.inf], K_test=K_test, f0_test=f0_test)
    assert found.test_outputs is not None
    assert torch.allclose(found.outputs[0], y, rtol=0, atol=1e-10)
    expected = f0_test + K_test @ torch.linalg.solve(K, y - f0)
    assert torch.allclose(found.test_outputs[0], expected, rtol=0, atol=1e-9)
    assert found.loss[0] < 1e-20


def test_what_the_features_cannot_fit_stays_for_ever() -> None:
    """Six samples, four parameters: the end is least squares of least norm, not an explosion."""
    J, J_test, f0, f0_test, y = (value[:, 0] for value in problem(k=1, features=4))
    found = linearised(J @ J.T, f0, y, [1e9, math.inf], K_test=J_test @ J.T, f0_test=f0_test)
    theta = torch.linalg.lstsq(J, y - f0).solution
    assert found.test_outputs is not None
    for i in range(2):
        assert torch.allclose(found.outputs[i], f0 + J @ theta, rtol=0, atol=1e-8)
        assert torch.allclose(found.test_outputs[i], f0_test + J_test @ theta, rtol=0, atol=1e-6)
    assert (found.rates == 0).sum() == 2


def test_the_loss_falls_at_the_least_rate_in_the_end() -> None:
    K = torch.diag(torch.tensor([6.0, 3.0], dtype=D))
    found = linearised(K, torch.ones(2, dtype=D), torch.zeros(2, dtype=D), [0.0, 20.0, 21.0])
    assert found.rates.tolist() == [3.0, 1.5]
    assert float(found.loss[0]) == 0.5
    assert float((found.loss[1] / found.loss[2]).log()) == pytest.approx(2 * 1.5, rel=1e-9)


def test_a_wide_networks_training_is_predicted_by_its_kernel() -> None:
    """Gradient descent with small steps on the network itself: what differs is by the kernel's movement, ~ 1/width."""
    off = []
    for width in (64, 1024):
        torch.manual_seed(0)
        x, y = torch.randn(6, 3, dtype=D), torch.randn(6, dtype=D)
        x_test = torch.randn(4, 3, dtype=D)
        model = Wide(width)
        K, K_test = ntk(model, x), ntk(model, x_test, x)
        found = linearised(K, model(x).detach(), y, [4.0], K_test=K_test, f0_test=model(x_test).detach())
        for _ in range(400):
            grads = torch.autograd.grad((model(x) - y).square().sum() / 12, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= 0.01 * g
        assert found.test_outputs is not None
        off.append(float((model(x_test) - found.test_outputs[0]).detach().norm()))
    assert off[1] < 0.02
    assert off[1] < off[0] / 3


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w, self.a = nn.Parameter(torch.randn(width, 3, dtype=D)), nn.Parameter(torch.randn(width, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.T) @ self.a / len(self.a) ** 0.5


def test_it_is_the_hierarchy_truncated_at_order_two() -> None:
    """Which is integrated step by step there, with a relative tolerance of 1e-10 for each step."""
    model = Wide(16)
    x, y = torch.randn(5, 3, dtype=D), torch.randn(5, dtype=D)
    times = [0.0, 0.5, 2.0, 8.0]
    path = Hierarchy(model, x, y).predict(times, order=2)
    found = linearised(ntk(model, x), model(x).detach(), y, times)
    assert torch.allclose(found.outputs, path.outputs, rtol=0, atol=1e-8)
    assert torch.allclose(found.loss, path.loss, rtol=1e-7, atol=1e-12)


def test_numpy_and_float32_come_back_in_float64() -> None:
    J, _, f0, _, y = problem()
    K = torch.einsum("iap,jbp->ijab", J, J)
    exact = linearised(K, f0, y, [1.0]).outputs
    assert torch.equal(linearised(K.numpy(), f0.numpy(), y.numpy(), np.array([1.0])).outputs, exact)
    rough = linearised(K.float(), f0.float(), y.float(), [1.0]).outputs
    assert rough.dtype == D
    assert torch.allclose(rough, exact, rtol=0, atol=1e-4)


GOOD: dict[str, Any] = {"K": torch.eye(4), "f0": torch.zeros(4), "y": torch.ones(4), "times": [1.0]}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"K": torch.randn(4, 3)}, ValueError, r"\[4, 3\]"),
        ({"K": -torch.eye(4)}, ValueError, "eigenvalue of -1"),
        ({"K": torch.eye(5)}, ValueError, "n = 5"),
        ({"y": torch.ones(4, 1)}, ValueError, r"\[4\] and \[4, 1\]"),
        ({"y": [1.0] * 4}, TypeError, "y has to be a torch.Tensor"),
        ({"f0": torch.full((4,), math.nan)}, ValueError, "f0 has entries that are not finite"),
        ({"f0": torch.zeros(4, 1, 1)}, ValueError, r"f0 has to be \[n\]"),
        ({"K": torch.ones(4, 4, 3)}, ValueError, "K is of 3 outputs, f0 and y of 1"),
        ({"times": [-1.0]}, ValueError, "times"),
        ({"times": []}, ValueError, "times"),
        ({"times": [math.nan]}, ValueError, "times"),
        ({"times": 1.0}, ValueError, "times"),
        ({"K_test": torch.zeros(2, 4)}, ValueError, "go together"),
        ({"K_test": torch.zeros(2, 5), "f0_test": torch.zeros(2)}, ValueError, r"\[2, 4\].*got \[2, 5\]"),
        ({"K_test": torch.zeros(2, 4), "f0_test": torch.zeros(2, 3)}, ValueError, r"got \[2, 4\] and \[2, 3\]"),
    ],
)
def test_bad_input_is_refused_with_the_reason(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        linearised(**{**GOOD, **given})
