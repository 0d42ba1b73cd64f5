"""Empirical tangent kernels against whole Jacobians, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from abyssal.profiling.track import peak_bytes
from abyssal.tangent.empirical.ntk import forecast_ntk, ntk
from abyssal.tangent.empirical.tiles import Tiling
from abyssal.tangent.empirical.work import prepared
from toys import kernels as toys

EXACT = 1e-12


def reduced(full: Tensor, outputs: str | int) -> Tensor:
    if outputs == "full":
        return full
    if isinstance(outputs, int):
        return full[:, :, outputs, outputs]
    diagonal = full.diagonal(dim1=-2, dim2=-1)
    return diagonal if outputs == "diagonal" else diagonal.sum(dim=-1)


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def fallback(model: nn.Module, x: Any, output: Any = None) -> set[str]:
    with prepared(model, x, None, "trace", None, output, None) as work:
        return work.plan.fallback


@pytest.mark.slow
@pytest.mark.parametrize("maker", toys.MODELS, ids=lambda maker: maker.__name__)
def test_kernels_are_those_of_whole_jacobians(maker: Callable[[], tuple[nn.Module, Any, Any]]):
    model, x, output = toys.in_float64(maker)
    full = toys.kernel(model, x, output=output)
    n = len(full)
    for outputs in ("full", "trace", "diagonal", 1):
        expected = reduced(full, outputs)
        assert off(ntk(model, x, outputs=outputs, output=output), expected) < EXACT
    first, second = toys.rows(x, slice(0, n // 2 + 1)), toys.rows(x, slice(1, None))
    assert off(ntk(model, first, second, "full", output=output), full[: n // 2 + 1, 1:]) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("maker", [toys.residual_mlp, toys.conv_resnet, toys.tied, toys.by_hand, toys.gpt2])
@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal", -1])
def test_a_kernel_in_small_blocks_is_the_whole_one(maker: Callable[[], tuple[nn.Module, Any, Any]], outputs: Any):
    model, x, output = toys.in_float64(maker)
    with prepared(model, x, None, outputs, None, output, None) as work:
        least = work.peak(Tiling(1, 1, 1))
        tiling = work.tiling(int(1.3 * least), 1)
    assert tiling.rows < work.first.n
    expected = reduced(toys.kernel(model, x, output=output), outputs)
    found = ntk(model, x, outputs=outputs, output=output, budget=int(1.3 * least))
    assert off(found, expected) < EXACT
    n = work.first.n
    first, second = toys.rows(x, slice(0, n // 2 + 1)), toys.rows(x, slice(1, None))
    found = ntk(model, first, second, outputs, output=output, budget=int(1.3 * least))
    assert off(found, expected[: n // 2 + 1, 1:]) < EXACT


@pytest.mark.parametrize("maker", [toys.residual_mlp, toys.conv_resnet, toys.tied, toys.attention])
def test_kernels_of_equal_samples_are_exactly_symmetric(maker: Callable[[], tuple[nn.Module, Any, Any]]):
    model, x, output = toys.in_float64(maker)
    x = toys.rows(x, slice(None))
    for budget in (None, 300_000):
        full = ntk(model, x, outputs="full", output=output, budget=budget)
        assert torch.equal(full, full.permute(1, 0, 3, 2))
        trace = ntk(model, x, output=output, budget=budget)
        assert torch.equal(trace, trace.T)


def test_the_kernel_sums_a_tied_weight_over_its_uses_before_contracting():
    torch.manual_seed(0)
    model, x, _ = toys.in_float64(toys.tied)
    untied = copy.deepcopy(model)
    untied.head.weight = nn.Parameter(model.head.weight.detach().clone())
    expected = toys.kernel(model, x)
    assert not fallback(model, x)
    assert off(ntk(model, x, outputs="full"), expected) < EXACT
    # Leaving out the terms between uses, as if they were two weights, would be seen.
    assert off(ntk(untied, x, outputs="full"), expected) > 1e6 * EXACT


def test_what_hooks_do_not_account_for_falls_back_and_nothing_else():
    model, x, _ = toys.in_float64(toys.by_hand)
    assert fallback(model, x) == {"embedding.weight", "linear.weight", "scale"}
    for maker in (toys.residual_mlp, toys.conv_resnet, toys.conv1d, toys.rms, toys.gpt2, toys.llama, toys.tied):
        model, x, output = toys.in_float64(maker)
        assert not fallback(model, x, output), maker.__name__
    model, x, _ = toys.in_float64(toys.sequence_first)
    assert not fallback(model, x)


class Late(nn.Module):
    """Uses a weight by a function for samples that begin with a positive number only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if bool((x[:, 0] > 0).any()):
            h = torch.where(x[:, :1] > 0, h @ self.first.weight, h)
        return self.second(h)


