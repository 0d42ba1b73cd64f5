"""A block is run again on the layout that its input had: expanded, with gaps, overlapping, permuted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import abyssal
from abyssal.util.layout import laid_out
from toys.blocks import EXACT, TO_ROUNDING, Branch, Net, build, data, one_step, relative, same_gradients

WIDTH = 12
POLICIES = [abyssal.Keep(), TO_ROUNDING, abyssal.Code(8), abyssal.Keep(device="cpu")]

# From [..., 2 * WIDTH] of 240 elements to the first block's input [*, WIDTH].
LAYOUTS = {
    "expanded": lambda h: h.view(20, WIDTH).expand(3, -1, -1),
    "expanded over tokens": lambda h: h.view(4, 1, 60)[..., :WIDTH].expand(-1, 5, -1),
    "one value for all": lambda h: h.flatten()[:1].expand(2, WIDTH),
    "without the class token": lambda h: h.view(4, 5, WIDTH)[:, 1:],
    "the class token": lambda h: h.view(4, 5, WIDTH)[:, 0],
    "half of the channels": lambda h: h[..., :WIDTH],
    "every other channel": lambda h: h[..., ::2],
    "tokens first": lambda h: h.view(4, 5, WIDTH).transpose(0, 1),
    "channels outermost": lambda h: h.view(WIDTH, 20).t(),
    "sliced and permuted": lambda h: h.view(4, 5, WIDTH)[:, ::2].transpose(0, 1),
    "overlapping windows": lambda h: h.flatten().unfold(0, WIDTH, 5),
    "expanded windows": lambda h: h.flatten()[:40].unfold(0, WIDTH, 5).expand(2, -1, -1),
    "a batch of one": lambda h: h.view(20, WIDTH)[None].expand(1, -1, -1),
}


class Seeing(Branch):
    """Notes the strides that it is called with, with a graph."""

    seen: list[tuple[int, ...]]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.__dict__.setdefault("seen", []).append(x.stride())
        return super().forward(x)


def joined(layout) -> Net:
    def join(net: Net, x: Tensor) -> Tensor:
        h = layout(net.stem(x).view(10, 2 * WIDTH))
        for block in net.blocks:
            h = block(h)
        return h

    return build(block=Seeing, join=join)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_inputs_that_are_not_dense(name: str, policy: abyssal.Policy) -> None:
    model = joined(LAYOUTS[name])
    same_gradients(model, policy, lambda m: one_step(m, data(20)), 1e-2 if policy == abyssal.Code(8) else EXACT)
    for block in model.blocks:
        assert len(set(block.seen)) == 1 and len(block.seen) >= 2


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """A view of any strides from 0 to 7, gaps, overlaps and repetitions included."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    strides = [draw(st.integers(0, 7)) for _ in shape]
    offset = draw(st.integers(0, 3))
    return torch.arange(100.0).as_strided(shape, strides, offset)


@given(strided(), st.booleans())
@settings(deadline=None)
def test_a_copy_is_laid_out_as_the_original(x: Tensor, copy: bool) -> None:
    found = laid_out(x.clone(), x.stride(), copy=copy)
    assert torch.equal(found, x)
    assert found.stride() == x.stride()


@given(strided(), st.sampled_from([abyssal.Keep(), abyssal.Reverse(refine=6)]))
@settings(deadline=None, max_examples=60)
def test_a_linear_layer_saves_the_same_whatever_the_layout_of_its_input(x: Tensor, policy: abyssal.Policy) -> None:
    class Last(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.01 * torch.tanh(self.linear(x))

    x = x.double() / 100
    torch.manual_seed(0)
    width = x.shape[-1] if x.dim() else 0
    if width == 0:
        return
    model = nn.Sequential(*[Last(width) for _ in range(3)]).double()
    true = one_step(model, x)
    abyssal.reconstruct(model, policy, blocks=list(model))
    assert torch.allclose(one_step(model, x), true, rtol=1e-8, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("policy", POLICIES[:3], ids=str)
@pytest.mark.parametrize("name", ["half of the channels", "without the class token", "sliced and permuted"])
def test_a_block_may_change_an_input_with_gaps_in_place(name: str, policy: abyssal.Policy) -> None:
    class InPlace(Branch):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.scale * self.second(torch.tanh(self.first(2 * x))))

    model = joined(LAYOUTS[name])
    for i in range(len(model.blocks)):
        model.blocks[i] = InPlace().double()
    bound = 1e-2 if policy == abyssal.Code(8) else EXACT
    same_gradients(model, policy, lambda m: one_step(m, data(20)), bound)


@pytest.mark.parametrize("policy", POLICIES[:2], ids=str)
def test_a_block_may_return_a_slice_of_something_larger(policy: abyssal.Policy) -> None:
    class Sliced(Seeing):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.pad(super().forward(x), (0, 3))[..., :-3]

    model = build(block=Sliced)
    certificate = same_gradients(model, policy, lambda m: one_step(m, data()))
    assert all(len(set(block.seen)) == 1 for block in model.blocks)
    assert certificate.error is not None and certificate.error < EXACT


@pytest.mark.slow
def test_plans_and_forecasts_of_models_whose_blocks_begin_with_an_expanded_tensor() -> None:
    model = joined(LAYOUTS["expanded"])
    true = one_step(model, data(20))
    options = {"loss": lambda y: y.square().mean(), "blocks": list(model.blocks)}
    plan = abyssal.plan(model, data(20), tolerance=1e-3, **options)
    abyssal.reconstruct(model, plan)
    assert relative(one_step(model, data(20)), true) < 1e-3
    abyssal.release(model)
    policies = {"keep": abyssal.Keep(), "reverse": abyssal.Reverse()}
    keep, reverse = abyssal.forecast(model, data(20), policies=policies, **options).methods
    assert keep.stream_bytes >= 6 * 3 * 20 * WIDTH * 8 > 2 * reverse.stream_bytes


def test_jagged_streams_keep_their_layout() -> None:
    parts = [data(3), data(5)]
    torch.manual_seed(0)
    model = nn.Sequential(*[Branch() for _ in range(3)]).double()

    def step() -> Tensor:
        model.zero_grad()
        model(torch.nested.nested_tensor(parts, layout=torch.jagged)).values().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    true = step()
    abyssal.reconstruct(model, abyssal.Keep(), blocks=list(model))
    assert torch.equal(step(), true)
