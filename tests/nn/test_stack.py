"""ResidualStack: the network of the papers, its trajectory, its gradients, and what a module must survive."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from abyssal.nn import (
    ConvBranch,
    DigitsResNet,
    Euler,
    Heun,
    MLPBranch,
    ResidualStack,
    residual_conv,
    residual_mlp,
)

SCHEMES = [Euler(), Heun()]


class Conditioned(nn.Module):
    """A residual function that takes a positional and a keyword argument beside the state."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, shift, *, gain):
        return gain * torch.tanh(self.linear(x) + shift)


def state(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def obvious(stack: ResidualStack, x: torch.Tensor) -> list[torch.Tensor]:
    """All states, by the formulas and loops over the residual functions; the twin of `trajectory`."""
    f = stack.blocks
    steps = len(stack)
    h = [stack.scale] * steps if isinstance(stack.scale, float) else stack.scale
    states = [x]
    for n in range(steps):
        if stack.scheme == Euler():
            x = x + h[n] * f[n](x)
        else:
            x = x + h[n] / 2 * (f[n](x) + f[n + 1](x + h[n] * f[n](x)))
        states.append(x)
    return states


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    depth=st.integers(2, 7),
    width=st.integers(1, 6),
    batch=st.integers(0, 4),
    per_step=st.booleans(),
)
def test_forward_and_trajectory_agree_with_the_obvious_loops(scheme, depth, width, batch, per_step):
    steps = depth - scheme.functions_per_step + 1
    scale = [1 / (n + 2) for n in range(steps)] if per_step else None
    stack = residual_mlp(depth, width, scheme=scheme, scale=scale).double()
    x = state(batch, width)
    expected = torch.stack(obvious(stack, x))
    torch.testing.assert_close(stack.trajectory(x), expected)
    torch.testing.assert_close(stack(x), expected[-1])
    assert stack.trajectory(x).shape == (steps + 1, batch, width)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_of_output_and_trajectory_are_right(scheme):
    torch.manual_seed(0)
    stack = residual_mlp(4, 3, scheme=scheme).double()
    x = state(2, 3).requires_grad_()
    names, values = zip(*stack.named_parameters(), strict=True)

    def call(method):
        return lambda x, *p: torch.func.functional_call(_Method(stack, method), _prefixed(names, p), (x,))

    assert torch.autograd.gradcheck(call("forward"), (x, *values))
    assert torch.autograd.gradcheck(call("trajectory"), (x, *values))


class _Method(nn.Module):
    """Calls one method of a stack, so that `functional_call` can reach it."""

    def __init__(self, stack, method):
        super().__init__()
        self.stack, self.method = stack, method

    def forward(self, x):
        return getattr(self.stack, self.method)(x)


def _prefixed(names, values):
    return {f"stack.{name}": value for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_equal_those_of_the_obvious_loops(scheme):
    torch.manual_seed(0)
    stack = residual_mlp(5, 4, scheme=scheme).double()
    parameters = list(stack.parameters())
    x = state(3, 4)
    ours = torch.autograd.grad(stack(x).square().sum(), parameters)
    theirs = torch.autograd.grad(obvious(stack, x)[-1].square().sum(), parameters)
    torch.testing.assert_close(ours, theirs)


def test_each_step_is_handed_the_very_tensor_that_the_one_before_returned():
    """What run-time chains of `abyssal.reconstruct` rest on."""
    stack = residual_mlp(4, 3)
    seen = []
    for step in stack.steps:
        step.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    x = torch.randn(2, 3)
    for call in (stack, stack.trajectory):
        result = call(x)
        assert seen[0][0] is x
        assert all(seen[n][1] is seen[n + 1][0] for n in range(3))
        assert result.shape[-2:] == (2, 3)
        seen.clear()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_further_arguments_reach_every_residual_function(scheme):
    blocks = [Conditioned(3).double() for _ in range(3)]
    stack = ResidualStack(blocks, scheme)
    x, shift = state(2, 3), torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    stack(x, shift, gain=2.0).sum().backward()
    assert shift.grad is not None and shift.grad.abs().min() > 0
    assert torch.equal(stack(x, shift, gain=0.0), x)
    assert stack.trajectory(x, shift, gain=2.0).shape == (len(stack) + 1, 2, 3)
    step = stack.steps[0]
    back = step.reverse_step(step(x, shift, gain=1e-3), shift, gain=1e-3)
    # h gain = 5e-4 at most: the error of a reverse step is of its square.
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_state_dict_round_trip(scheme):
    torch.manual_seed(0)
    source, target = (residual_mlp(4, 3, scheme=scheme) for _ in range(2))
    x = torch.randn(2, 3)
    assert not torch.equal(source(x), target(x))
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer))
    assert torch.equal(source(x), target(x))


