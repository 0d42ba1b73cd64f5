"""The papers' networks compute what their formulas say, and reconstruct, untie and deepen as stacks do."""

from __future__ import annotations

import math

import pytest
import torch

import abyssal
from abyssal.nn import (
    Euler,
    Heun,
    PreActivationBranch,
    PreActivationResNet,
    ReLUBranch,
    ReLUResNet,
    deepen,
    linear_resnet,
    refinement,
    untie,
)

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_linear_network_is_the_product_of_its_matrices():
    stack = linear_resnet(5, 3, std=1.0, generator=seeded()).double()
    product = torch.eye(3, dtype=DOUBLE)
    for function in stack.blocks:
        product = (torch.eye(3, dtype=DOUBLE) + function.weight / 5) @ product
    x = torch.randn(4, 3, dtype=DOUBLE, generator=seeded(1))
    torch.testing.assert_close(stack(x), x @ product.T)


def test_the_linear_network_starts_from_the_identity_or_with_the_spread_asked_for():
    x = torch.randn(4, 3)
    assert torch.equal(linear_resnet(4, 3)(x), x)
    weights = torch.stack([f.weight.detach() for f in linear_resnet(64, 16, std=0.5, generator=seeded()).blocks])
    # 16,384 normal entries: their standard deviation is known to 1/sqrt(2 * 16384) = 0.55 %, four times that.
    assert float(weights.std()) * math.sqrt(16) == pytest.approx(0.5, rel=0.022)


@pytest.mark.parametrize("branch", ["res-1", "res-3"])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_relu_networks_are_the_papers_formulas(branch, beta):
    torch.manual_seed(0)
    net = ReLUResNet(7, 5, depth=6, out_features=2, branch=branch, beta=beta).double()
    x = torch.rand(3, 7, dtype=DOUBLE)
    h = x @ net.stem.weight.T
    for f in net.stack.blocks:
        u = h if branch == "res-1" else h @ f.inner.weight.T
        h = h + 6**-beta * u.clamp(min=0) @ f.outer.weight.T
    torch.testing.assert_close(net(x), h @ net.head.weight.T)


@pytest.mark.slow
def test_res3_with_independent_weights_grows_as_computed_exactly():
    """SCIENCE.md: the mean of |h_L|^2/|h_0|^2 is (1 + L^-2beta / 2)^L."""
    depth, ratios = 16, []
    for seed in range(300):
        net = ReLUResNet(8, 20, depth, beta=0.5, generator=seeded(seed))
        with torch.no_grad():
            h = net.stem(torch.rand(1, 8, generator=seeded(1000 + seed)))
            ratios.append(float(net.stack(h).square().sum() / h.square().sum()))
    mean, error = torch.tensor(ratios).mean(), torch.tensor(ratios).std() / math.sqrt(len(ratios))
    assert abs(float(mean) - (1 + 0.5 / depth) ** depth) < 4 * float(error)


def test_entries_are_uniform_with_variance_one_over_width():
    weight = ReLUBranch(60, generator=seeded()).inner.weight
    assert float(weight.abs().max()) <= math.sqrt(3 / 60)
    # The variance of 3,600 uniform entries is known to sqrt(0.8/3600) = 1.5 %; four times that.
    assert float(weight.var()) * 60 == pytest.approx(1, rel=0.06)


@pytest.mark.parametrize("scheme", [Euler(), Heun()], ids=str)
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_tied_image_networks_are_untied_and_deepened(scheme, norm):
    torch.manual_seed(0)
    sizes = {"channels": (8, 16), "scheme": scheme, "norm": norm, "image_channels": 1}
    tied = PreActivationResNet(4, tied=True, **sizes).eval()
    images = torch.randn(2, 1, 8, 8)
    free = untie(tied, batch=images)
    assert refinement(free).change == 0
    assert len(refinement(free).chains) == 2
    fresh = PreActivationResNet(4, **sizes)
    assert list(free.state_dict()) == list(fresh.state_dict())
    fresh.load_state_dict(free.state_dict())
    assert torch.equal(fresh.eval()(images), tied(images))
    deep = deepen(free, 2, batch=images)
    assert [len(stage.blocks) for stage in deep.stages] == [8, 8] if scheme == Euler() else [7, 7]
    assert refinement(deep).change < 0.1


def test_the_residual_function_is_norm_activation_convolution_twice():
    torch.manual_seed(0)
    f = PreActivationBranch(8, "batch").eval()
    conv = torch.nn.functional.conv2d
    x = torch.randn(2, 8, 4, 4)
    scale = 1 / math.sqrt(1 + 1e-5)  # fresh running statistics: mean 0, variance 1
    hidden = conv(torch.relu(x * scale), f.inner.weight, padding=1)
    torch.testing.assert_close(f(x), conv(torch.relu(hidden * scale), f.outer.weight, padding=1))


@pytest.mark.parametrize("scheme", [Euler(), Heun()], ids=str)
def test_image_networks_train_without_their_states(scheme):
    torch.manual_seed(0)
    net = PreActivationResNet(32, (8,), norm="group", activation="tanh", scheme=scheme, image_channels=1).double()
    images = torch.randn(2, 1, 6, 6, dtype=DOUBLE)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(net(images).square().sum(), list(net.parameters()))])
    abyssal.reconstruct(net, abyssal.Reverse(2))
    ours = torch.cat([g.flatten() for g in torch.autograd.grad(net(images).square().sum(), list(net.parameters()))])
    assert float((ours - exact).norm() / exact.norm()) < 1e-3
    reversed_blocks = [b for b in abyssal.certificate(net).blocks if "Reverse" in str(b.policy)]
    assert len(reversed_blocks) == (32 if scheme == Euler() else 31)


def test_wrong_sizes_and_names_are_refused():
    for call in (lambda: linear_resnet(0, 3), lambda: ReLUResNet(3, 0, 2), lambda: PreActivationResNet(2, (8, -1))):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            call()
    with pytest.raises(ValueError, match="one of res-1, res-3, got 'res-2'"):
        ReLUResNet(3, 3, 2, branch="res-2")
    with pytest.raises(ValueError, match="one of batch, group, none, got 'layer'"):
        PreActivationResNet(2, norm="layer")
    with pytest.raises(ValueError, match="activation has to be one of"):
        PreActivationBranch(8, activation="sine")
    with pytest.raises(ValueError, match="beta"):
        ReLUResNet(3, 3, 2, beta=math.nan)
    with pytest.raises(ValueError, match="std"):
        linear_resnet(2, 2, std=-1)
