"""Truncated hierarchies and the true flow: closed forms, orders in time, and their slow twins."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from abyssal.nn import LiLuoYipResNet
from abyssal.tangent.hierarchy.hierarchy import Hierarchy, TangentPath


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sphere(n: int, d: int) -> torch.Tensor:
    x = randn(n, d)
    return x / x.norm(dim=-1, keepdim=True)


def lly(seed: int = 0, width: int = 16) -> nn.Module:
    return LiLuoYipResNet(6, width, 4, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(scope="module")
def hierarchy() -> Hierarchy:
    return Hierarchy(lly(), sphere(5, 6), randn(5, seed=3))


def order_of(errors: torch.Tensor, steps: list[float]) -> float:
    return (torch.log(errors[1] / errors[0]) / np.log(steps[1] / steps[0])).item()


@pytest.mark.parametrize("order", [2, 3, 4, None])
def test_a_linear_model_follows_the_closed_form_at_every_order(order):
    """Its kernel `X X^T` stands still: residuals are `exp(-K t / n) r(0)`."""
    model, x, y = nn.Linear(4, 1, bias=False).double(), randn(6, 4), randn(6, 1, seed=1)
    h, times = Hierarchy(model, x, y), [0.0, 0.5, 3.0]
    path = h.flow(times) if order is None else h.predict(times, order)
    k = x @ x.T
    with torch.no_grad():
        r = model(x) - y
    for t, outputs, loss, kernel in zip(times, path.outputs, path.loss, path.kernel, strict=True):
        expected = torch.matrix_exp(-k * t / 6) @ r
        torch.testing.assert_close(outputs, expected + y, rtol=0, atol=1e-8)
        torch.testing.assert_close(loss, expected.square().sum() / 12, rtol=1e-7, atol=0)
        torch.testing.assert_close(kernel, k, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_prediction_is_wrong_by_one_power_of_time_more_for_each_order(hierarchy, order):
    """K^(p) held constant leaves out a term of K2 in t^(p-1), and one of the outputs in t^p."""
    times = [0.01, 0.02]
    found = hierarchy.predict(times, order).distance(hierarchy.flow(times, rtol=1e-12, check=False))
    # The next power moves the observed one by a multiple of the time.
    assert abs(order_of(found.kernel, times) - (order - 1)) < 0.05
    assert abs(order_of(found.outputs, times) - order) < 0.05


def test_the_rates_are_the_flows_taylor_series(hierarchy):
    times = [0.02, 0.04]
    flow = hierarchy.flow(times, rtol=1e-12, check=False)
    first, second, third = hierarchy.rates(3)
    start = hierarchy.kernel(2)
    left = [
        k - (start + t * first + t**2 / 2 * second + t**3 / 6 * third) for t, k in zip(times, flow.kernel, strict=True)
    ]
    assert abs(order_of(torch.stack([e.norm() for e in left]), times) - 4) < 0.1


@pytest.mark.parametrize("order", [3, 4])
def test_the_reduced_system_is_the_hierarchy_written_out(hierarchy, order):
    """The slow twin keeps all kernels below the constant one in the state, as the paper has them."""
    n, top = 5, hierarchy.kernel(order).numpy()
    starts = [hierarchy.kernel(p).numpy() for p in range(2, order)]
    with torch.no_grad():
        y = randn(5, seed=3).numpy()
        f = lly()(sphere(5, 6)).numpy()

    def velocity(t, state):
        r, rest, slopes, kernels = state[:n] - y, state[n:], [], []
        for k in starts:
            kernels.append(rest[: k.size].reshape(k.shape))
            rest = rest[k.size :]
        kernels.append(top)
        slopes.append(-kernels[0] @ r / n)
        slopes += [-(above @ r / n).ravel() for above in kernels[1:]]
        return np.concatenate(slopes)

    start = np.concatenate([f, *(k.ravel() for k in starts)])
    slow = solve_ivp(velocity, (0, 2.0), start, "RK45", rtol=1e-10, atol=1e-12).y[:, -1]
    fast = hierarchy.predict([2.0], order)
    np.testing.assert_allclose(fast.outputs[0].numpy(), slow[:n], atol=1e-7)
    np.testing.assert_allclose(fast.kernel[0].numpy(), slow[n : n + n * n].reshape(n, n), atol=1e-7)


def test_gradient_descent_comes_to_the_flow_linearly_in_its_step(hierarchy):
    flow = hierarchy.flow([0.5])
    errors, steps = [], [0.02, 0.01]
    for step in steps:
        model, x, y = lly(), sphere(5, 6), randn(5, seed=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=step)
        for _ in range(round(0.5 / step)):
            optimizer.zero_grad()
            ((model(x) - y).square().sum() / 10).backward()
            optimizer.step()
        errors.append((model(x).detach() - flow.outputs[0]).norm())
    assert abs(order_of(torch.stack(errors), steps) - 1) < 0.1


def test_the_flows_stated_error_is_above_its_true_one(hierarchy):
    times = [0.5, 4.0]
    flow = hierarchy.flow(times, rtol=1e-7)
    true = flow.distance(hierarchy.flow(times, rtol=1e-12, check=False))
    assert 0 < max(true.kernel.max(), true.outputs.max()) < flow.error < 1e-4


def test_times_between_do_not_move_the_flow(hierarchy):
    few, many = hierarchy.flow([2.0], check=False), hierarchy.flow(np.linspace(0, 2, 9), check=False)
    torch.testing.assert_close(few.outputs[-1], many.outputs[-1], rtol=0, atol=1e-8)
    torch.testing.assert_close(many.outputs[0], lly()(sphere(5, 6)).detach())


@pytest.mark.parametrize("single", [True, False], ids=["[n, 1]", "[n, 3]"])
def test_outputs_keep_the_models_shape(single):
    k = 1 if single else 3
    model, x, y = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, k)), randn(4, 4), randn(4, k, seed=1)
    h = Hierarchy(model, x, y[:, 0] if single else y)
    assert (h.samples, h.outputs) == (4, 4 * k)
    for path in (h.flow([0.0, 1.0]), h.predict([0.0, 1.0], 3)):
        assert path.outputs.shape == (2, 4, k)
        assert path.kernel.shape == (2, 4 * k, 4 * k)
        torch.testing.assert_close(path.kernel[0], h.kernel(2))
        torch.testing.assert_close(path.loss, (path.outputs - y).square().sum((1, 2)) / 8)
    assert h.flow([1.0]).loss < h.flow([0.0]).loss


def test_the_loss_of_vector_outputs_falls_at_the_rate_that_the_kernel_says():
    model, x, y = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2)), randn(4, 4), randn(4, 2, seed=1)
    h = Hierarchy(model, x, y)
    with torch.no_grad():
        r = (model.double()(x) - y).flatten()
    step = 1e-5
    before, after = h.flow([0.0, step], rtol=1e-13).loss
    expected = -(r @ h.kernel(2) @ r) / 16
    # One-sided: wrong by the step times half the second derivative, and by rounding over the step.
    torch.testing.assert_close((after - before) / step, expected, rtol=1e-3, atol=0)


def test_a_truncated_system_that_blows_up_says_so_and_leaves_nan():
    h = Hierarchy(lly(), sphere(5, 6), 40 * randn(5, seed=3))
    times = [0.0, 0.01, 200.0]
    with pytest.warns(UserWarning, match=r"truncated at order 3 blows up at t = "):
        path = h.predict(times, 3)
    assert path.reached < 200
    assert path.outputs[:2].isfinite().all() and path.kernel[:2].isfinite().all()
    assert path.outputs[2].isnan().all() and path.kernel[2].isnan().all() and path.loss[2].isnan()


def test_the_model_moves_neither_by_flow_nor_by_training_it_on():
    model = lly()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    h = Hierarchy(model, sphere(5, 6), randn(5))
    start = h.flow([1.0]).outputs
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        model.first.linear.weight.mul_(2)
    torch.testing.assert_close(h.flow([1.0]).outputs, start)


def test_progress_reaches_its_end():
    seen = []
    h = Hierarchy(lly(), sphere(5, 6), randn(5), progress=lambda *event: seen.append(event))
    h.flow([1.0], check=False)
    phases = [event for event in seen if event[0] == "true flow"]
    assert phases[-1] == ("true flow", 100, 100)
    done = [done for _, done, _ in phases]
    assert done == sorted(done) and len(set(done)) > 3


def test_bad_times_orders_and_tolerances_are_refused(hierarchy):
    for times, match in (
        ([], "at least one"),
        ([-1.0], "at least 0"),
        ([1.0, 1.0], "increasing"),
        ([np.nan], "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            hierarchy.predict(times)
        with pytest.raises(ValueError, match=match):
            hierarchy.flow(times)
    with pytest.raises(TypeError, match="sequence of numbers"):
        hierarchy.flow(1.0)
    for order in (1, 5, True):
        with pytest.raises(ValueError, match="2, 3 or 4"):
            hierarchy.predict([1.0], order)
        with pytest.raises(ValueError, match="2, 3 or 4"):
            hierarchy.kernel(order)
    with pytest.raises(ValueError, match="1, 2 or 3"):
        hierarchy.rates(4)
    with pytest.raises(ValueError, match="rtol"):
        hierarchy.flow([1.0], rtol=0.5)
    a, b = hierarchy.predict([1.0], 2), hierarchy.predict([2.0], 2)
    assert isinstance(a, TangentPath)
    with pytest.raises(ValueError, match="same times"):
        a.distance(b)


def test_float32_warns_and_float64_is_what_it_is_computed_in():
    model, x, y = lly().float(), sphere(5, 6).float(), randn(5).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h = Hierarchy(model, x, y)
    assert h.kernel(3).dtype == torch.float64
    assert model.first.linear.weight.dtype == torch.float32
    with pytest.warns(UserWarning, match=r"torch.float32.*float64 \(the default\) is recommended"):
        rough = Hierarchy(model, x, y, dtype=None)
    k4 = rough.kernel(4)
    assert k4.dtype == torch.float32
    # Relative to the largest, rounding of 6e-8 grows by the sums of some hundred terms and five factors.
    torch.testing.assert_close(k4.double(), h.kernel(4), rtol=0, atol=1e-4 * h.kernel(4).abs().max().item())
