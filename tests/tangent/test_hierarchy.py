"""K3, K4 and rates are what brute-force differentiation and finite differences say, on every architecture.

The slow twins: the kernel as a product of full Jacobians, the hierarchy as Jacobians of that contracted with gradients,
in float64, of the parameters as one vector.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacfwd, jacrev, jvp

from abyssal.nn import FullyConnectedNTK, LiLuoYipResNet
from abyssal.tangent.hierarchy.hierarchy import Hierarchy
from abyssal.tangent.hierarchy.tensors import KernelTensors


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sphere(n: int, d: int, seed: int = 0) -> torch.Tensor:
    x = randn(n, d, seed=seed)
    return x / x.norm(dim=-1, keepdim=True)


class Recurrent(nn.Module):
    """One wide dense layer used twice, with a bias: kept as factors of several uses."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(18, 18)
        self.head = nn.Linear(18, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Transposed(nn.Module):
    """A dense layer whose weight is used a second time, transposed, behind the hooks' back."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return (torch.tanh(self.inner(x)) @ self.inner.weight).sum(-1)


class PlainNorm(nn.LayerNorm):
    """Layer normalisation written out: torch's own has wrong third derivatives, and the twin must not."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


class TinyGPT(nn.Module):
    """Tied embedding, position, pre-norm attention and MLP; the logits at the last position."""

    def __init__(self, norm=nn.LayerNorm, vocabulary=4, length=3, d=3):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d)
        self.positions = nn.Parameter(torch.randn(length, d))
        self.norms = nn.ModuleList(norm(d) for _ in range(3))
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))
        self.unembed = nn.Linear(d, vocabulary, bias=False)
        self.unembed.weight = self.tokens.weight

    def forward(self, ids):
        h = self.tokens(ids) + self.positions
        q, k, v = (t.unsqueeze(1) for t in self.qkv(self.norms[0](h)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.squeeze(1))
        h = h + self.mlp(self.norms[1](h))
        return self.unembed(self.norms[2](h)[:, -1])[:, :2]


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.GroupNorm(1, 2),
        nn.GELU(),
        nn.Conv2d(2, 2, 3, stride=2),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(2, 1),
    ).eval()


def half_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 1))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


CASES = {
    "lly": (lambda: LiLuoYipResNet(4, 6, 3), sphere(4, 4)),
    "fully connected": (lambda: FullyConnectedNTK(4, 6, 3, "erf"), sphere(4, 4)),
    "biases, two outputs": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 2)), randn(3, 5)),
    "shared layer": (Recurrent, randn(3, 18)),
    "transposed weight": (Transposed, randn(4, 6)),
    "half frozen": (half_frozen, randn(4, 5)),
    "sequences through wide layers": (
        lambda: nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Flatten(), nn.Linear(40, 2)),
        randn(2, 2, 20),
    ),
    "conv, norms": (conv_net, randn(3, 1, 4, 4)),
    "gpt": (TinyGPT, torch.tensor([[0, 1, 2], [3, 3, 0]])),
}


