"""What an activation does to second moments of jointly Gaussian signals: `E[s(u) s(v)]` and `E[s'(u) s'(v)]`.

Closed forms for ReLU (Cho and Saul 2009, arc-cosine kernels of orders 0 and 1) and erf (Williams 1998); all others are
in `abyssal.tangent.analytic.quadrature`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from abyssal.tangent.analytic.pairs import Angle, Distance, Geometry, Pairs, positive_root

__all__ = ["Activation", "Erf", "Image", "Relu", "mirrored", "nonzero", "tilt_of"]


@dataclass(frozen=True)
class Image:
    """Moments behind an activation.

    Attributes:
        q: `E[s(u)^2]`. [N]
        mean: `E[s(u)]`. [N]
        pairs: `E[s(u) s(v)]` with what belongs to it.
        slope: `E[s'(u) s'(v)]`. [P]
    """

    q: Tensor
    mean: Tensor
    pairs: Pairs
    slope: Tensor


class Activation(ABC):
    """An activation as a map of moments.

    Attributes:
        geometry: what it wants to know of near-coincident pairs.
    """

    geometry: Geometry

    @abstractmethod
    def __call__(self, q: Tensor, pairs: Pairs) -> Image:
        """Return the moments of `s(u)`, u centred and Gaussian with second moments q [N] and the pairs'."""

    @abstractmethod
    def second_moment(self) -> float:
        """Return `E[s(z)^2]` for a standard normal z."""


@final
class Relu(Activation):
    """`max(u, 0)`, without a factor."""

    geometry = Angle()

    def __call__(self, q: Tensor, pairs: Pairs) -> Image:
        """Return arc-cosine kernels through the angle and what is missing to pi, both from half-angle tangents."""
        root = positive_root(q)
        s1, s2 = pairs.of(root)
        size = s1 * s2
        sine, cosine = positive_root(pairs.near), positive_root(pairs.far)
        cosine = torch.where(size > 0, cosine, 1.0)  # a signal that vanishes has no angle
        angle, rest = 2 * torch.atan2(sine, cosine), 2 * torch.atan2(cosine, sine)
        product = size * _sine_less_cosine(rest) / (2 * math.pi)
        near = pairs.near / 2 - size * _sine_less_cosine(angle) / (2 * math.pi)
        image = replace(pairs, product=product, near=near, far=size / 2 + product)
        return Image(q / 2, root / math.sqrt(2 * math.pi), image, rest / (2 * math.pi))

    def second_moment(self) -> float:
        """Return 1/2."""
        return 0.5


@final
class Erf(Activation):
    """`erf(u)`."""

    geometry = Distance()

    def __call__(self, q: Tensor, pairs: Pairs) -> Image:
        """Return arcsines; near `c = sqrt(q1 q2)` through `E[(u - v)^2]`, of the mirrored pair where c < 0."""
        q1, q2 = pairs.of(q)
        tilt = tilt_of(pairs)
        positive = pairs.product >= 0
        product = pairs.product.abs()
        near = torch.where(positive, pairs.near, pairs.far)
        difference = tilt.square()
        determinant = (2 * near * (q1 + q2) - near.square() - difference) / 4  # q1 q2 - c^2
        bottom = 1 + 2 * (q1 + q2) + 4 * determinant
        angle = torch.atan2(2 * product, bottom.sqrt())
        own = torch.atan2(2 * q, (1 + 4 * q).sqrt())
        own1, own2 = pairs.of(own)
        middle = (own1 + own2) / 2
        # sin^2(middle) - sin^2(angle) = sin(middle - angle) sin(middle + angle), without its cancellation
        root1, root2 = (1 + 4 * q1).sqrt(), (1 + 4 * q2).sqrt()
        sizes = (1 + 2 * q1) * (1 + 2 * q2)
        top = 2 * near * (q1 + q2) - near.square() - difference * (1 - 4 / (root1 + root2).square())
        gap = _arcsine(top / (sizes * nonzero((middle + angle).sin())), middle - angle)
        # sin(own1 - own2), likewise
        tilt = 2 * tilt * (q1 + q2 + 4 * q1 * q2) / (sizes * nonzero(q1 * root2 + q2 * root1))
        tilt = _arcsine(tilt, own1 - own2) * (2 / math.pi)
        second = own * (2 / math.pi)
        e1, e2 = pairs.of(second)
        image = mirrored(pairs, positive, angle * (2 / math.pi), gap * (4 / math.pi), e1 + e2, tilt)
        return Image(second, torch.zeros_like(q), image, (4 / math.pi) / bottom.sqrt())

    def second_moment(self) -> float:
        """Return 2/pi arcsin(2/3)."""
        return 2 / math.pi * math.asin(2 / 3)


def mirrored(pairs: Pairs, positive: Tensor, product: Tensor, near: Tensor, total: Tensor, tilt: Tensor) -> Pairs:
    """Return moments of an odd activation's image, from those of pairs mirrored to have a positive product."""
    far = 2 * total - near
    # A chaotic network multiplies a product's rounding near coincidence, but not that of the distance.
    product = torch.where(2 * near < total, (total - near) / 2, product)
    return replace(
        pairs,
        product=torch.where(positive, product, -product),
        near=torch.where(positive, near, far),
        far=torch.where(positive, far, near),
        tilt=tilt,
    )


def tilt_of(pairs: Pairs) -> Tensor:
    """Return the difference of second moments of pairs that carry it."""
    if pairs.tilt is None:
        raise AssertionError("a smooth activation with moments that only know the angle")
    return pairs.tilt


def _arcsine(sine: Tensor, angle: Tensor) -> Tensor:
    """The angle, from its sine where it is small and has lost digits."""
    small = sine.abs() < 0.5
    return torch.where(small, torch.where(small, sine, 0.0).asin(), angle)


def nonzero(values: Tensor) -> Tensor:
    """Return the values, with 1 where they are 0: a denominator whose numerator vanishes too."""
    return torch.where(values > 0, values, 1.0)


def _sine_less_cosine(t: Tensor) -> Tensor:
    """`sin t - t cos t` for t from 0 to pi, by its Taylor series where the difference would cancel."""
    small = t < 0.5
    short = torch.where(small, t, 0.0)
    square = short * short
    series = torch.zeros_like(t)
    for n in range(9, 0, -1):
        series = series * square + (-1) ** (n + 1) * 2 * n / math.factorial(2 * n + 1)
    wide = torch.where(small, 1.0, t)
    return torch.where(small, series * square * short, wide.sin() - wide * wide.cos())
