"""Orders of convergence: how the gradient error falls with depth (float64, against exact autograd)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import abyssal
from abyssal.nn import Heun, ResidualStack
from toys.blocks import relative

pytestmark = pytest.mark.filterwarnings("ignore::abyssal.DriftWarning")
WIDTH = 24
DEPTHS = (16, 64, 256)


class Tanh(nn.Module):
    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first.T) @ self.second.T


def rough_stack(depth: int) -> ResidualStack:
    """`x + f/N` with independent Gaussian weights: no smoothness in depth at all."""
    generator = torch.Generator().manual_seed(depth)
    draw = lambda: torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / math.sqrt(WIDTH)  # noqa: E731
    return ResidualStack([Tanh(draw(), draw()) for _ in range(depth)])


def smooth_stack(depth: int) -> ResidualStack:
    """Heun's scheme, weights smooth in depth: `A + sin(2 pi s) B + cos(2 pi s) C` at s = n/N."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(2, 3, WIDTH, WIDTH, generator=generator, dtype=torch.float64) / math.sqrt(3 * WIDTH)

    def weight(i: int, s: float) -> Tensor:
        a, b, c = modes[i]
        return a + math.sin(2 * math.pi * s) * b + math.cos(2 * math.pi * s) * c

    return ResidualStack([Tanh(weight(0, n / depth), weight(1, n / depth)) for n in range(depth + 1)], scheme=Heun())


def gradient_error(stack: ResidualStack, policy: abyssal.Policy) -> float:
    x = torch.randn(16, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradients() -> Tensor:
        stack.zero_grad()
        stack(x).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in stack.parameters()])

    true = gradients()
    abyssal.reconstruct(stack, policy)
    found = gradients()
    abyssal.release(stack)
    return relative(found, true)


def slope(errors: list[float], depths: tuple[int, ...] = DEPTHS) -> float:
    x = torch.tensor(depths, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "steepest"),
    [
        (abyssal.PaperAdjoint(), -1.0),
        (abyssal.Reverse(refine=0), -1.0),
        (abyssal.Reverse(refine=1), -2.0),
        (abyssal.Reverse(refine=2), -3.0),
    ],
    ids=str,
)
def test_gradient_error_falls_with_the_order_of_the_policy(policy: abyssal.Policy, steepest: float) -> None:
    assert slope([gradient_error(rough_stack(depth), policy) for depth in DEPTHS]) <= steepest


@pytest.mark.slow
def test_free_refinement_beats_the_papers_adjoint_at_the_same_cost() -> None:
    ratio = [
        gradient_error(rough_stack(n), abyssal.PaperAdjoint()) / gradient_error(rough_stack(n), abyssal.Reverse(1))
        for n in DEPTHS
    ]
    assert ratio[0] > 2 and ratio[2] > 8 and ratio[2] > ratio[0]  # it gains one order


@pytest.mark.slow
def test_heun_on_smooth_weights_gains_one_order_by_the_free_refinement() -> None:
    depths = (32, 64, 128, 256)
    without = [gradient_error(smooth_stack(n), abyssal.PaperAdjoint()) for n in depths]
    with_it = [gradient_error(smooth_stack(n), abyssal.Reverse(refine=1)) for n in depths]
    assert slope(without, depths) <= -2.9  # the paper proves 2; a step of even order cancels its own leading term
    assert slope(with_it, depths) <= -3.9
    assert with_it[-1] < 1e-9


def test_in_float32_deep_reversal_reaches_the_precision_of_the_arithmetic() -> None:
    stack = rough_stack(256).float()
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(3))

    def gradients() -> Tensor:
        stack.zero_grad()
        stack(x).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in stack.parameters()])

    true = gradients()
    abyssal.reconstruct(stack, abyssal.Reverse(refine=2))
    # 256 subtractions, each rounding by at most 2^-24 of the state, add up to at most 256 * 2^-24 = 1.5e-5.
    assert relative(gradients(), true) < 256 * 2**-24
