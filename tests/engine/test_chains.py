"""Chains are found at run time, in any forward pass; nothing is reconstructed through an unseen operation."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import abyssal
from abyssal.engine.block import LINKER
from toys.blocks import TO_ROUNDING, Branch, Net, build, data, flat_gradients, one_step, relative, same_gradients, twins

POLICIES = [abyssal.Keep(), TO_ROUNDING]


def straight(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    for block in net.blocks:
        h = block(h)
    return h


def relu_between(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    for i, block in enumerate(net.blocks):
        h = torch.relu(block(h)) if i == 2 else block(h)
    return h


def relu_in_place_between(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    for i, block in enumerate(net.blocks):
        h = block(h)
        if i == 2:
            h.relu_()
    return h


def add_in_place_between(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    for i, block in enumerate(net.blocks):
        h = block(h)
        if i == 2:
            h += x
    return h


def scaled_output_in_place(net: Net, x: Tensor) -> Tensor:
    return straight(net, x).mul_(2)


def tied(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    for _ in range(5):
        h = net.blocks[0](h)
    return h


def two_interleaved(net: Net, x: Tensor) -> Tensor:
    a, b = net.stem(x), net.stem(x.flip(0))
    for block in net.blocks:
        a, b = block(a), block(b)
    return a + 0.3 * b


def branching(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    a, b = net.blocks[0](h), net.blocks[1](h)
    return net.blocks[2](a) + net.blocks[3](a) + net.blocks[4](b)


def input_used_again(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    return h * straight(net, x) + net.blocks[0](h)


def every_state_used(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    total = torch.zeros_like(h)
    for i, block in enumerate(net.blocks):
        h = block(h)
        total = total + (i + 1) * h
    return total


def aliased_between(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    for block in net.blocks:
        h = block(h).view_as(h)  # another object, the same memory: what FSDP2 hands on
    return h


def transposed_between(net: Net, x: Tensor) -> Tensor:
    h = net.stem(x)
    h = net.blocks[0](h)
    square = h[:, : h.shape[0]]
    h = torch.cat([square.T, h[:, h.shape[0] :]], dim=1)
    for block in net.blocks[1:]:
        h = block(h)
    return h


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(
    ("join", "chains"),
    [
        (straight, 1),
        (relu_between, 2),
        (relu_in_place_between, 2),
        (add_in_place_between, 2),
        (scaled_output_in_place, 1),
        (tied, 1),
        (two_interleaved, 2),
        (branching, 3),
        (input_used_again, 2),
        (every_state_used, 1),
        (aliased_between, 1),
        (transposed_between, 2),
    ],
)
def test_gradients_are_those_without_us_and_chains_are_counted(join, chains: int, policy: abyssal.Policy) -> None:
    certificate = same_gradients(build(join=join), policy, lambda model: one_step(model, data()))
    if policy == TO_ROUNDING:
        assert certificate.chains == chains


class ReluFirst(nn.Module):
    """Its first operation changes its own input, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu_()
        return x + 0.1 * torch.tanh(self.linear(x))