def built(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    build, x = CASES[name]
    torch.manual_seed(1)
    model = build().double()
    with torch.no_grad():
        y = randn(*model(x).shape, seed=7)
    return model, x, y


class Brute:
    """The hierarchy of a model, by full Jacobians of the parameters as one vector."""

    def __init__(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor):
        if isinstance(model, TinyGPT):
            weights, model = model.state_dict(), TinyGPT(PlainNorm).double()
            model.load_state_dict(weights)
        self.model, self.x, self.y = model, x, y.reshape(-1)
        self.trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.theta = torch.cat([p.flatten() for p in self.trained.values()])

    def outputs(self, theta: torch.Tensor) -> torch.Tensor:
        parts = theta.split([p.numel() for p in self.trained.values()])
        named = {k: part.view(p.shape) for (k, p), part in zip(self.trained.items(), parts, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional_call(self.model, named, (self.x,)).reshape(-1)

    def jacobian(self, theta):
        return jacrev(self.outputs)(theta)

    def k2(self, theta):
        j = self.jacobian(theta)
        return j @ j.T

    def k3(self, theta):
        return jacfwd(self.k2)(theta) @ self.jacobian(theta).T

    def k4(self, theta):
        return jacfwd(self.k3)(theta) @ self.jacobian(theta).T

    def velocity(self, theta):
        return -self.jacobian(theta).T @ (self.outputs(theta) - self.y) / len(self.x)

    def along_flow(self, function):
        """`d/dt function(theta(t))` as a function of theta."""
        return lambda theta: jvp(function, (theta,), (self.velocity(theta),))[1]


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_those_of_brute_force_differentiation(name):
    model, x, y = built(name)
    h, brute = Hierarchy(model, x, y), Brute(model, x, y)
    assert_close(h.kernel(2), brute.k2(brute.theta), 1e-12)
    assert_close(h.kernel(3), brute.k3(brute.theta), 1e-10)
    if brute.theta.numel() <= 150:  # its time grows with the square of that; finite differences hold the others
        assert_close(h.kernel(4), brute.k4(brute.theta), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_rates_are_those_of_brute_force_differentiation(name):
    model, x, y = built(name)
    brute = Brute(model, x, y)
    function = brute.k2
    for found in Hierarchy(model, x, y).rates(3):
        function = brute.along_flow(function)
        assert_close(found, function(brute.theta), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_factors_change_nothing(name):
    model, x, y = built(name)
    fast, slow = Hierarchy(model, x, y), Hierarchy(model, x, y, factored=False)
    for order in (2, 3, 4):
        assert_close(fast.kernel(order), slow.kernel(order), 1e-12)
    for a, b in zip(fast.rates(3), slow.rates(3), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", [3, 4])
def test_each_kernel_is_the_derivative_of_the_one_below_by_finite_differences(name, order):
    """Central differences along the gradient of one output: their error falls as the square of the step."""
    model, x, y = built(name)
    h = Hierarchy(model, x, y)
    output = 1
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    at = {k: p.detach().clone() for k, p in parameters.items()}
    gradient = torch.autograd.grad(model(x).reshape(-1)[output], list(parameters.values()))
    length = sum(g.square().sum() for g in gradient).sqrt()

    def below(step: float) -> torch.Tensor:
        with torch.no_grad():
            for (k, p), g in zip(parameters.items(), gradient, strict=True):
                p.copy_(at[k] + step / length * g)
        return Hierarchy(model, x, y).kernel(order - 1)

    steps = torch.tensor([4e-2, 2e-2], dtype=torch.float64)
    errors = [(h.kernel(order)[..., output] - length * (below(s) - below(-s)) / (2 * s)).norm() for s in steps.tolist()]
    observed = torch.log(errors[0] / errors[1]) / torch.log(steps[0] / steps[1])
    # The next term of the error is of fourth order in the step: it moves this by the order of the step itself.
    assert abs(observed - 2) < 0.1


@pytest.mark.parametrize("name", ["lly", "biases, two outputs", "gpt"])
def test_the_rates_are_the_hierarchys_contracted_with_residuals(name):
    model, x, y = built(name)
    h = Hierarchy(model, x, y)
    with torch.no_grad():
        r = (model(x) - y).reshape(-1)
    n, k2, k3, k4 = len(x), *(h.kernel(order) for order in (2, 3, 4))
    first, second = h.rates(2)
    assert_close(first, -torch.einsum("abc,c->ab", k3, r) / n, 1e-12)
    expected = torch.einsum("abcd,c,d->ab", k4, r, r) + torch.einsum("abc,cd,d->ab", k3, k2, r)
    assert_close(second, expected / n**2, 1e-12)


def test_the_third_kernel_is_symmetric_in_its_first_two_arguments_only():
    h = Hierarchy(*built("lly"))
    k3, k4 = h.kernel(3), h.kernel(4)
    assert_close(k3, k3.transpose(0, 1), 1e-13)
    assert_close(k4, k4.transpose(0, 1), 1e-13)
    assert (k3 - k3.transpose(1, 2)).norm() > 0.1 * k3.norm()
    assert (k4 - k4.transpose(2, 3)).norm() > 0.01 * k4.norm()


def test_outputs_are_numbered_sample_by_sample():
    model, x, y = built("biases, two outputs")
    k2 = Hierarchy(model, x, y).kernel(2).view(3, 2, 3, 2)
    for j in range(2):
        single = Hierarchy(nn.Sequential(model, Pick(j)), x, y[:, j])
        assert_close(k2[:, j, :, j], single.kernel(2), 1e-13)


class Pick(nn.Module):
    """One output."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x):
        return x[:, self.index]


def test_a_wide_network_keeps_factors_and_a_reused_weight_does_not():
    wide = Hierarchy(LiLuoYipResNet(10, 32, 4), sphere(3, 10), randn(3))._model
    assert [site.name for site in wide.sites] == ["first.linear", *(f"body.steps.{i}.block.linear" for i in range(3))]
    assert wide.dense_size == 32  # the output layer
    model, x, y = built("transposed weight")
    assert Hierarchy(model, x, y)._model.sites == []


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_small_budget_gives_the_same_numbers_in_smaller_pieces(order):
    model, x = LiLuoYipResNet(6, 16, 3), sphere(7, 6)
    seen = []
    whole = Hierarchy(model, x, randn(7))
    small = Hierarchy(
        model,
        x,
        randn(7),
        budget={2: 250_000, 3: 250_000, 4: 600_000}[order],
        progress=lambda *event: seen.append(event),
    )
    assert_close(small.kernel(order), whole.kernel(order), 1e-13)
    if order > 2:
        assert len({done for phase, done, total in seen if phase == f"K{order}"}) > 2
    for a, b in zip(small.rates(2), whole.rates(2), strict=True):
        assert_close(a, b, 1e-13)


def test_tiles_of_hessian_products_give_the_same_fourth_kernel(monkeypatch):
    model, x, y = LiLuoYipResNet(6, 16, 3), sphere(5, 6), randn(5)
    whole = Hierarchy(model, x, y).kernel(4)
    monkeypatch.setattr(KernelTensors, "_tiles", lambda self: [slice(0, 2), slice(2, 4), slice(4, 5)])
    assert_close(Hierarchy(model, x, y).kernel(4), whole, 1e-13)


@pytest.mark.slow
def test_the_least_budget_that_an_error_names_works():
    model, x, y = LiLuoYipResNet(6, 16, 4), sphere(7, 6), randn(7)
    small = Hierarchy(model, x, y, budget=300_000)
    with pytest.raises(ValueError, match=r"K4 of N = 7 outputs needs about .* rates") as caught:
        small.kernel(4)
    least = float(re.search(r"about (\S+) bytes", str(caught.value))[1])
    assert Hierarchy(model, x, y, budget=1.05 * least).kernel(4).shape == (7, 7, 7, 7)  # two digits are shown
