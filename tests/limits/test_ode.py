"""The ODE limits: of a family of weight paths, and of a residual stack one has."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import abyssal.limits
from abyssal.limits.gap import _over_intervals, _spectral_norms, acceleration, euler_bound, rigorous_bound
from abyssal.limits.neural_ode import NeuralOde
from abyssal.nn import Euler, Heun, MLPBranch, ResidualStack, depth_smooth_, residual_conv, residual_mlp
from abyssal.weights.families import Family, GaussianProcess

needs_odeint = pytest.mark.skipif(not pytest.importorskip("torchdiffeq"), reason="torchdiffeq is missing")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def states(batch, width, seed=0):
    return torch.randn(batch, width, generator=generator(seed))


def smooth_stack(depth, width=6, seed=0, **options):
    stack = residual_mlp(depth, width, **options)
    depth_smooth_(stack.blocks, generator=generator(seed))
    return stack


def rough_stack(depth, width=6, seed=0, scale=None):
    torch.manual_seed(seed)
    stack = residual_mlp(depth, width, bias=False, scale=scale)
    for block in stack.blocks:
        for linear in (block.inner, block.outer):
            nn.init.normal_(linear.weight, std=width**-0.5)
    return stack


def affine_stack(slope, offsets, scale=None):
    """`f_n(x) = slope x + b_n`. [depth, width] offsets"""
    blocks = []
    for offset in offsets:
        block = nn.Linear(offsets.shape[1], offsets.shape[1]).double()
        with torch.no_grad():
            block.weight.copy_(slope * torch.eye(offsets.shape[1]))
            block.bias.copy_(offset)
        blocks.append(block)
    return ResidualStack(blocks, scale=scale)


def fitted_power(depths, values):
    x, y = torch.tensor(depths).double().log(), torch.tensor(values).double().log()
    return ((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()


# Families of paths.


@pytest.mark.slow
@pytest.mark.parametrize("network", ["res1", "res3"])
def test_networks_of_smooth_weights_approach_their_ode_like_one_over_depth(network):
    found = abyssal.limits.ode(network, 40, "rbf").compare()
    assert abs(found.slope.value + 1) < 0.05
    # Runge-Kutta loses order at the kinks of relu, and still has to be far below what is measured.
    assert found.solver_error < found.errors[-1] / 100
    if network == "res3":  # SCIENCE.md, part 2; its figures have an error of their own, taken to be as large as ours
        for error, standard, reference in zip(
            found.errors, found.standard_errors, (0.0252, 0.0122, 0.0060, 0.0030), strict=True
        ):
            assert abs(error - reference) < 4 * math.sqrt(2) * standard
    assert "power of the depth: -1.0" in str(found)


@pytest.mark.slow
def test_normalised_increments_are_a_smooth_path_too():
    found = abyssal.limits.ode("res3", 20, GaussianProcess(increments=True)).compare((40, 80, 160), models=6)
    assert abs(found.slope.value + 1) < 0.05


@pytest.mark.slow
def test_networks_of_rough_weights_approach_nothing_but_the_identity():
    found = abyssal.limits.ode("res3", 20, "normal").compare((32, 64, 128, 256), models=30)
    assert found.slope.low < -0.5 < found.slope.high  # the size of h_L - h_0 itself


@dataclass(frozen=True)
class Turning(Family):
    """Weights `cos(2 s + k)`, known at every s."""

    def _draw(self, depth, count, generator, device):
        s = torch.linspace(0, 1, depth, dtype=torch.float64)
        return (2 * s[:, None] + torch.arange(count)).cos()

    def covariance(self, depth):
        raise NotImplementedError


@pytest.mark.parametrize("network", ["res1", "res3"])
def test_the_ode_is_solved_as_scipy_solves_it(network):
    integrate = pytest.importorskip("scipy.integrate")
    width = 3
    limit = abyssal.limits.ode(network, width, Turning())
    start = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)

    def velocity(s, h):
        entries = (2 * s + torch.arange(limit._matrices() * width**2)).cos().double() / math.sqrt(width)
        return limit._velocity(entries.reshape(-1, width, width), torch.from_numpy(h)).numpy()

    reference = integrate.solve_ivp(velocity, (0, 1), start.numpy(), rtol=1e-10, atol=1e-12).y[:, -1]
    ours = limit._solve(limit._paths(2048, generator(0)), start, 1)
    assert torch.allclose(ours, torch.from_numpy(reference), atol=1e-6)


# The neural ODE of a stack.


@needs_odeint
def test_shared_linear_functions_give_the_matrix_exponential():
    block = nn.Linear(5, 5, bias=False)
    flow = NeuralOde(ResidualStack([block] * 7))
    x = states(3, 5)
    ends = flow.solve(x)
    assert ends.shape == (8, 3, 5) and ends.dtype == torch.float64
    for t, end in zip(flow.times, ends, strict=True):
        exact = x.double() @ torch.linalg.matrix_exp(t * block.weight.detach().double()).T
        assert torch.allclose(end, exact, rtol=0, atol=1e-8)


def test_velocity_is_the_residual_function_at_its_knot_and_between_two_elsewhere():
    stack = residual_mlp(4, 3).double()
    flow, x = NeuralOde(stack), states(2, 3).double()
    for n, block in enumerate(stack.blocks):
        assert torch.equal(flow.velocity(n, 0.0, x), block(x))
    middle = copy.deepcopy(stack.blocks[0])
    with torch.no_grad():
        for p, a, b in zip(middle.parameters(), *(stack.blocks[n].parameters() for n in (1, 2)), strict=True):
            p.copy_((a + b) / 2)
    assert torch.allclose(flow.velocity(1, 0.5, x), middle(x))
    assert torch.equal(flow.velocity(3, 0.7, x), stack.blocks[3](x))  # no function after the last


def test_time_is_the_sum_of_the_steps_sizes():
    assert torch.allclose(NeuralOde(residual_mlp(4, 3)).times, torch.linspace(0, 1, 5).double())
    flow = NeuralOde(residual_mlp(3, 3, scale=[0.1, 0.2, 0.4]))
    assert flow.times.tolist() == pytest.approx([0, 0.1, 0.3, 0.7])
    heun = NeuralOde(residual_mlp(4, 3, scheme=Heun()))
    assert len(heun.times) == 4


def test_acceleration_is_the_derivative_of_the_velocity_along_the_trajectory():
    flow, x = NeuralOde(smooth_stack(4, seed=1)), states(2, 6).double()
    e, size = 1e-5, 1 / 4
    v = flow.velocity(1, 0.3, x)
    ahead, behind = (flow.velocity(1, 0.3 + s * e / size, x + s * e * v) for s in (1, -1))
    found = acceleration(lambda s, u: flow.velocity(1, u, s), x, 0.3, torch.tensor(size).double())
    assert torch.allclose(found, (ahead - behind) / (2 * e), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@needs_odeint
def test_convolutions_have_a_neural_ode_too():
    stack = residual_conv(3, 8, groups=2)
    gap = abyssal.limits.ode_gap(stack, torch.randn(2, 8, 5, 5, generator=generator(0)))
    assert gap.distance.shape == (4, 2) and (gap.distance <= gap.stepwise).all() and gap.rigorous is None


# The gap and its bound.


@pytest.mark.slow
@needs_odeint
def test_the_gap_of_smooth_weights_goes_like_one_over_depth_and_heuns_like_its_square():
    x, depths = states(4, 6), (12, 24, 48)
    gaps = [abyssal.limits.ode_gap(smooth_stack(n), x) for n in depths]
    assert abs(fitted_power(depths, [g.distance[-1].mean() for g in gaps]) + 1) < 0.05
    assert abs(fitted_power(depths, [g.bound.mean() for g in gaps]) + 1) < 0.1  # M is still settling
    assert all(g.solver_error < g.distance[-1].min() / 100 for g in gaps)
    # A Heun network of n steps has knots 0, ..., n, so that all of them are on one path.
    heun = [abyssal.limits.ode_gap(smooth_stack(n + 1, scheme=Heun()), x) for n in depths]
    assert abs(fitted_power(depths, [g.distance[-1].mean() for g in heun]) + 2) < 0.1
    assert heun[0].bound is None and "no bound" in str(heun[0])


@pytest.mark.slow
@needs_odeint
@pytest.mark.parametrize("seed", range(12))
def test_the_bound_holds_for_random_stacks_at_every_depth(seed):
    draw = generator(seed)
    depth, width = (int(torch.randint(2, 12, (), generator=draw)) for _ in range(2))
    make = smooth_stack if seed % 2 else rough_stack
    scale = [None, 0.5, 1.5 / depth**0.5][seed % 3]
    stack = make(depth, width, seed, scale=scale)
    gap = abyssal.limits.ode_gap(stack, 2 * states(3, width, seed))
    rounding = 1e-12 + 2 * gap.solver_error
    assert (gap.distance <= gap.stepwise + rounding).all()
    assert (gap.stepwise[-1] <= gap.bound * (1 + 1e-12)).all()
    assert (gap.bound <= gap.rigorous.bound).all()


@pytest.mark.slow
@needs_odeint
def test_the_bound_holds_across_the_kinks_of_relu():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)) for _ in range(8)]
    gap = abyssal.limits.ode_gap(ResidualStack(blocks), 3 * states(20, 5))
    assert (gap.distance[1:] <= gap.stepwise[1:]).all() and (gap.distance[1:] > 0).all()


@needs_odeint
def test_the_bound_is_attained_without_state_dependence():
    depth, pull = 10, 3.0
    direction = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    offsets = pull * torch.arange(depth, dtype=torch.float64)[:, None] / depth * direction
    gap = abyssal.limits.ode_gap(affine_stack(0.0, offsets), torch.zeros(1, 2))
    # x'' = pull but in the last interval, where the function stays.
    assert gap.lipschitz.item() == 0 and gap.acceleration.item() == pytest.approx(pull)
    assert gap.distance[:, 0].tolist() == pytest.approx(gap.stepwise[:, 0].tolist(), abs=1e-9)
    assert gap.bound.item() == pytest.approx(pull / (2 * depth))
    assert (gap.distance[-1] / gap.bound).item() == pytest.approx((depth - 1) / depth, rel=1e-8)


@needs_odeint
def test_the_bound_is_tight_in_the_limit_for_the_linear_example():
    # At Lambda < 1 the last interval, where the function stays and x'' = Lambda x', does not set the supremum.
    slope, pull, ratios = 0.9, 2.0, []
    for depth in (10, 30, 90):
        t = torch.arange(depth, dtype=torch.float64)[:, None] / depth
        offsets = pull * (t - slope * t**2 / 2) * torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        gap = abyssal.limits.ode_gap(affine_stack(slope, offsets), torch.zeros(1, 2))
        assert gap.lipschitz.item() == pytest.approx(slope)
        ratios.append((gap.distance[-1] / gap.bound).item())
    missing = [1 - r for r in ratios]
    assert 0 < missing[2] < missing[1] < missing[0]
    assert fitted_power((10, 30, 90), missing) == pytest.approx(-1, abs=0.1) and missing[2] < 0.03


@pytest.mark.slow
@needs_odeint
def test_neither_gap_nor_bound_falls_where_weights_alternate_with_depth():
    # All residual functions are equal, as tanh is odd; yet the straight line between two of them passes through 0.
    x, gaps = states(4, 6), []
    first = rough_stack(1).blocks[0]
    for depth in (8, 24, 72):
        blocks = []
        for n in range(depth):
            block = copy.deepcopy(first)
            with torch.no_grad():
                for p in block.parameters():
                    p.mul_((-1) ** n)
            blocks.append(block)
        gaps.append(abyssal.limits.ode_gap(ResidualStack(blocks), x, tolerance=1e-6))
    smallest = min((g.distance[-1] / g.moved).min() for g in gaps)
    assert smallest > 0.5  # phi averages to a third of what it is at the knots
    for g in gaps:
        assert (g.distance <= g.stepwise).all()
    assert gaps[2].bound.mean() > 0.9 * gaps[0].bound.mean()


@pytest.mark.slow
@needs_odeint
def test_the_gap_of_independent_weights_does_not_fall_in_the_sdes_scaling():
    x, depths = states(2, 6), (16, 64)
    medians = []
    for depth in depths:
        stacks = [rough_stack(depth, 6, seed, depth**-0.5) for seed in range(16)]
        gaps = [(s(x) - NeuralOde(s).solve(x, tolerance=1e-4)[-1]).norm(dim=-1) / x.norm(dim=-1) for s in stacks]
        medians.append(torch.stack(gaps).mean(dim=1).median().item())
    # A power of -1/2, the SDE's own, would halve it, and -1 leave a quarter.
    assert medians[1] > 0.7 * medians[0] and medians[1] > 0.1


def test_power_iteration_finds_the_spectral_norm_of_the_jacobian():
    flow, x = NeuralOde(rough_stack(3, 7)), states(5, 7).double()
    field = lambda s: flow.velocity(1, 0.0, s)  # noqa: E731
    for state, norm in zip(x, _spectral_norms(field, x, states(5, 7, seed=1).double()), strict=True):
        exact = torch.linalg.matrix_norm(torch.func.jacrev(field)(state), ord=2).item()
        # Kuczynski and Wozniakowski 1992: the mean error of the square after 20 iterations is below 9 % here.
        assert 0.91 * exact < norm.item() <= exact * (1 + 1e-12)


class Branching(nn.Linear):
    """A residual function that looks at its values, which vmap cannot."""

    def forward(self, x):
        return super().forward(x).tanh() if x.norm() > 0 else x


@needs_odeint
def test_constants_are_the_same_for_functions_that_vmap_cannot_map():
    torch.manual_seed(0)
    branching = ResidualStack([Branching(4, 4) for _ in range(3)])
    plain = ResidualStack([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
    for a, b in zip(branching.blocks, plain.blocks, strict=True):
        b[0].load_state_dict(a.state_dict())
    a, b = (abyssal.limits.ode_gap(s, states(2, 4)) for s in (branching, plain))
    assert torch.allclose(a.lipschitz, b.lipschitz) and torch.allclose(a.acceleration, b.acceleration)
    with pytest.raises(RuntimeError):
        torch.func.vmap(branching.blocks[0])(torch.ones(2, 3, 4))
    looped = _over_intervals(lambda x: branching.blocks[0](x).detach(), torch.ones(2, 3, 4))
    assert looped.shape == (2, 3, 4)


@needs_odeint
def test_rigorous_constants_bound_the_estimated_ones():
    stack, x = smooth_stack(6, seed=5), states(4, 6)
    gap = abyssal.limits.ode_gap(stack, x)
    rigorous = rigorous_bound(stack, x)
    assert (gap.acceleration <= rigorous.acceleration).all()
    assert (gap.lipschitz <= rigorous.lipschitz).all()
    largest = max(
        (torch.linalg.matrix_norm(b.outer.weight, ord=2) * torch.linalg.matrix_norm(b.inner.weight, ord=2)).item()
        for b in stack.blocks
    )
    assert rigorous.lipschitz == pytest.approx(largest, rel=1e-6)


def test_closed_form_is_the_limit_of_the_recursion():
    slope, pull, depth = 1.3, 0.7, 100_000
    error = 0.0
    for _ in range(depth):
        error = (1 + slope / depth) * error + pull / (2 * depth**2)
    closed = euler_bound(torch.tensor(slope).double(), torch.tensor(pull).double(), 1.0, 1 / depth).item()
    assert error < closed and error == pytest.approx(closed, rel=1e-4)
    assert euler_bound(torch.tensor(0.0), torch.tensor(2.0), 3.0, 0.5).item() == pytest.approx(1.5)


@needs_odeint
def test_the_stack_is_left_as_it_was(tmp_path):
    stack = residual_mlp(3, 4)
    before = copy.deepcopy(stack.state_dict())
    gap = abyssal.limits.ode_gap(stack, states(2, 4))
    assert all(torch.equal(before[k], v) and v.dtype == torch.float32 for k, v in stack.state_dict().items())
    assert stack.training and all(p.grad is None for p in stack.parameters())
    assert "rigorous" in str(gap) and "step by step" in str(gap)
    assert gap.plot(tmp_path / "gap.png").stat().st_size > 10_000


def test_missing_torchdiffeq_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"abyssal\[ode\]"):
        abyssal.limits.ode_gap(residual_mlp(3, 4), states(2, 4))


def mixed():
    return ResidualStack([MLPBranch(3), MLPBranch(3, hidden=5)])


def broken():
    stack = residual_mlp(2, 3)
    with torch.no_grad():
        stack.blocks[1].inner.weight[0, 0] = math.nan
    return stack


@needs_odeint
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: abyssal.limits.ode("res5"), ValueError, "got 'res5'"),
        (lambda: abyssal.limits.ode("res3", 0), ValueError, "width has to be a whole number of at least 1"),
        (lambda: abyssal.limits.ode("res3", 8, "cubic"), ValueError, "cubic"),
        (lambda: abyssal.limits.ode("res3", 8, "fbm_path", hurst=1.0), ValueError, "hurst"),
        (lambda: abyssal.limits.ode("res3", 8).compare([10]), ValueError, "two different depths"),
        (
            lambda: abyssal.limits.ode("res3", 8).compare([10, 0]),
            ValueError,
            "depth has to be a whole number of at least 1",
        ),
        (lambda: abyssal.limits.ode("res3", 8).compare([9973, 9967]), ValueError, "GiB of weights"),
        (lambda: abyssal.limits.ode_gap(nn.Linear(3, 3), states(2, 3)), TypeError, "ResidualStack, got a Linear"),
        (lambda: abyssal.limits.ode_gap(mixed(), states(2, 3)), ValueError, "Residual function 1"),
        (lambda: abyssal.limits.ode_gap(broken(), states(2, 3)), ValueError, "Residual function 1 .* not finite"),
        (lambda: abyssal.limits.ode_gap(residual_mlp(2, 3, scale=-1.0), states(2, 3)), ValueError, "go forward"),
        (lambda: abyssal.limits.ode_gap(residual_mlp(2, 3), torch.ones(3)), ValueError, "samples along its first"),
        (lambda: abyssal.limits.ode_gap(residual_mlp(2, 3), torch.ones(2, 3).long()), TypeError, "floating"),
        (lambda: abyssal.limits.ode_gap(residual_mlp(2, 3), math.nan * torch.ones(2, 3)), ValueError, "finite"),
        (lambda: abyssal.limits.ode_gap(residual_mlp(2, 3), states(2, 3), tolerance=0), ValueError, "tolerance"),
        (
            lambda: abyssal.limits.ode_gap(ResidualStack([nn.Dropout(0.5), nn.Dropout(0.5)]), states(2, 3)),
            ValueError,
            r"eval\(\)",
        ),
        (lambda: rigorous_bound(ResidualStack([nn.Linear(3, 3)]), states(2, 3)), ValueError, "MLPBranch"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_only_euler_stacks_have_the_rigorous_bound():
    assert isinstance(residual_mlp(3, 3).scheme, Euler)
    with pytest.raises(ValueError, match="Euler"):
        rigorous_bound(residual_mlp(3, 3, scheme=Heun()), states(2, 3))
