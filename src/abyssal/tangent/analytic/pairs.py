"""Second moments of pairs of Gaussian signals, kept so that near-parallel and antipodal pairs lose no digits.

A kernel's recursion needs, for two inputs, the second moments `q1`, `q2` and the product `c = E[u v]`. What happens
near `c = sqrt(q1 q2)` cannot be read off these three: a ReLU network depends on the angle, the square root of the
small difference. So each pair also carries, as numbers of their own that only ever have nonnegative numbers added
to them, how far it is from being parallel (`near`) and from being antipodal (`far`):

- `Angle`, for homogeneous activations: `near = sqrt(q1 q2) - c`, `far = sqrt(q1 q2) + c`;
- `Distance`, for smooth ones: `near = E[(u - v)^2]`, `far = E[(u + v)^2]`, and the difference `q1 - q2` (`tilt`), so
  that even a chaotic network, which multiplies small distances by more than 1 in each layer, keeps their digits.

`c` itself is carried too: near 0 it could not be recovered from the other two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

__all__ = ["Angle", "Distance", "Geometry", "Pairs", "positive_root"]

_Gaps = tuple[Tensor, Tensor, Tensor | None]
# Below this share of its natural size a difference of two sums has lost three digits: it is computed directly.
_CLOSE = 1e-3
_NUMBERS_AT_ONCE = 2_000_000  # of gathered inputs
_SPLITTER = 2.0**27 + 1  # halves a float64's 53 bits (Dekker 1971)
# What the error-free arithmetic below leaves of an angle between exactly parallel inputs, squared, with room.
_PARALLEL = 1e-60


@dataclass(frozen=True)
class Pairs:
    """Pairs of signals, P of them.

    Attributes:
        rows: index of each pair's first signal. [P]
        columns: index of its second. [P]
        product: `E[u v]`. [P]
        near: 0 for coincident (or, by the angle, parallel) signals. [P]
        far: 0 for antipodal ones. [P]
        tilt: `q1 - q2`; None where only angles matter. [P]
    """

    rows: Tensor
    columns: Tensor
    product: Tensor
    near: Tensor
    far: Tensor
    tilt: Tensor | None = None

    def of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first and the second signals of all pairs have, from values of all signals [N]."""
        return values[self.rows], values[self.columns]

    def scaled(self, factor: Tensor | float) -> Pairs:
        """Return the moments of signals that are `sqrt(factor)` times as large."""
        tilt = None if self.tilt is None else factor * self.tilt
        return replace(self, product=factor * self.product, near=factor * self.near, far=factor * self.far, tilt=tilt)

    def plus(self, product: Tensor, near: Tensor, far: Tensor, tilt: Tensor | None = None) -> Pairs:
        """Return the moments with these added."""
        tilt = self.tilt if self.tilt is None or tilt is None else self.tilt + tilt
        return replace(self, product=self.product + product, near=self.near + near, far=self.far + far, tilt=tilt)


def positive_root(values: Tensor) -> Tensor:
    """Return the square root, with derivative 0 where the value is 0 (the kernel has a kink or is constant there)."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)


class Geometry(ABC):
    """What `near` and `far` mean, and how they go through sums of signals."""

    def first(self, x: Tensor, rows: Tensor, columns: Tensor, products: Tensor) -> tuple[Tensor, Pairs]:
        """Return the second moments of inputs as they are, `|x|^2` and `x . x'`.

        Args:
            x: all inputs. [N, d]
            rows: of the pairs. [P]
            columns: of the pairs. [P]
            products: `x . x'` as a matrix product gives them. [P]

        Returns:
            `|x|^2` [N] and the pairs.
        """
        q = (x * x).sum(-1)
        same = rows == columns
        own = q[rows]
        products = torch.where(same, own, products)
        near, far, tilt = self._gaps(x, q, rows, columns, products)
        near, far = torch.where(same, 0.0, near), torch.where(same, self._widest(own), far)
        return q, Pairs(rows, columns, products, near, far, tilt)

    @abstractmethod
    def _widest(self, own: Tensor) -> Tensor:
        """`far` of a signal with itself."""

    @abstractmethod
    def _gaps(self, x: Tensor, q: Tensor, rows: Tensor, columns: Tensor, products: Tensor) -> _Gaps:
        """`near`, `far` and `tilt` of inputs."""

    @abstractmethod
    def sum(self, q: Tensor, pairs: Pairs, other_q: Tensor, other: Pairs) -> tuple[Tensor, Pairs]:
        """Return the moments of the sum of two signals of which one is centred and independent of the other."""

    def constant(self, like: Pairs, value: Tensor) -> Pairs:
        """Return the moments of one random number of variance `value` that all signals share (a bias)."""
        product = value.expand_as(like.product)
        zero = torch.zeros_like(product)
        tilt = None if like.tilt is None else zero
        return replace(like, product=product, near=zero, far=self._widest(product), tilt=tilt)

    @abstractmethod
    def crossed(self, pairs: Pairs, mean: Tensor, other: Tensor) -> Pairs:
        """Return the moments with the cross terms of a sum of two independent signals with these means [N]."""


@final
class Angle(Geometry):
    """`near = sqrt(q1 q2) - c`, `far = sqrt(q1 q2) + c`: twice `sqrt(q1 q2)` times sin^2, cos^2 of half the angle."""

    def _widest(self, own: Tensor) -> Tensor:
        return 2 * own

    def _gaps(self, x: Tensor, q: Tensor, rows: Tensor, columns: Tensor, products: Tensor) -> _Gaps:
        size = positive_root(q)
        size = size[rows] * size[columns]
        small, wide = size - products.abs(), size + products.abs()
        close = ((small < _CLOSE * size) & (rows != columns)).nonzero().squeeze(-1)
        for at in close.split(max(1, _NUMBERS_AT_ONCE // x.shape[-1])):
            i, j = rows[at], columns[at]
            rejection = _rejection(x[i], x[j], q[i])
            rejection = torch.where(rejection > _PARALLEL * q[j], rejection, 0.0)
            # (|x||x'| - |c|)(|x||x'| + |c|) = |x|^2 |x' - its projection on x|^2
            small = small.index_put((at,), q[i] * rejection / wide[at])
        positive = products > 0
        return torch.where(positive, small, wide), torch.where(positive, wide, small), None

    def sum(self, q: Tensor, pairs: Pairs, other_q: Tensor, other: Pairs) -> tuple[Tensor, Pairs]:
        """Return the moments of a sum; by Cauchy and Schwarz the angle also grows where the norms' ratios differ."""
        total = q + other_q
        (a1, a2), (b1, b2) = pairs.of(positive_root(q)), pairs.of(positive_root(other_q))
        t1, t2 = pairs.of(positive_root(total))
        bottom = t1 * t2 + a1 * a2 + b1 * b2
        extra = (a1 * b2 - a2 * b1).square() / torch.where(bottom > 0, bottom, 1.0)
        return total, pairs.plus(other.product, other.near + extra, other.far + extra)

    def crossed(self, pairs: Pairs, mean: Tensor, other: Tensor) -> Pairs:
        """Return the moments with cross terms; all means are proportional to the norms (homogeneous, no bias)."""
        (m1, m2), (o1, o2) = pairs.of(mean), pairs.of(other)
        cross = m1 * o2 + m2 * o1
        return pairs.plus(cross, torch.zeros_like(cross), 2 * cross)


