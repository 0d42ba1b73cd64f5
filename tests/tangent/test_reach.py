"""Parameters that torch.func cuts off from a model without a word."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from abyssal.tangent.empirical.ntk import ntk
from abyssal.tangent.hierarchy.hierarchy import Hierarchy
from abyssal.tangent.operator.kernel import kernel_operator


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


class Gated(Sliced):
    """Takes the slice for samples whose first entry is positive, and nothing of it for others."""

    def forward(self, x):
        gate = (x[:, :1] > 0).to(x)
        return self.read_out(x + gate * sum(torch.tanh(x @ matrix) for matrix in self.matrices[1:]))


@pytest.mark.parametrize("positive", [0, 4])
def test_a_use_that_only_some_samples_show_is_found_whichever_they_are(positive):
    torch.manual_seed(0)
    model = Gated().double()
    x = X.clone()
    x[:, 0] = -x[:, 0].abs()
    x[positive, 0] *= -1
    rows = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(
                        torch.autograd.grad(model(s[None])[0, a], list(model.parameters()), allow_unused=True),
                        model.parameters(),
                        strict=True,
                    )
                ]
            )
            for s in x
            for a in range(2)
        ]
    ).view(5, 2, -1)
    torch.testing.assert_close(ntk(model, x), torch.einsum("aip,bip->ab", rows, rows), rtol=1e-12, atol=1e-12)
    for use in (lambda: kernel_operator(model, x), lambda: Hierarchy(model, x, torch.zeros(5, 2))):
        with pytest.raises(ValueError, match="does not reach every use"):
            use()


class Stopped(nn.Module):
    """For some samples, a part without gradients, at which forward mode does not stop."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.read_out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        with torch.no_grad():
            gate = self.start(x) * (x[:, :1] > 0)
        return self.read_out(torch.tanh(self.start(x)) * (1 + gate))


@pytest.mark.parametrize("outputs", ["trace", 0])
def test_modes_that_disagree_on_later_samples_alone_are_told_apart(outputs):
    torch.manual_seed(0)
    model = Stopped().double()
    x = X.clone()
    x[:, 0] = torch.tensor([-1.0, -2.0, -0.5, 1.0, 2.0])
    operator = kernel_operator(model, x, outputs=outputs)
    assert operator.jacobian.mode == "double backward"
    torch.testing.assert_close(operator.dense(), ntk(model, x, outputs=outputs), rtol=1e-12, atol=1e-12)
