"""Initialisers of the weights of all depths: their variance at every depth, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from abyssal.nn import residual_conv, residual_mlp
from abyssal.scaling import init
from abyssal.weights.families import FractionalMotion, FractionalNoise, GaussianProcess, Iid

INITIALISERS = {
    "iid normal": (lambda w, g: init.iid_(w, generator=g), Iid("normal")),
    "iid uniform": (lambda w, g: init.iid_(w, "uniform", generator=g), Iid("uniform")),
    "smooth": (lambda w, g: init.gaussian_process_(w, generator=g), GaussianProcess()),
    "matern values": (
        lambda w, g: init.gaussian_process_(w, "matern32", 0.3, False, g),
        GaussianProcess("matern32", 0.3, False),
    ),
    "noise": (lambda w, g: init.fractional_noise_(w, 0.8, g), FractionalNoise(0.8)),
    "motion": (lambda w, g: init.fractional_motion_(w, 0.3, g), FractionalMotion(0.3)),
}
each_initialiser = pytest.mark.parametrize("name", INITIALISERS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fill(name: str, weights: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return INITIALISERS[name][0](weights, seeded(seed))


@each_initialiser
@pytest.mark.parametrize("shape", [(40, 40), (16, 10, 3, 3)], ids=["dense", "convolution"])
def test_weights_have_variance_one_over_fan_in_at_every_depth(name, shape):
    depth, entries = 30, math.prod(shape)
    weights = fill(name, torch.empty(depth, *shape, dtype=torch.float64))
    variance = INITIALISERS[name][1].covariance(depth).diagonal() / math.prod(shape[1:])
    measured = weights.flatten(1).square().mean(1)
    # The mean square of independent Gaussian entries has relative error sqrt(2 / entries); 30 depths at 4 of them.
    assert ((measured / variance - 1).abs() < 4 * math.sqrt(2 / entries)).all()


@each_initialiser
def test_weights_are_the_familys_paths(name):
    """The twin: sample the family, divide by sqrt(fan_in)."""
    weights = fill(name, torch.empty(9, 4, 6, dtype=torch.float64))
    paths = INITIALISERS[name][1].sample(9, 24, seeded(), dtype=torch.float64)
    torch.testing.assert_close(weights, paths.view(9, 4, 6) / math.sqrt(6), rtol=1e-15, atol=0)


@each_initialiser
def test_it_works_in_place_without_gradient_and_returns_what_it_was_given(name):
    weights = torch.zeros(8, 3, 5, requires_grad=True)
    assert fill(name, weights) is weights
    assert weights.is_leaf
    assert weights.grad_fn is None
    assert bool((weights != 0).all())


@each_initialiser
def test_one_seed_gives_one_initialisation(name):
    first, second, other = (fill(name, torch.empty(8, 3, 5), seed) for seed in (4, 4, 5))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@each_initialiser
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_is_the_rounding_of_float64(name, dtype):
    exact = fill(name, torch.empty(8, 3, 5, dtype=torch.float64))
    assert torch.equal(fill(name, torch.empty(8, 3, 5, dtype=dtype)), exact.to(dtype))


@each_initialiser
@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.zeros(8, 5, 3).transpose(1, 2),
        lambda: torch.zeros(3, 5, 8).permute(2, 0, 1),
        lambda: torch.zeros(16, 3, 5)[::2],
        lambda: torch.zeros(8, 3, 10)[:, :, 1::2],
    ],
    ids=["transposed", "depth last", "every other block", "sliced"],
)
def test_views_are_filled_as_contiguous_tensors_are(name, view):
    weights = view()
    fill(name, weights)
    assert torch.equal(weights, fill(name, torch.empty(8, 3, 5)))


def test_a_view_leaves_the_entries_beside_it_alone():
    whole = torch.zeros(16, 3, 5)
    init.fractional_noise_(whole[::2], 0.7, seeded())
    assert bool((whole[1::2] == 0).all())
    assert bool((whole[::2] != 0).all())


@each_initialiser
def test_nothing_to_fill_is_left_alone(name):
    for shape in ((0, 3, 3), (4, 0, 3), (4, 3, 0)):
        assert fill(name, torch.empty(*shape)).numel() == 0
    assert fill(name, torch.empty(4, 3, 3, device="meta")).is_meta


@each_initialiser
def test_wrong_weights_are_refused_before_they_are_touched(name):
    flat = torch.zeros(40, 40)
    with pytest.raises(ValueError, match=r"\[depth, out, in, ...\], got shape \[40, 40\].*first dimension is depth"):
        fill(name, flat)
    assert bool((flat == 0).all())
    with pytest.raises(ValueError, match="share memory"):
        fill(name, torch.zeros(1, 3, 3).expand(5, 3, 3))
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        fill(name, torch.zeros(5, 3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="got a list"):
        fill(name, [torch.zeros(3, 3)])


@pytest.mark.parametrize("hurst", [0.0, 1.0, math.nan])
@pytest.mark.parametrize("initialiser", [init.fractional_noise_, init.fractional_motion_])
def test_a_hurst_index_outside_of_0_to_1_is_refused_before_work(initialiser, hurst):
    weights = torch.zeros(5, 3, 3)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        initialiser(weights, hurst)
    assert bool((weights == 0).all())


def test_fill_makes_paths_of_weights_zeros_of_biases_and_leaves_gains():
    stack = residual_conv(12, 8)
    for block in stack.blocks:
        nn.init.constant_(block.inner_norm.weight, 3.0)
        nn.init.constant_(block.inner_norm.bias, 3.0)
    assert init.fill_(stack.blocks, FractionalNoise(0.9), seeded()) is not None
    weights = torch.stack([block.inner.weight.detach() for block in stack.blocks])
    paths = FractionalNoise(0.9).sample(12, 8 * 8 * 9, seeded(), dtype=torch.float64) / math.sqrt(8 * 9)
    assert torch.equal(weights, paths.float().view(12, 8, 8, 3, 3))
    outer = torch.stack([block.outer.weight.detach() for block in stack.blocks])
    assert not torch.equal(weights, outer)
    for block in stack.blocks:
        assert bool((block.inner_norm.weight == 3).all())
        assert bool((block.inner_norm.bias == 0).all())


def test_fill_reaches_parameters_that_are_not_contiguous_and_of_low_precision():
    blocks = [nn.Linear(4, 6, dtype=torch.bfloat16) for _ in range(5)]
    for block in blocks[::2]:
        block.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16).T)
    init.fill_(blocks, Iid("normal"), seeded())
    paths = Iid("normal").sample(5, 24, seeded(), dtype=torch.float64) / 2
    assert torch.equal(torch.stack([block.weight.detach() for block in blocks]), paths.bfloat16().view(5, 6, 4))


def test_fill_of_large_blocks_is_the_same_in_many_pieces(monkeypatch):
    whole, pieces = residual_mlp(6, 9), residual_mlp(6, 9)
    init.fill_(whole.blocks, FractionalNoise(0.5), seeded())
    assert len(list(FractionalNoise(0.5).blocks(6, 81, seeded()))) == 1
    # Smaller pieces draw in another order, so the law and not the numbers must agree: every entry is written.
    monkeypatch.setattr("abyssal.weights.families.WORKSPACE", 2000)
    for block in pieces.blocks:
        nn.init.constant_(block.inner.weight, math.nan)
    init.fill_(pieces.blocks, FractionalNoise(0.5), seeded())
    assert all(torch.isfinite(p).all() for p in pieces.parameters())


def test_fill_refuses_blocks_that_are_no_path_and_changes_nothing():
    shared = nn.Linear(3, 3)
    before = shared.weight.clone()
    with pytest.raises(ValueError, match=r"'weight' of block 1 is also 'weight' of block 0: a tied weight"):
        init.fill_([shared, shared], Iid())
    tied = nn.Linear(3, 3, bias=False)
    tied.weight = shared.weight
    with pytest.raises(ValueError, match="tied weight"):
        init.fill_([nn.Linear(3, 3, bias=False), tied, nn.Sequential(tied)[0]], Iid())
    with pytest.raises(ValueError, match="Block 1 has parameters"):
        init.fill_([shared, nn.Linear(3, 4)], Iid())
    assert torch.equal(shared.weight, before)
    with pytest.raises(TypeError, match="family has to be a Family"):
        init.fill_([shared], "iid")  # type: ignore[arg-type]
    assert init.fill_([], Iid()) == []


def test_a_weight_tied_within_a_block_follows_one_path():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

    blocks = [Twice() for _ in range(4)]
    init.fill_(blocks, Iid("normal"), seeded())
    weights = torch.stack([block.two.weight.detach() for block in blocks]).double()
    expected = Iid("normal").sample(4, 9, seeded()) / math.sqrt(3)
    torch.testing.assert_close(weights, expected.view(4, 3, 3).double(), rtol=1e-6, atol=0)
