"""Restore on demand: in whatever order the backward pass asks, and in O(N) block evaluations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import abyssal
from toys.backward_orders import (
    autograd_grad,
    backward_within_backward,
    gradient_of_a_middle_state,
    intermediate_losses_bottom_up,
    intermediate_losses_top_down,
    retained_twice,
    second_order,
)
from toys.blocks import TO_ROUNDING, Net, build, data, flat_gradients, relative, same_gradients, twins

POLICIES = [abyssal.Keep(), TO_ROUNDING]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(
    "step",
    [
        retained_twice,
        autograd_grad,
        second_order,
        intermediate_losses_bottom_up,
        intermediate_losses_top_down,
        gradient_of_a_middle_state,
        backward_within_backward,
    ],
)
def test_gradients_are_those_without_us(step: Callable[[nn.Module], Tensor], policy: abyssal.Policy) -> None:
    same_gradients(build(), policy, step)


def evaluations(model: Net) -> int:
    return sum(block.evaluations for block in model.blocks)


def count(model: Net, step: Callable[[Net], Tensor]) -> int:
    before = evaluations(model)
    step(model)
    return evaluations(model) - before


@pytest.mark.parametrize("refine", [0, 1, 2])
def test_an_ordinary_step_evaluates_each_block_k_plus_2_times(refine: int) -> None:
    model = build(depth=64)
    abyssal.reconstruct(model, abyssal.Reverse(refine), blocks=list(model.blocks), tolerance=1.0)

    def step(net: Net) -> Tensor:
        net(data()).sum().backward()
        return torch.empty(0)

    # Forward and gradient for all; refinements for all but the last, whose exact input is at hand.
    assert count(model, step) == 64 * 2 + 63 * refine


def test_double_backward_at_depth_64_takes_order_n_evaluations() -> None:
    model = build(depth=64)
    plain, ours = twins(model, abyssal.Reverse(refine=3), tolerance=1.0)
    assert relative(second_order(ours), second_order(plain)) < 1e-3  # 64 blocks of 0.1: Reverse(3)'s own error
    per_block = count(ours, second_order) / 64
    # One forward; two backward passes, each with 3 refinements and a gradient; one more evaluation each where the
    # second pass asks first to last and the whole segment is restored ahead of its turn.
    assert per_block <= 1 + 2 * (3 + 1 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [abyssal.Keep(), abyssal.Reverse(refine=4)], ids=str)
def test_retained_graph_at_depth_1100(policy: abyssal.Policy) -> None:
    model = build(depth=1100)
    for block in model.blocks:
        block.scale = 1 / 1100
    plain, ours = twins(model, policy)
    assert relative(retained_twice(ours), retained_twice(plain)) < 1e-11
    assert count(ours, retained_twice) <= 1100 * (1 + 2 * (1 + 4))


@pytest.mark.slow
def test_the_lowest_block_first_at_depth_1100_is_a_loop_not_a_recursion() -> None:
    model = build(depth=1100)
    for block in model.blocks:
        block.scale = 1 / 1100
    plain, ours = twins(model, abyssal.Reverse(refine=2))

    def lowest_first(net: Net) -> Tensor:
        h, states = net.stem(data()), []
        for block in net.blocks:
            h = block(h)
            states.append(h)
        net.zero_grad()
        states[0].square().sum().backward(retain_graph=True)
        states[-1].square().sum().backward()
        return flat_gradients(net)

    assert relative(lowest_first(ours), lowest_first(plain)) < 1e-9
    assert count(ours, lowest_first) <= 1100 * (1 + 2 * (2 + 1 + 1))


@pytest.mark.slow
def test_a_graph_of_depth_20000_is_freed_without_recursion() -> None:
    block = nn.Linear(2, 2)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-5 * torch.tanh(self.block(x))

    one = Tied()
    abyssal.reconstruct(one, abyssal.Reverse(0), blocks=one)
    h = torch.randn(1, 2)
    for _ in range(20_000):
        h = one(h)
    del h
