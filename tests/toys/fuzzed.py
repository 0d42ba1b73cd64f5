"""Chains of blocks of every kind, joined in every way, for the tests that draw them at random.

Batch and width are the same, so that shapes tell neither activations nor weights apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

WIDTH = 4


class Told(Exception):
    """A block was told to fail."""


class Kind(nn.Module):
    """A residual block `x + branch / 10` that can be told to fail.

    Attributes:
        fuse: in which of its evaluations from now on it fails; 0 for never.
        fault: how.
    """

    takes = ""  # besides the stream: "", "position" or "keyword"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.width_out = width
        self.fuse, self.fault = 0, Told

    def hidden(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.fuse:
            self.fuse -= 1
            if not self.fuse:
                raise self.fault("told to")
        return h

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.second(self.hidden(x))


class InPlaceInside(Kind):
    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.hidden(x))
        return h.mul_(0.1).add_(x)


class InPlaceInput(Kind):
    def forward(self, x: Tensor) -> Tensor:
        self.hidden(x.detach().clone())
        return x.mul_(1.05).add_(self.first.bias, alpha=0.1)


class Dropping(Kind):
    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.dropout(self.hidden(x), 0.3, self.training)
        return x + 0.1 * self.second(h)


class Normed(Kind):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width, eps=1.0)  # which keeps the branch a contraction

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.second(self.hidden(self.norm(x)))


class Counting(Kind):
    """Changes one buffer by reassignment, another in place, and uses both."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("replaced", torch.ones(()))
        self.register_buffer("added_to", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.replaced = self.replaced + 1
        self.added_to += 1
        return x + (0.1 / self.replaced + 0.1 / self.added_to) * self.hidden(x)


class Conditioned(Kind):
    takes = "position"

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return x + 0.1 * self.second(self.hidden(x)) * torch.sigmoid(condition)


class Keyworded(Kind):
    takes = "keyword"

    def forward(self, x: Tensor, *, condition: Tensor) -> Tensor:  # type: ignore[override]
        return x + 0.1 * self.second(self.hidden(x) * condition)


class Pair(Kind):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = self.hidden(x)
        return x + 0.1 * self.second(h), h.mean()


class Leaving(Kind):
    """Leaves a loss on itself."""

    left: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        self.left = h.square().mean()
        return x + 0.1 * self.second(h)


class Coupling(Kind):
    """Exactly invertible."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a + 0.1 * self._branch(b), b], dim=-1)

    def reverse_step(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, dim=-1)
        return torch.cat([a - 0.1 * self._branch(b), b], dim=-1)

    def _branch(self, b: Tensor) -> Tensor:
        return self.second(self.hidden(torch.cat([b, b], dim=-1))).chunk(2, dim=-1)[0]


class Resizing(Kind):
    """Ends a chain: from width 4 to 6 and back."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.width_out = 10 - width
        self.second = nn.Linear(width, self.width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.hidden(x))


class Nested(Kind):
    """Its inner blocks are reconstructed, too, where `blocks` names them."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.inner = nn.ModuleList([Kind(width), Dropping(width)])

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for block in self.inner:
            h = block(h)
        return h + 0.1 * self.hidden(h)


KINDS = (
    Kind, InPlaceInside, InPlaceInput, Dropping, Normed, Counting, Conditioned, Keyworded, Pair, Leaving, Coupling,
    Resizing, Nested,
)  # fmt: skip
JOINS = ("nothing", "nothing", "nothing", "scaled", "in place", "skip", "view", "detached")
"""What the caller does between two blocks; chains go on where that is nothing."""


class Pass(NamedTuple):
    """One forward pass: its leaves, and what a loss may be made of."""

    x: Tensor
    condition: Tensor
    states: list[Tensor]
    others: list[Tensor]
    weights: tuple[Tensor, ...] = ()  # that stood in for the model's

    @property
    def values(self) -> list[Tensor]:
        return [*self.states, *self.others]


class Chain(nn.Module):
    """Blocks of some kinds, called in some order.

    Args:
        kinds: of the distinct blocks.
        joins: what the caller does before each call but the first.
        again: which blocks are called twice in a row.
    """

    def __init__(self, kinds: Sequence[type[Kind]], joins: Sequence[str], again: Sequence[int] = ()) -> None:
        super().__init__()
        self.stem, self.blocks, self.joins, self.again = nn.Linear(WIDTH, WIDTH), nn.ModuleList(), joins, again
        width = WIDTH
        for kind in kinds:
            self.blocks.append(kind(width))
            width = self.blocks[-1].width_out

    def forward(self, x: Tensor, condition: Tensor) -> Pass:
        h = self.stem(x)
        states, others = [h], []
        calls = [
            b for i, b in enumerate(self.blocks) for _ in range(1 + (i in self.again and not isinstance(b, Resizing)))
        ]
        for block, join in zip(calls, ["nothing", *self.joins * len(calls)], strict=False):
            h = joined(h, states[0], join)
            c = condition if h.shape == condition.shape else condition.new_full((), 0.5)
            if block.takes == "position":
                out = block(h, c * 1.1)  # which only the graph holds
            else:
                out = block(h, condition=c) if block.takes == "keyword" else block(h)
            if isinstance(out, tuple):
                out, other = out
                others.append(other)
            if isinstance(block, Leaving):
                others.append(block.left)
            states.append(h := out)
        return Pass(x, condition, states, others)


def joined(h: Tensor, first: Tensor, join: str) -> Tensor:
    """What the next block is called with."""
    if join == "scaled":
        return h * 0.9
    if join == "in place":
        return h.mul_(0.9)
    if join == "skip" and h.shape == first.shape:
        return h + 0.1 * first
    if join == "view":
        return h.view(h.shape)
    return h.detach() if join == "detached" else h
