"""Schemes: orders of convergence forward and back, against an accurate solution of the ODE."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from abyssal.nn import Euler, EulerStep, Heun, HeunStep, MLPBranch, ResidualStack, depth_smooth_

SCHEMES = [Euler(), Heun()]
WIDTH = 5


class Field(nn.Module):
    """phi(x, s) at one depth s: a smooth, non-linear vector field."""

    def __init__(self, s: float):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        a, b, c = torch.randn(3, WIDTH, WIDTH, dtype=torch.float64, generator=generator) / WIDTH**0.5
        self.matrix = np.cos(2 * s) * a + np.sin(3 * s) * b + s * c

    def forward(self, x):
        return torch.tanh(x @ self.matrix.T) + 0.3 * torch.sin(x)


def first_state() -> torch.Tensor:
    return torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network(scheme, steps: int) -> ResidualStack:
    """Samples phi at the depths where the scheme evaluates it: step n begins at s = n / steps."""
    count = steps + scheme.functions_per_step - 1
    return ResidualStack([Field(n / steps) for n in range(count)], scheme)


def solution() -> torch.Tensor:
    """x(1) of dx/ds = phi(x, s) by classical Runge-Kutta with 1,000 steps: error about 1e-12."""
    x, steps = first_state(), 1000
    h = 1 / steps
    for n in range(steps):
        start, middle, end = Field(n * h), Field((n + 0.5) * h), Field((n + 1) * h)
        k1 = start(x)
        k2 = middle(x + h / 2 * k1)
        k3 = middle(x + h / 2 * k2)
        k4 = end(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def slope(steps: list[int], errors: list[float]) -> float:
    """Order of convergence, by regressing log-error on log-step."""
    return float(np.polyfit(np.log([1 / n for n in steps]), np.log(errors), 1)[0])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_network_converges_to_its_ode_at_the_order_of_the_scheme(scheme):
    exact, steps = solution(), [16, 32, 64, 128, 256]
    errors = [(network(scheme, n)(first_state()) - exact).norm().item() for n in steps]
    assert slope(steps, errors) == pytest.approx(scheme.order, abs=0.1)


def reverse_order(scheme) -> int:
    """Order to which a network's reversed steps recover its input.

    A step of order p errs by C h^(p+1), the step back by C (-h)^(p+1): for even p they cancel.
    """
    return scheme.order if scheme.order % 2 else scheme.order + 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_one_reverse_step_is_wrong_by_one_order_more_than_all_of_them(scheme):
    steps, errors = [16, 32, 64, 128, 256], []
    for n in steps:
        step = network(scheme, n).steps[n // 2]
        errors.append((step.reverse_step(step(first_state())) - first_state()).norm().item())
    assert slope(steps, errors) == pytest.approx(reverse_order(scheme) + 1, abs=0.1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_reversing_the_whole_network_recovers_its_input_at_odd_order(scheme):
    steps, errors = [16, 32, 64, 128, 256], []
    for n in steps:
        stack = network(scheme, n)
        x = stack(first_state())
        for step in reversed(stack.steps):
            x = step.reverse_step(x)
        errors.append((x - first_state()).norm().item())
    assert slope(steps, errors) == pytest.approx(reverse_order(scheme), abs=0.1)


def test_euler_reverse_step_iterated_converges_to_the_exact_input():
    step = EulerStep(Field(0.3), 0, 0.2)
    x = first_state()
    y = step(x)
    s = y
    for _ in range(60):
        s = y - 0.2 * step.block(s)
    torch.testing.assert_close(s, x, rtol=0, atol=1e-14)
    torch.testing.assert_close(step.reverse_step(y), y - 0.2 * step.block(y), rtol=0, atol=1e-15)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 6), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_steps_compute_what_the_formulas_say(count, seed, data):
    torch.manual_seed(seed)
    blocks = [MLPBranch(WIDTH).double() for _ in range(count)]
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    sizes = data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count))

    expected = x
    for f, h in zip(blocks, sizes, strict=True):
        expected = expected + h * f(expected)
    actual = x
    for step in Euler().steps(blocks, sizes):
        actual = step(actual)
    torch.testing.assert_close(actual, expected)

    expected = x
    for f, g, h in zip(blocks, blocks[1:], sizes[1:], strict=False):
        expected = expected + h / 2 * (f(expected) + g(expected + h * f(expected)))
    actual = x
    for step in Heun().steps(blocks, sizes[1:]):
        actual = step(actual)
    torch.testing.assert_close(actual, expected)


def test_heun_reverse_step_is_a_heun_step_of_size_minus_h_with_the_functions_swapped():
    first, second = MLPBranch(WIDTH).double(), MLPBranch(WIDTH).double()
    y = first_state()
    swapped = HeunStep(second, first, 0, -0.1)
    torch.testing.assert_close(HeunStep(first, second, 0, 0.1).reverse_step(y), swapped(y))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_default_scale_is_one_over_the_number_of_steps(scheme):
    steps = scheme.steps([MLPBranch(3) for _ in range(5)])
    assert len(steps) == 5 - scheme.functions_per_step + 1
    assert [step.scale for step in steps] == [1 / len(steps)] * len(steps)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_blocks_gives_back_the_residual_functions_tied_ones_included(scheme):
    f, g = MLPBranch(3), MLPBranch(3)
    for blocks in ([f, g, f], [f, f, f]):
        found = scheme.blocks(scheme.steps(blocks))
        assert [id(b) for b in found] == [id(b) for b in blocks]


def test_schemes_are_values():
    assert Euler() == Euler() != Heun()
    assert len({Euler(), Euler(), Heun()}) == 2
    assert pickle.loads(pickle.dumps(Heun())) == copy.deepcopy(Heun()) == Heun()


def test_a_residual_function_that_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match=r"Residual function 1 is a function, not a torch\.nn\.Module"):
        Euler().steps([MLPBranch(3), lambda x: x])


@pytest.mark.parametrize(("scheme", "count"), [(Euler(), 0), (Heun(), 0), (Heun(), 1)], ids=str)
def test_too_few_residual_functions_are_refused(scheme, count):
    with pytest.raises(ValueError, match=rf"needs at least {count + 1 if count else '[12]'} .*got {count}"):
        scheme.steps([MLPBranch(3)] * count)


def test_a_scale_of_the_wrong_length_or_kind_is_refused():
    blocks = [MLPBranch(3) for _ in range(4)]
    with pytest.raises(ValueError, match="4 entries for 3 steps"):
        Heun().steps(blocks, [0.1] * 4)
    with pytest.raises(TypeError, match="scale has to be a number"):
        Euler().steps(blocks, "fast")
    with pytest.raises(TypeError, match="scale has to be a number"):
        Euler().steps(blocks, [0.1, 0.1, None, 0.1])
    with pytest.raises(ValueError, match="finite"):
        Euler().steps(blocks, float("nan"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_residual_function_that_changes_the_shape_is_named(scheme):
    # [3, 1] would broadcast in the sum with [3, 4] and give a wrong network without a word.
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)]
    with pytest.raises(ValueError, match=r"function 2 \(Linear\) returned shape \(3, 1\).*shape \(3, 4\)"):
        ResidualStack(blocks, scheme)(torch.randn(3, 4))


def test_a_residual_function_that_returns_no_tensor_is_named():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match=r"function 0 \(Pair\) returned a tuple"):
        ResidualStack([Pair()])(torch.randn(3, 4))


@pytest.mark.parametrize("modes", [1, 2, 4])
def test_depth_smooth_weights_have_unit_fan_in_variance_and_steps_of_one_over_depth(modes):
    generator = torch.Generator().manual_seed(0)
    for depth in (32, 128):
        blocks = depth_smooth_([MLPBranch(64, bias=True) for _ in range(depth)], modes, generator)
        weights = torch.stack([block.inner.weight for block in blocks]).detach()
        # 4,096 entries: the variance's own standard deviation is sqrt(2 / 4096) = 0.022.
        assert torch.all((weights.var(dim=(1, 2)) * 64 - 1).abs() < 5 * 0.022)
        # |dw/ds| <= pi k |(a_k, b_k)|: root mean square pi sqrt(mean k^2) / sqrt(fan_in)
        rms = (weights.diff(dim=0) * (depth - 1)).square().mean().sqrt() * 8
        expected = np.pi * np.sqrt(np.mean(np.arange(modes) ** 2))
        assert rms.item() == pytest.approx(expected, rel=0.1)
        assert all(block.inner.bias.abs().max() == 0 for block in blocks)


def test_depth_smooth_refuses_blocks_of_different_shapes():
    with pytest.raises(ValueError, match="Block 1 has parameters"):
        depth_smooth_([MLPBranch(3), MLPBranch(4)])
    with pytest.raises(ValueError, match="modes has to be a whole number of at least 1"):
        depth_smooth_([MLPBranch(3)], modes=0)
    assert depth_smooth_([]) == []
