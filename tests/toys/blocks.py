"""Small residual networks and the obvious twin: the same gradients by plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import abyssal

# Restoring with this many refinements leaves rounding errors only, on branches that contract by 0.2 or less.
TO_ROUNDING = abyssal.Reverse(refine=14)
EXACT = 1e-11  # relative, float64: rounding of a few hundred operations


class Branch(nn.Module):
    """Residual block `x + scale * W2 tanh(W1 x)`; counts its evaluations."""

    def __init__(self, width: int = 12, scale: float = 0.1) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(width, width), nn.Linear(width, width), scale
        self.evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        return x + self.scale * self.second(torch.tanh(self.first(x)))


class Net(nn.Module):
    """Stem, blocks joined by `join`, head. `join(net, x)` is any forward pass that somebody might write."""

    def __init__(
        self,
        block: Callable[[], nn.Module] = Branch,
        depth: int = 6,
        width: int = 12,
        join: Callable[[Net, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList([block() for _ in range(depth)])
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        if self.join is not None:
            return self.head(self.join(self, x))
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(*args: object, seed: int = 0, **kwargs: object) -> Net:
    torch.manual_seed(seed)
    return Net(*args, **kwargs).double()  # type: ignore[arg-type]


def data(batch: int = 5, width: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(batch, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_step(model: nn.Module, x: Tensor) -> Tensor:
    """All parameter gradients of one training step, flattened; missing ones count as zero."""
    model.zero_grad()
    model(x).square().mean().backward()
    return flat_gradients(model)


def flat_gradients(model: nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())


def twins(model: Net, policy: abyssal.Policy, **options: object) -> tuple[Net, Net]:
    """A plain copy, and the model itself reconstructed."""
    plain = copy.deepcopy(model)
    abyssal.reconstruct(model, policy, blocks=list(model.blocks), **options)  # type: ignore[arg-type]
    return plain, model


def same_gradients(
    model: Net, policy: abyssal.Policy, step: Callable[[nn.Module], Tensor], bound: float = EXACT
) -> abyssal.Certificate:
    """Assert that `step` gives the same with and without reconstruction; return the certificate."""
    plain, ours = twins(model, policy)
    torch.manual_seed(7)
    true = step(plain)
    torch.manual_seed(7)
    found = step(ours)
    if policy == abyssal.Keep():
        assert torch.equal(found, true)
    assert relative(found, true) < bound
    return abyssal.certificate(ours)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        with torch.no_grad():  # not a factor in the forward pass: autograd keeps a Python number as 8 bytes
            self.second.weight.mul_(0.05)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


def deep(depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*[Wide() for _ in range(depth)])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model
