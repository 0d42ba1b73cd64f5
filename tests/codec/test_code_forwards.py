"""Coded streams in forward passes that anyone might write: shared inputs, failures, threads, frozen parts, aliases."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import abyssal
from toys.blocks import relative
from toys.streams import WIDTH, batch

# 8 bits of increments of a tenth of the state; `auto` allows 2e-2 of the state.
POLICIES = {
    "Code(8)": (abyssal.Code(8), 2e-3),
    "Code(8, refine=1)": (abyssal.Code(8, refine=1), 2e-3),
    "auto": (None, 2e-2),
    "among others": ({"[13]": abyssal.Reverse(6), "2": abyssal.Keep(), "*": abyssal.Code(8)}, 4e-3),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.fails = False

    def branch(self, x: Tensor) -> Tensor:
        return 0.1 * torch.tanh(self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            self.fails = False
            raise ValueError("told to")
        return x + self.branch(x)


class Identity(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Alias(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


class Transposed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).t().contiguous().t()


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.branch, x, use_reentrant=False)


class Dropping(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + functional.dropout(self.branch(x), 0.3, self.training)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.branch(x.clone()))


Net = nn.Sequential
Forward = Callable[[Net], Tensor]


def through(blocks: nn.Module, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def ordinary(net: Net) -> Tensor:
    return through(net, batch())


def one_tensor_into_two_chains(net: Net) -> Tensor:
    x = net[0](batch())
    return through(net[1:], x) + 2 * through(net[1:], x)


def tied(net: Net) -> Tensor:
    x = batch()
    for _ in range(4):
        x = through(net, x)
    return x


def fails_and_is_called_again(net: Net) -> Tensor:
    x = through(net[:2], batch())
    net[2].fails = True
    with pytest.raises(ValueError, match="told to"):
        net[2](x)
    return through(net[2:], x)


def fails_and_another_takes_over(net: Net) -> Tensor:
    x = through(net[:2], batch())
    net[2].fails = True
    with pytest.raises(ValueError, match="told to"):
        net[2](x)
    return through(net[3:], x)


def a_forward_pass_fails_and_the_next_is_another(net: Net) -> Tensor:
    net[3].fails = True
    with pytest.raises(ValueError, match="told to"):
        through(net, batch(5))
    return through(net, batch())


def begins_without_gradients(net: Net) -> Tensor:
    with torch.no_grad():
        x = through(net[:2], batch())
    return through(net[2:], x)


def begins_in_inference_mode(net: Net) -> Tensor:
    with torch.inference_mode():
        x = through(net[:2], batch())
    return through(net[2:], x.clone())


def detached_in_the_middle(net: Net) -> Tensor:
    x = through(net[:3], batch())
    return through(net[3:], x.detach()) + x


def changes_threads(net: Net) -> Tensor:
    found = [through(net[:3], batch())]

    def rest() -> None:
        found.append(through(net[3:], found[0]))

    thread = threading.Thread(target=rest)
    thread.start()
    thread.join()
    return found[1]


def in_threads(net: Net) -> Tensor:
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: through(net, batch(seed=i))})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.stack([found[i] for i in range(4)])


def expanded(net: Net) -> Tensor:
    return through(net, batch(1).expand(9, WIDTH))


def steps(net: Net, forward: Forward) -> Tensor:
    net.zero_grad()
    torch.manual_seed(3)
    forward(net).square().mean().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in net.parameters()])


def check(net: Net, forward: Forward, policy: str) -> None:
    chosen, allowed = POLICIES[policy]
    plain = copy.deepcopy(net)
    abyssal.reconstruct(net, chosen, blocks=list(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error", abyssal.DriftWarning)
        for _ in range(2):
            assert relative(steps(net, forward), steps(plain, forward)) <= allowed
    assert abyssal.certificate(net).drifted == []


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "forward",
    [
        one_tensor_into_two_chains,
        tied,
        fails_and_is_called_again,
        fails_and_another_takes_over,
        a_forward_pass_fails_and_the_next_is_another,
        begins_without_gradients,
        begins_in_inference_mode,
        detached_in_the_middle,
        changes_threads,
        in_threads,
        expanded,
    ],
)
def test_forward_passes_of_many_kinds(forward: Forward, policy: str) -> None:
    check(Net(*[Block() for _ in range(6)]), forward, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [Identity, Alias, Transposed, Checkpointed, Dropping, InPlace])
@pytest.mark.parametrize("where", [(1,), (0, 5), (2, 3, 4), (0, 1, 2, 3, 4, 5)], ids=str)
def test_blocks_of_many_kinds(kind: type[Block], where: tuple[int, ...], policy: str) -> None:
    if len(where) == 6 and kind in (Identity, Alias):
        where = where[:5]
    net = Net(*[kind() if i in where else Block() for i in range(6)])
    if 0 in where and kind is InPlace:
        check(net, lambda n: through(n, batch() * 1), policy)
    else:
        check(net, ordinary, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("frozen", [(0,), (0, 1), (2,), (5,), (0, 1, 2, 3, 4)], ids=str)
def test_frozen_blocks(frozen: tuple[int, ...], policy: str) -> None:
    net = Net(*[Block() for _ in range(6)])
    for i in frozen:
        net[i].requires_grad_(False)
    check(net, ordinary, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_needs_gradients_may_change_from_step_to_step(policy: str) -> None:
    chosen, allowed = POLICIES[policy]
    net = Net(*[Block() for _ in range(6)])
    plain = copy.deepcopy(net)
    abyssal.reconstruct(net, chosen, blocks=list(net))
    for number in range(6):
        for each in (net, plain):
            each.requires_grad_(True)
            each[number].requires_grad_(False)
            each[(number + 3) % 6].requires_grad_(False)
            each.train(number % 2 == 0)
        assert relative(steps(net, ordinary), steps(plain, ordinary)) <= allowed


def test_graphs_outlive_another_policy_and_release() -> None:
    net = Net(*[Block() for _ in range(6)])
    plain = copy.deepcopy(net)
    abyssal.reconstruct(net, abyssal.Code(8), blocks=list(net))
    first = ordinary(net).square().mean()
    abyssal.reconstruct(net, abyssal.Code(8, refine=1), blocks=list(net))
    second = ordinary(net).square().mean()
    abyssal.release(net)
    (first + second).backward()
    (2 * ordinary(plain).square().mean()).backward()
    found, exact = (torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (net, plain))
    assert relative(found, exact) <= 2e-3


def test_an_infinity_that_a_later_block_removes_is_refused_not_passed_on() -> None:
    """The code of a group that held an infinity says nothing any more, and the end does not show it."""

    class Overflows(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.where(y > 2, torch.inf, y)

    class Cleans(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.nan_to_num(x, posinf=1.0))

    net = Net(Block(), Overflows(), Cleans(), Block(), Block(), Block())
    abyssal.reconstruct(net, abyssal.Code(8), blocks=list(net))
    with pytest.raises(abyssal.NonFiniteError, match="not finite"):
        steps(net, ordinary)