@final
class Distance(Geometry):
    """`near = E[(u - v)^2]`, `far = E[(u + v)^2]`, `tilt = E[u^2] - E[v^2]`."""

    def _widest(self, own: Tensor) -> Tensor:
        return 4 * own

    def _gaps(self, x: Tensor, q: Tensor, rows: Tensor, columns: Tensor, products: Tensor) -> _Gaps:
        total = q[rows] + q[columns]
        tilt = q[rows] - q[columns]
        found = []
        for sign in (-1.0, 1.0):
            gap = total + sign * 2 * products
            close = ((gap < _CLOSE * total) & (rows != columns)).nonzero().squeeze(-1)
            for at in close.split(max(1, _NUMBERS_AT_ONCE // x.shape[-1])):
                a, b = x[rows[at]], x[columns[at]]
                gap = gap.index_put((at,), (a + sign * b).square().sum(-1))
                tilt = tilt.index_put((at,), ((a - b) * (a + b)).sum(-1))
            found.append(gap)
        return found[0], found[1], tilt

    def sum(self, q: Tensor, pairs: Pairs, other_q: Tensor, other: Pairs) -> tuple[Tensor, Pairs]:
        """Return the moments of a sum: they add."""
        return q + other_q, pairs.plus(other.product, other.near, other.far, other.tilt)

    def crossed(self, pairs: Pairs, mean: Tensor, other: Tensor) -> Pairs:
        """Return the moments with the means' cross terms."""
        (m1, m2), (o1, o2) = pairs.of(mean), pairs.of(other)
        near, far = 2 * (m1 - m2) * (o1 - o2), 2 * (m1 + m2) * (o1 + o2)
        return pairs.plus(m1 * o2 + m2 * o1, near, far, 2 * (m1 * o1 - m2 * o2))


def _rejection(x: Tensor, other: Tensor, q: Tensor) -> Tensor:
    """`|x' - (x . x' / |x|^2) x|^2` of pairs [P, d], to nearly full precision however close to parallel they are.

    The projection is subtracted with the product's rounding error added back, so that only the rounding of the
    small remainder is left; the projection's own error is along x, and is projected out in a second pass.
    """
    q = q.unsqueeze(-1)
    scale = (x * other).sum(-1, keepdim=True) / q
    remainder = other - scale * x
    with torch.no_grad():
        exact = (other - scale * x) - _rounding(scale, x)
    remainder = remainder + (exact - remainder).detach()  # this value, with the plain formula's derivative
    remainder = remainder - x * ((x * remainder).sum(-1, keepdim=True) / q)
    return remainder.square().sum(-1)


def _rounding(a: Tensor, b: Tensor) -> Tensor:
    """Exactly `a b - fl(a b)` (Dekker's product)."""
    a_high, b_high = _high(a), _high(b)
    a_low, b_low = a - a_high, b - b_high
    return ((a_high * b_high - a * b) + a_high * b_low + a_low * b_high) + a_low * b_low


def _high(a: Tensor) -> Tensor:
    big = _SPLITTER * a
    return big - (big - a)