def test_heun_names_shared_parameters_once_and_stores_them_under_both_names():
    stack = residual_mlp(3, 2, scheme=Heun())
    keys = set(stack.state_dict())
    assert {"steps.0.second.inner.weight", "steps.1.first.inner.weight"} <= keys
    assert len(keys) == 2 * 2 * 4
    assert len(list(stack.parameters())) == 3 * 4
    assert stack.steps[0].second is stack.steps[1].first


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_equal_and_independent(scheme, copied):
    stack = residual_mlp(4, 3, scheme=scheme)
    twin = copied(stack)
    x = torch.randn(2, 3)
    assert torch.equal(stack(x), twin(x))
    assert (twin.scheme, twin.scale) == (stack.scheme, stack.scale)
    assert len(list(twin.parameters())) == len(list(stack.parameters()))  # sharing survives
    twin(x).sum().backward()
    assert all(p.grad is None for p in stack.parameters())
    assert all(p.grad is not None for p in twin.parameters())


def test_tied_residual_functions_share_their_gradient():
    f = MLPBranch(3).double()
    tied = ResidualStack([f] * 5)
    assert len(list(tied.parameters())) == 4
    free = ResidualStack([copy.deepcopy(f) for _ in range(5)])
    x = state(2, 3)
    tied(x).sum().backward()
    free(x).sum().backward()
    torch.testing.assert_close(f.inner.weight.grad, sum(b.inner.weight.grad for b in free.blocks))


def test_blocks_follow_a_replaced_residual_function():
    stack = residual_mlp(3, 2)
    other = MLPBranch(2)
    stack.steps[1].block = other
    assert stack.blocks[1] is other


def test_scale_is_given_back_as_one_number_or_per_step():
    assert residual_mlp(4, 2).scale == 0.25
    assert residual_mlp(4, 2, scheme=Heun()).scale == 1 / 3
    assert residual_mlp(4, 2, scale=0.5).scale == 0.5
    assert residual_mlp(3, 2, scale=[0.1, 0.2, 0.3]).scale == (0.1, 0.2, 0.3)


def test_repr_says_scheme_steps_and_scale():
    assert "scheme=Euler(), steps=8, scale=0.125" in repr(residual_mlp(8, 2))
    assert "scheme=Heun(), steps=2, scale=per step" in repr(residual_mlp(3, 2, scheme=Heun(), scale=[1, 2]))
    assert len(repr(residual_mlp(500, 2)).splitlines()) < 20  # equal steps fold into one line


def test_a_scheme_class_in_place_of_an_instance_is_refused():
    with pytest.raises(TypeError, match=r"such as Euler\(\)"):
        ResidualStack([MLPBranch(2)], Euler)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_conv_stack_keeps_images(scheme):
    stack = residual_conv(3, 8, groups=4, scheme=scheme)
    assert isinstance(stack.blocks[0], ConvBranch)
    assert stack(torch.randn(2, 8, 5, 7)).shape == (2, 8, 5, 7)


@pytest.mark.slow
@pytest.mark.parametrize("branch", ["mlp", "conv"])
def test_digits_network_learns_ten_images(branch):
    torch.manual_seed(0)
    model = DigitsResNet(16, width=16, branch=branch)
    images, labels = torch.rand(10, 1, 8, 8), torch.arange(10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert model(images).argmax(1).equal(labels)


def test_digits_network_refuses_an_unknown_branch():
    with pytest.raises(ValueError, match="one of mlp, conv, got 'rnn'"):
        DigitsResNet(2, branch="rnn")
