"""Parameters that torch.func cuts off from a model without a word."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from abyssal.tangent.empirical import ntk
from abyssal.tangent.hierarchy import Hierarchy
from abyssal.tangent.operators import kernel_operator


class Sliced(nn.Module):
    """Every second matrix of a ParameterList, taken by a slice, which `functional_call` cuts off from gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(4))
        self.read_out = nn.Linear(4, 2)

    def forward(self, x):
        for matrix in self.matrices[::2]:
            x = x + torch.tanh(x @ matrix)
        return self.read_out(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Sliced().double()


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def slow_kernel(model):
    rows = []
    for x in X:
        for output in model(x[None])[0]:
            grads = torch.autograd.grad(output, list(model.parameters()), retain_graph=True, allow_unused=True)
            pairs = zip(grads, model.parameters(), strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    jacobian = torch.stack(rows).view(len(X), 2, -1)
    return torch.einsum("aip,bip->ab", jacobian, jacobian)


def test_the_kernel_is_right_where_a_slice_of_a_parameter_list_is_used(model):
    torch.testing.assert_close(ntk(model, X), slow_kernel(model), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use", [lambda m: kernel_operator(m, X), lambda m: Hierarchy(m, X, torch.zeros(5, 2))])
def test_what_has_to_hand_parameters_over_refuses_and_names_them(model, use):
    with pytest.raises(ValueError, match=r"does not reach every use of matrices\.0, matrices\.2 .*ParameterList"):
        use(model)


@pytest.mark.parametrize("use", [lambda m: kernel_operator(m, X), lambda m: Hierarchy(m, X, torch.zeros(5, 2))])
def test_entries_taken_one_by_one_are_fine(model, use):
    model.matrices[::1]  # slicing outside of a forward pass harms nobody
    model.forward = lambda x: model.read_out(x + torch.tanh(x @ model.matrices[0]) + x @ model.matrices[2])
    use(model)


def test_hooks_that_a_user_registered_on_parameters_are_not_called(model):
    called = []
    for p in model.parameters():
        p.register_hook(called.append)
    ntk(model, X)
    model.forward = lambda x: model.read_out(x + torch.tanh(x @ model.matrices[0]))
    kernel_operator(model, X) @ torch.ones(5)
    Hierarchy(model, X, torch.zeros(5, 2)).kernel(2)
    assert not called
    model(X).sum().backward()
    assert called  # and they are there again
