"""What every policy has to do, as tests to inherit: for policies of one's own, and for ours."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from abyssal.engine.api import certificate, reconstruct
from abyssal.engine.block import Block
from abyssal.engine.policy import Policy, policy_from_dict, policy_to_dict
from abyssal.models.patch import patches
from abyssal.profiling.track import track

WIDTH, BATCH, DEPTH = 32, 8, 4


class _Residual(nn.Module):
    """The branch of `x + 0.05 f(x)`, which contracts, so that policies that solve for the input converge."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


class _Branch(_Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.05 * self.branch(x)


class _Dropout(_Branch):
    def branch(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().branch(x), 0.2, self.training)


class _Normalised(_Branch):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(self.norm(x))


class _InPlace(_Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(0.05 * self.branch(x.clone()))


class _Conditioned(_Residual):
    def forward(self, x: Tensor, shift: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + 0.05 * scale * self.branch(x + shift)


class _Pair(_Residual):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = self.branch(x)
        return x + 0.05 * inside, inside.square().mean()


class _Net(nn.Module):
    def __init__(self, kind: type[_Residual]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([kind() for _ in range(DEPTH)])
        self.condition = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the states after every block. [batch, width] each."""
        h, states, aside = x * 1.0, [], x.new_zeros(())
        for block in self.blocks:
            if isinstance(block, _Conditioned):
                h = block(h, self.condition(x), scale=0.5)
            else:
                h = block(h)
            if isinstance(h, tuple):
                h, more = h
                aside = aside + more
            states.append(h)
        return [*states[:-1], states[-1] + 0.01 * aside]


Order = Callable[[_Net, Tensor, list[nn.Parameter]], list[Tensor]]


def _loss(states: list[Tensor], last: int = -1) -> Tensor:
    return states[last].square().sum()


def _once(net: _Net, x: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(_loss(net(x)), [x, *weights], allow_unused=True, materialize_grads=True))


def _retained(net: _Net, x: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    loss = _loss(net(x))
    torch.autograd.grad(loss, x, retain_graph=True)
    return list(torch.autograd.grad(loss, [x, *weights], allow_unused=True, materialize_grads=True))


def _two_alive(net: _Net, x: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    first, second = _loss(net(x)), _loss(net(2 * x))
    found = [torch.autograd.grad(loss, [x, *weights], allow_unused=True, materialize_grads=True)
             for loss in (second, first)]  # fmt: skip
    return [a + b for a, b in zip(*found, strict=True)]


def _middle_first(net: _Net, x: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    states = net(x)
    middle = torch.autograd.grad(_loss(states, 1), x, retain_graph=True)
    return [*middle, *torch.autograd.grad(_loss(states), [x, *weights], allow_unused=True, materialize_grads=True)]


def _frozen_below(net: _Net, x: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    for p in net.blocks[0].parameters():
        p.requires_grad_(False)
    kept = [p for p in weights if p.requires_grad]
    return list(torch.autograd.grad(_loss(net(x.detach())), kept, allow_unused=True, materialize_grads=True))


class PolicySuite:
    """Tests of one policy: blocks of several kinds times orders of backward passes, bytes, plans, copies.

    Derive a test class for pytest, or call `run`. The networks are four small residual blocks in float64 that contract.

    Attributes:
        policy: to test; an instance.
        tolerance: relative error of the whole gradient that is allowed; 0 asks for plain autograd's to rounding.

    Example:
        >>> class TestKeep(PolicySuite):
        ...     policy, tolerance = abyssal.Keep(), 0.0
        >>> TestKeep().run()
    """

    policy: Policy
    tolerance: float = 1e-2

    blocks: tuple[type[_Residual], ...] = (_Branch, _Dropout, _Normalised, _InPlace, _Conditioned, _Pair)
    orders: tuple[Order, ...] = (_once, _retained, _two_alive, _middle_first, _frozen_below)

    def run(self) -> None:
        """Run all of it without pytest.

        Raises:
            AssertionError: at the first test that fails, with what was found.
        """
        for name in dir(self):
            if name.startswith("test_"):
                getattr(self, name)()

    def _nets(self, kind: type[_Residual]) -> Iterator[tuple[_Net, Tensor, list[nn.Parameter]]]:
        for policy in (None, self.policy):
            torch.manual_seed(0)
            net = _Net(kind).double()
            x = torch.randn(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
            if policy is not None:
                reconstruct(net, policy, blocks=list(net.blocks), tolerance=1e3)
            yield net, x, list(net.parameters())

    def test_gradients_on_every_block_in_every_order(self) -> None:
        """Gradients, buffers and random state are plain autograd's, gradients within the tolerance."""
        allowed = max(self.tolerance, 1e-12)
        for kind in self.blocks:
            for order in self.orders:
                (plain, x, weights), (ours, same_x, same_weights) = self._nets(kind)
                torch.manual_seed(1)
                expected, drawn = order(plain, x, weights), torch.rand(1)
                torch.manual_seed(1)
                found, again = order(ours, same_x, same_weights), torch.rand(1)
                case = f"{self.policy} on {kind.__name__}, {order.__name__}"
                assert torch.equal(drawn, again), f"{case}: the random state differs afterwards"
                for (name, a), b in zip(plain.named_buffers(), ours.buffers(), strict=True):
                    assert torch.equal(a, b), f"{case}: buffer {name} differs"
                wrong = sum(float((a - b).square().sum()) for a, b in zip(expected, found, strict=True)) ** 0.5
                size = sum(float(a.square().sum()) for a in expected) ** 0.5
                assert wrong <= allowed * size, f"{case}: gradient error {wrong / size:.1e}, {allowed:.0e} is allowed"

    def test_bytes_are_those_that_are_alive(self) -> None:
        """After the forward pass the certificate says what is alive besides the output; after the backward, nothing."""
        _, (net, x, _) = self._nets(_Branch)
        for _ in range(2):
            _loss(net(x)).backward()
        net.zero_grad(set_to_none=False)
        assert x.grad is not None
        with track() as memory:
            states = net(x)[-1:]
        alive = memory.end - states[0].nbytes
        said = certificate(net).stored_bytes
        numbers = 8 * 4 * DEPTH  # autograd keeps a Python number as 8 bytes
        if self.policy.recomputes:
            assert 0 <= alive - said <= numbers, f"{self.policy}: {alive} bytes are alive, the certificate says {said}"
        with track() as memory:
            _loss(states).backward()
            del states
        assert memory.end <= 0, f"{self.policy}: {memory.end} bytes stay after the backward pass"

    def test_it_is_a_value(self) -> None:
        """Equal, hashed and copied by its settings, and said in words that name it."""
        same = dataclasses.replace(self.policy)  # type: ignore[type-var]
        assert same == self.policy and hash(same) == hash(self.policy)
        assert copy.deepcopy(self.policy) == self.policy
        assert pickle.loads(pickle.dumps(self.policy)) == self.policy
        assert type(self.policy).__name__ in str(self.policy)

    def test_a_plan_can_hold_it(self) -> None:
        """It goes into a plan's JSON and comes back."""
        assert policy_from_dict(policy_to_dict(self.policy)) == self.policy

    def test_a_reconstructed_model_is_copied_with_it(self) -> None:
        """A deep copy runs under the policy, too, on its own weights."""
        _, (net, x, _) = self._nets(_Branch)
        copied = copy.deepcopy(net)
        _loss(copied(x)).backward()
        assert all(p.grad is None for p in net.parameters()), f"{self.policy}: the copy has the original's weights"
        policies = [patch.policy for patch in patches(copied) if isinstance(patch, Block)]
        assert policies == [self.policy] * DEPTH, f"{self.policy}: the copy runs under {policies}"
