"""Per-sample gradients of one parameter in the form in which layers give them.

A layer with a weight matrix gives sample i and output a the gradient `sum_t left[i, a, t] (x) right[i, a, t]`, a sum
over positions t of outer products, of which one factor is the layer's input and the other the gradient by its output.
Their inner products need no gradient; see :mod:`abyssal.tangent.empirical.products`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Dense", "Direct", "OneHot", "Outer", "Part", "Unfolded", "explicit", "outer", "unfolded"]


@dataclass(frozen=True)
class Held:
    """Values of samples, which are along the first dimension."""

    values: Tensor

    @property
    def nbytes(self) -> int:
        """Return the memory they take."""
        return self.values.numel() * self.values.element_size()


@dataclass(frozen=True)
class Dense(Held):
    """A factor with values; `A` is 1 where it is the same for all outputs. [n, A, groups, T, size]."""

    @property
    def positions(self) -> int:
        """Return T."""
        return self.values.shape[3]

    @property
    def size(self) -> int:
        """Return its length."""
        return self.values.shape[4]


@dataclass(frozen=True)
class OneHot(Held):
    """A factor that is a unit vector at every position: which one; -1 is no vector at all. [n, T]."""

    size: int

    @property
    def positions(self) -> int:
        """Return T."""
        return self.values.shape[1]


@dataclass(frozen=True)
class Unfolded(Held):
    """A convolution's input [n, channels, ...], whose patches take many times its memory: made when they are needed.

    Attributes:
        unfold: to patches. [n, 1, groups, T, size]
        positions: T.
        size: of a patch.
    """

    unfold: Callable[[Tensor], Tensor]
    positions: int
    size: int


@dataclass(frozen=True)
class Outer:
    """The gradient of a matrix, or of one for each group, as outer products over positions.

    Attributes:
        left: gives the matrix's rows.
        right: gives its columns.
        dependent: the factor that depends on the output.
    """

    left: Dense | OneHot
    right: Dense | Unfolded
    dependent: Literal["left", "right"]

    @property
    def by_output(self) -> Held:
        """Return the factor that depends on the output, which is dense."""
        return self.left if self.dependent == "left" else self.right

    @property
    def outputs(self) -> int:
        """Return A."""
        return self.by_output.values.shape[1]

    @property
    def groups(self) -> int:
        """Return how many matrices there are."""
        return self.left.values.shape[2] if isinstance(self.left, Dense) else 1

    @property
    def samples(self) -> int:
        """Return n."""
        return len(self.left.values)

    @property
    def positions(self) -> int:
        """Return T."""
        return self.left.positions

    @property
    def numel(self) -> int:
        """Return the parameter's size."""
        return self.groups * self.left.size * self.right.size

    def mapped(self, function: Callable[[Tensor, bool], Tensor]) -> Outer:
        """Return it with what a function makes of each factor's values, told whether they depend on the output."""
        left = replace(self.left, values=function(self.left.values, self.dependent == "left"))
        return replace(
            self, left=left, right=replace(self.right, values=function(self.right.values, self.dependent == "right"))
        )


@dataclass(frozen=True)
class Direct(Held):
    """The gradient itself, in the parameter's own order. [n, A, numel]."""

    @property
    def by_output(self) -> Held:
        """Return what depends on the output: all of it."""
        return self

    @property
    def samples(self) -> int:
        """Return n."""
        return len(self.values)

    @property
    def outputs(self) -> int:
        """Return A."""
        return self.values.shape[1]

    @property
    def numel(self) -> int:
        """Return the parameter's size."""
        return self.values.shape[2]

    def mapped(self, function: Callable[[Tensor, bool], Tensor]) -> Direct:
        """Return it with what a function makes of its values, as of the factors of outer products."""
        return Direct(function(self.values, True))


Part = Outer | Direct


def unfolded(part: Part) -> Part:
    """Return the same with a convolution's patches made."""
    if isinstance(part, Outer) and isinstance(part.right, Unfolded):
        return replace(part, right=Dense(_dense(part.right)))
    return part


def _dense(right: Dense | Unfolded) -> Tensor:
    return right.values if isinstance(right, Dense) else right.unfold(right.values)


def explicit(parts: Sequence[Part], dtype: torch.dtype, piece: slice | None = None) -> Tensor:
    """Return the gradients themselves, summed over uses. [n, A, numel].

    Args:
        parts: all uses of a parameter.
        dtype: of the result.
        piece: of the matrix's rows, or of its groups where it has several; None is all. For :class:`Outer` parts.
    """
    formed = (p.values.to(dtype) if isinstance(p, Direct) else outer(p, piece, dtype) for p in parts)
    return functools.reduce(torch.add, formed)


def outer(part: Outer, piece: slice | None, dtype: torch.dtype) -> Tensor:
    """Return `sum_t left_t (x) right_t`. [n, A, groups * rows * columns]."""
    b = _dense(part.right).to(dtype)
    if isinstance(part.left, OneHot):
        return _scattered(part.left, b, piece or slice(0, part.left.size))
    a = part.left.values.to(dtype)
    if piece is not None:
        a, b = (a[:, :, piece], b[:, :, piece]) if part.groups > 1 else (a[..., piece], b)
    n, outputs, groups = len(a), max(a.shape[1], b.shape[1]), a.shape[2]
    rows, columns = a.shape[4], b.shape[4]
    if a.shape[1] == outputs:  # rows of all outputs one below the other: one product for each sample
        tall = a.permute(0, 2, 1, 4, 3).reshape(n, groups, outputs * rows, -1)
        out = (tall @ b[:, 0]).view(n, groups, outputs, rows, columns)
    else:
        wide = b.permute(0, 2, 3, 1, 4).reshape(n, groups, b.shape[3], outputs * columns)
        out = (a[:, 0].transpose(-1, -2) @ wide).view(n, groups, rows, outputs, columns).transpose(2, 3)
    return out.transpose(1, 2).reshape(n, outputs, groups * rows * columns)


def _scattered(left: OneHot, values: Tensor, piece: slice) -> Tensor:
    n, outputs, _, _, columns = values.shape
    rows = piece.stop - piece.start
    inside = (left.values >= piece.start) & (left.values < piece.stop)
    at = torch.where(inside, left.values - piece.start, rows)  # one more row takes what is not wanted
    out = values.new_zeros(n, outputs, rows + 1, columns)
    out.scatter_add_(2, at[:, None, :, None].expand(n, outputs, -1, columns), values[:, :, 0])
    return out[:, :, :rows].reshape(n, outputs, rows * columns)