class AddsInPlace(nn.Module):
    """`x += f(x)`: the output is the input's own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12, bias=False)
        self.linear.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x += 0.1 * self.linear(x)
        return x


def test_in_place_first_operation_gives_exact_gradients() -> None:
    same_gradients(build(block=ReluFirst), abyssal.Keep(), lambda model: one_step(model, data()))


def test_in_place_first_operation_of_the_lowest_block_under_reverse() -> None:
    net = build()
    torch.manual_seed(5)
    net.blocks[0] = ReluFirst().double()
    # ReLU cannot be inverted, so that block's own input is kept; those above it are reversed.
    plain, ours = twins(net, TO_ROUNDING)
    abyssal.reconstruct(ours, {"blocks.0": abyssal.Keep(), "blocks.[1-5]": TO_ROUNDING}, blocks=list(ours.blocks))
    assert relative(one_step(ours, data()), one_step(plain, data())) < 1e-11


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_residual_addition_in_place(policy: abyssal.Policy) -> None:
    same_gradients(build(block=AddsInPlace), policy, lambda model: one_step(model, data()))


def test_nothing_in_between_is_ever_reversed_through() -> None:
    """With a huge scaling between two blocks a false link would be far off; it is not linked, hence exact."""

    def scaled(net: Net, x: Tensor) -> Tensor:
        return net.blocks[1](net.blocks[0](net.stem(x)) * 1e6)

    certificate = same_gradients(build(join=scaled, depth=2), abyssal.Reverse(0), lambda m: one_step(m, data()))
    assert certificate.chains == 2 and certificate.error == 0.0
    assert "very output" in certificate.note


def test_a_block_that_changes_the_shape_is_kept_and_noted() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)[::2]

    net = build(depth=3)
    net.blocks[1] = Halves().double()
    certificate = same_gradients(net, TO_ROUNDING, lambda m: one_step(m, data()))
    assert "shape" in certificate.blocks[1].note and certificate.blocks[1].error == 0.0


def test_several_graphs_alive_at_once() -> None:
    def accumulate(model: nn.Module) -> Tensor:
        model.zero_grad()
        losses = [model(data(seed=i)).square().mean() for i in range(4)]
        for loss in (losses[2], losses[0], losses[3], losses[1]):
            loss.backward()
        return flat_gradients(model)

    for policy in POLICIES:
        same_gradients(build(), policy, accumulate)


def test_threads_have_tapes_of_their_own() -> None:
    nets = [build(seed=i) for i in range(4)]
    true = [one_step(net, data()) for net in nets]
    for net in nets:
        abyssal.reconstruct(net, TO_ROUNDING, blocks=list(net.blocks))
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = one_step(nets[i], data())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(relative(found[i], true[i]) < 1e-11 for i in range(4))


def test_one_model_in_several_threads() -> None:
    net = build()
    true = [torch.autograd.grad(net(data(seed=i)).sum(), net.stem.weight)[0] for i in range(4)]
    abyssal.reconstruct(net, TO_ROUNDING, blocks=list(net.blocks))
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = torch.autograd.grad(net(data(seed=i)).sum(), net.stem.weight)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(relative(found[i], true[i]) < 1e-11 for i in range(4))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_frozen_blocks(policy: abyssal.Policy) -> None:
    for frozen in ([0], [0, 1, 2], [2, 3], [5], [0, 1, 2, 3, 4, 5]):
        for stem_frozen in (False, True):
            net = build()
            for i in frozen:
                net.blocks[i].requires_grad_(False)
            net.stem.requires_grad_(not stem_frozen)
            same_gradients(net, policy, lambda m: one_step(m, data()))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_gradients_of_the_input(policy: abyssal.Policy) -> None:
    def input_gradient(model: nn.Module) -> Tensor:
        x = data().requires_grad_()
        return torch.autograd.grad(model(x).square().mean(), x)[0]

    same_gradients(build(), policy, input_gradient)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_nested_blocks(policy: abyssal.Policy) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([Branch(scale=0.05), Branch(scale=0.05)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.inner:
                x = block(x)
            return x

    net = build(block=Outer, depth=3)
    plain = build(block=Outer, depth=3)
    plain.load_state_dict(net.state_dict())
    everything = [module for outer in net.blocks for module in (outer, *outer.inner)]
    abyssal.reconstruct(net, policy, blocks=everything)
    assert relative(one_step(net, data()), one_step(plain, data())) < 1e-11


def test_inside_somebody_elses_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    def join(net: Net, x: Tensor) -> Tensor:
        h = net.stem(x)
        for i in range(0, 6, 2):
            h = checkpoint(lambda h, i=i: net.blocks[i + 1](net.blocks[i](h)), h, use_reentrant=False)
        return h

    for policy in POLICIES:
        same_gradients(build(join=join), policy, lambda m: one_step(m, data()))


def test_channels_last_streams_are_restored_in_their_memory_format() -> None:
    seen: list[tuple[int, ...]] = []

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.stride())
            return x + 0.1 * torch.tanh(self.conv(x))

    torch.manual_seed(0)
    net = nn.Sequential(*[Conv() for _ in range(4)]).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    true = one_step(net, x)
    abyssal.reconstruct(net, TO_ROUNDING)
    seen.clear()
    assert relative(one_step(net, x), true) < 1e-11
    assert set(seen) == {x.stride()}


def test_the_tape_forgets_ends_whose_graph_is_gone() -> None:
    net = build()
    abyssal.reconstruct(net, TO_ROUNDING, blocks=list(net.blocks))
    before = len(LINKER)
    for _ in range(10):
        net(data())
    one_step(net, data())
    assert len(LINKER) == before


@pytest.mark.parametrize("policy", [abyssal.Reverse(1), abyssal.PaperAdjoint()], ids=str)
def test_a_kept_state_that_was_tampered_with_is_refused(policy: abyssal.Policy) -> None:
    net = build()
    abyssal.reconstruct(net, policy, blocks=list(net.blocks))
    before = set(LINKER._open)
    loss = net(data()).sum()
    (key,) = set(LINKER._open) - before
    LINKER._open[key].owner().place.exact.state.add_(1.0)
    with pytest.raises(RuntimeError, match=r"blocks\.5.*changed in place"):
        loss.backward()