def test_a_use_that_only_later_samples_show_is_seen_where_it_appears():
    model = Late().double()
    x = torch.randn(6, 3, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs()
    x[:3, 0] *= -1
    assert not fallback(model, x)
    assert off(ntk(model, x, outputs="full"), toys.kernel(model, x)) < EXACT


class Doubling(nn.Linear):
    """A layer that is not what its class's name says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_with_another_forward_is_not_taken_for_its_base():
    model = nn.Sequential(Doubling(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    assert off(ntk(model, x, outputs="full"), toys.kernel(model, x)) < EXACT


def test_weights_computed_from_parameters_are_differentiated_to_the_parameters():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    assert off(ntk(model, x, outputs="full"), toys.kernel(model, x)) < EXACT


def test_frozen_parameters_do_not_count_and_globs_choose():
    model, x, _ = toys.in_float64(toys.residual_mlp)
    for p in model.blocks.parameters():
        p.requires_grad_(False)
    expected = toys.kernel(model, x)
    assert off(ntk(model, x, outputs="full"), expected) < EXACT
    for p in model.parameters():
        p.requires_grad_(True)
    chosen = ntk(model, x, outputs="full", parameters=["inner.*", "norm.*", "outer.*"])
    assert off(chosen, expected) < EXACT
    rest = ntk(model, x, outputs="full", parameters="blocks.*")
    assert off(chosen + rest, toys.kernel(model, x)) < EXACT


def test_a_model_is_left_as_it_was_found():
    model, x, _ = toys.in_float64(toys.conv_resnet)
    model.append(nn.utils.spectral_norm(nn.Linear(3, 2)).double()).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(x).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    kernel = ntk(model, x)
    assert torch.equal(torch.rand(3), expected)
    assert not kernel.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())


def test_it_works_without_gradients_enabled_and_on_inputs_that_require_them():
    model, x, _ = toys.in_float64(toys.residual_mlp)
    expected = ntk(model, x)
    with torch.no_grad():
        assert torch.equal(ntk(model, x.requires_grad_()), expected)
    assert x.grad is None


def test_one_output_and_none_are_kernels_of_a_scalar():
    model, x, _ = toys.in_float64(toys.residual_mlp)
    scalar = ntk(model, x, output=lambda found: found[:, 0])
    assert off(scalar, toys.kernel(model, x)[:, :, 0, 0]) < EXACT
    assert torch.allclose(scalar, ntk(model, x, outputs=0))
    assert ntk(model, x[:1]).shape == (1, 1)


def test_float32_models_sum_in_float64_where_asked():
    model, x, _ = toys.residual_mlp()
    exact = ntk(copy.deepcopy(model).double(), x.double())
    assert ntk(model, x).dtype == torch.float32
    found = ntk(model, x, dtype=torch.float64)
    assert found.dtype == torch.float64
    assert off(found, exact) < 1e-5


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_convolutions_of_any_geometry(kernel: int, stride: int, padding: int, dilation: int, groups: int, bias: bool):
    torch.manual_seed(kernel + 10 * stride)
    layer = nn.Conv2d(4, 8, (kernel, 2), stride, padding, dilation, groups, bias)
    model = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2)).double()
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    assert not fallback(model, x)
    assert off(ntk(model, x, outputs="full"), toys.kernel(model, x)) < EXACT


@pytest.mark.slow
def test_several_processes_compute_the_same():
    model, x, _ = toys.in_float64(toys.residual_mlp)
    assert off(ntk(model, x, outputs="full", jobs=2), ntk(model, x, outputs="full")) < EXACT


def test_progress_counts_tiles_to_the_end():
    model, x, _ = toys.in_float64(toys.residual_mlp)
    seen: list[tuple[str, int, int]] = []
    ntk(model, x, budget=60_000, progress=lambda *event: seen.append(event))
    assert len(seen) > 3
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, _, total in seen} == {len(seen)}


@pytest.mark.slow
def test_the_forecast_says_what_is_formed_and_what_budget_works():
    model, x, _ = toys.in_float64(toys.by_hand)
    found = forecast_ntk(model, x, outputs="full")
    assert found.shape == (4, 4, 7, 7)
    assert found.result_bytes == 4 * 4 * 7 * 7 * 8
    assert found.fallback == ("embedding.weight", "linear.weight", "scale")
    assert found.least_bytes <= found.working_bytes <= found.budget
    assert "embedding.weight" in str(found)
    ntk(model, x, outputs="full", budget=found.least_bytes)
    with pytest.raises(ValueError, match=f"budget={found.least_bytes}"):
        ntk(model, x, outputs="full", budget=found.least_bytes - 1)


@pytest.mark.slow
def test_live_memory_stays_within_the_budget():
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.Tanh())]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *layers, *head)
    x = torch.randn(24, 3, 16, 16)
    budget = 4_000_000
    kernel = ntk(model, x, outputs="full", budget=budget)
    assert peak_bytes(ntk, model, x, outputs="full", budget=budget) < budget
    assert peak_bytes(ntk, model, x, outputs="full") > 2 * budget
    assert forecast_ntk(model, x, outputs="full").working_bytes > peak_bytes(ntk, model, x, outputs="full")
    assert off(kernel, ntk(model, x, outputs="full")) < 1e-5


def test_a_bias_takes_the_gram_matrix_of_its_weight():
    def operations(bias: bool, n: int) -> int:
        model, x = nn.Sequential(nn.Linear(9, 64, bias), nn.Tanh(), nn.Linear(64, 1, False)), torch.randn(n, 9)
        with FlopCounterMode(display=False) as counter:
            ntk(model, x)
        return counter.get_total_flops()

    with_bias, without = (operations(bias, 8) - operations(bias, 4) for bias in (True, False))  # the probe's are equal
    assert with_bias == without > 0


@pytest.mark.slow
def test_compiled_models_whose_backward_knows_no_vmap():
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3)
    compiled = torch.compile(plain, backend="aot_eager")
    compiled(x)
    torch.testing.assert_close(ntk(compiled, x), ntk(plain, x))
