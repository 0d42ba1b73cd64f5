"""Gaussian moments of any smooth activation, by quadrature and Hermite series.

The coefficients of an activation's Hermite series, from a one-dimensional quadrature for each signal, turn the double
integral of each pair into a power series in the correlation,

    E[s(u) s(v)] = sum_k a_k(q1) a_k(q2) r^k,    a_k(q) = E[s(sqrt(q) z) h_k(z)],    r = c / sqrt(q1 q2),

with nothing special at r = 1 or -1 and, since all terms are known, no cancellation in `E[(s(u) - s(v))^2]` either;
`E[s'(u) s'(v)]` is its derivative in c (Price 1958).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import final

import numpy as np
import torch
from torch import Tensor

from abyssal.tangent.analytic.dual import Activation, Erf, Image, Relu, mirrored, nonzero, tilt_of
from abyssal.tangent.analytic.pairs import Distance, Pairs, positive_root

__all__ = ["Function", "Quadrature", "activation_of"]

Function = Callable[[Tensor], Tensor]
_NUMBERS_AT_ONCE = 65_536  # of a block of terms: keeps them in the cache
_NAMED = ("erf", "gelu", "relu", "tanh")
_NODES = (32, 128, 512, 2048, 8192, 32_768)
_GAUSS = 128  # nodes up to which Gauss's rule is used
_FARTHEST = 13.0  # nodes beyond contribute less than 1e-18 to any coefficient of the series
_NEGLIGIBLE = 1e-18  # power of the correlation at which the series ends
_CLOSE = 1e-2  # relative squared distance below which a difference of moments has lost digits
_CLOSE_NORMS = 3e-6  # relative; differences have lost as much to rounding here as the trapezoidal rule errs
_DEVIATIONS = tuple(2.0 ** (k / 4) for k in range(-40, 33))  # at which a rule is tried: 1e-3 to 256


@final
class Quadrature(Activation):
    """Any smooth activation, by Gauss-Hermite quadrature and a Hermite series as long as it needs.

    A rule of n nodes (Gauss-Hermite up to 128; beyond, equally spaced nodes as dense as Gauss's) gives `E[s]`,
    `E[s^2]`, `E[s'^2]` and the coefficients of at most n/4 terms. It is used up to the largest standard deviation at
    which these moments agree to `tolerance`, relative, with a trapezoidal rule of 16,384 points, and the whole series
    at correlation 1 with `E[s'^2]`; beyond, the next rule, of four times the nodes. The series ends where powers of
    the correlation or shares of the squared coefficients fall below 1e-18. What a rule reaches depends on how smooth
    the activation is in units of the signal's standard deviation (poles at distance b, as tanh's at pi/2, leave about
    `exp(-2 b sqrt(n/2) / sqrt(q))`): tanh up to a standard deviation of 8, gelu up to 16. Beyond the last rule, as
    dense as 32,768 nodes, an error is raised; activations with kinks need a much larger tolerance.

    Args:
        function: elementwise, on float64 tensors, differentiable by forward-mode automatic differentiation.
        derivative: its derivative, elementwise; None differentiates automatically.
        tolerance: relative error to accept in each moment.
        name: for messages.
    """

    geometry = Distance()

    def __init__(
        self, function: Function, derivative: Function | None = None, *, tolerance: float = 1e-12, name: str = ""
    ) -> None:
        if not callable(function) or not (derivative is None or callable(derivative)):
            raise TypeError(f"Quadrature needs functions, got {function!r} and {derivative!r}.")
        if not 1e-13 <= tolerance < 1:
            raise ValueError(f"The tolerance of a quadrature has to be from 1e-13 to 1, got {tolerance}.")
        self.function, self.derivative, self.tolerance = function, derivative, tolerance
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self._reach: dict[int, float] = {}
        self._check_function()

    def __call__(self, q: Tensor, pairs: Pairs) -> Image:
        """Return the sums of the Hermite series; of the mirrored pair where c < 0 and the activation is odd."""
        root = positive_root(q)
        nodes = self.nodes(float(root.detach().max()))
        positive = pairs.product >= 0 if self.odd else torch.ones_like(pairs.product, dtype=torch.bool)
        product = torch.where(positive, pairs.product, -pairs.product)
        near = torch.where(positive, pairs.near, pairs.far)
        s1, s2 = pairs.of(root)
        correlation = product / nonzero(s1 * s2)
        same = pairs.rows == pairs.columns
        slopes, moments = self._moments(root, nodes, _terms(correlation.detach()[~same].abs(), nodes))
        slopes = slopes[: _relevant(slopes)]
        covariance, slope = _series(slopes, pairs, correlation)
        (m1, m2), (e1, e2), (d1, _), growth, rise = (pairs.of(moment) for moment in moments)
        value = torch.where(same, e1, m1 * m2 + product * covariance)
        distance, tilt = e1 + e2 - 2 * value, e1 - e2
        at = ((near < _CLOSE * (q[pairs.rows] + q[pairs.columns])) & ~same).nonzero().squeeze(-1)
        if len(at):
            some = replace(
                pairs, rows=pairs.rows[at], columns=pairs.columns[at], near=near[at], tilt=tilt_of(pairs)[at]
            )
            pick = tuple((a[at], b[at]) for a, b in (growth, rise, (m1, m2), (e1, e2)))
            close = _close_distances(slopes, root, some, correlation[at], pick)
            distance, tilt = distance.index_put((at,), close[0]), tilt.index_put((at,), close[1])
        distance, tilt = torch.where(same, 0.0, distance), torch.where(same, 0.0, tilt)
        image = mirrored(pairs, positive, value, distance, e1 + e2, tilt)
        return Image(moments[1], moments[0], image, torch.where(same, d1, slope))

    def second_moment(self) -> float:
        """Return `E[s(z)^2]` for a standard normal z."""
        return float(self._moments(torch.ones(1, dtype=torch.float64), self.nodes(1.0), 1)[1][1])

    def nodes(self, deviation: float) -> int:
        """Return how many nodes signals of this standard deviation need.

        Raises:
            ValueError: where the largest rule is not enough.
        """
        for nodes in _NODES:
            if nodes not in self._reach:
                self._reach[nodes] = self._find_reach(nodes)
            if deviation <= self._reach[nodes]:
                return nodes
        raise ValueError(self._too_far(deviation))

    def _too_far(self, deviation: float) -> str:
        """Say why the largest rule is not enough, and what to do."""
        most, larger = self._reach[_NODES[-1]], "pass Quadrature(function, tolerance=...) with a larger tolerance"
        reached = (
            f"Quadrature of {self.name} with nodes as dense as {_NODES[-1]} reaches a relative accuracy of "
            f"{self.tolerance:g} only up to a standard deviation of {most:.3g}, and signals here have {deviation:.3g}."
        )
        if (kink := self._kink()) is not None:
            return (
                f"{self.name} has a kink: its derivative jumps by {kink[1]:.3g} at {kink[0]:.3g}, and quadrature to a "
                f"relative accuracy of {self.tolerance:g} is for smooth activations. For ReLU pass "
                'activation="relu", which is exact; for another one pass Quadrature(function, tolerance=1e-2), and '
                "expect no more of its kernels in each layer."
            )
        if not most:
            return f"{reached} It is not smooth enough (derivatives that jump?): {larger}."
        return (
            f"{reached} Make w_std, b_std, alpha or the inputs smaller (branch lly and form huang-yau want inputs of "
            f"norm 1), or {larger}."
        )

    def _moments(self, root: Tensor, nodes: int, terms: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Of signals u = root z: coefficients of the Hermite series, and moments.

        Returns:
            `b_k = E[s'(u) h_k(z)]` [terms, N], from which `a_k = sqrt(q / k) b_(k-1)` for k > 0; and, [N] each,
            `E[s(u)]`, `E[s(u)^2]`, `E[s'(u)^2]`, and the sum of squared derivatives of all a_k and the derivative
            of `E[s(u)^2]` with respect to the root.
        """
        points, weights = _rule(nodes, root.device)
        values, slopes = self._evaluate(root.unsqueeze(-1) * points)
        moments = (values, values.square(), slopes.square(), (slopes * points).square(), 2 * values * slopes * points)
        return _basis(nodes, terms, root.device) @ slopes.T, tuple(moment @ weights for moment in moments)

    @torch.no_grad()
    def _find_reach(self, nodes: int) -> float:
        points = torch.linspace(-9.5, 9.5, 16_384, dtype=torch.float64)
        weights = torch.exp(-(points**2) / 2)
        weights /= weights.sum()
        reach = 0.0
        for deviation in _DEVIATIONS:
            values, slopes = self._evaluate(deviation * points)
            mean, square, rise = values @ weights, values.square() @ weights, slopes.square() @ weights
            series, found = self._moments(torch.tensor([deviation], dtype=torch.float64), nodes, nodes // 4)
            errors = [
                (found[0] - mean).abs() / square.sqrt(),
                (found[1] - square).abs() / square,
                (found[2] - rise).abs() / rise,
                (series.square().sum(0) - rise).abs() / rise,
            ]
            if not bool((torch.cat(errors) <= self.tolerance).all()):
                break
            reach = deviation
        return reach

    @torch.no_grad()
    def _kink(self) -> tuple[float, float] | None:
        """Return where the derivative jumps most, and by how much; None where it is continuous as far as is seen."""
        first, last = -8.0, 8.0
        # Of a smooth function the largest step falls with the interval; that of a jump stays, in one of the two cells
        # beside it.
        for _ in range(8):
            u = torch.linspace(first, last, 4097, dtype=torch.float64)
            steps = self._evaluate(u)[1].diff().abs()
            at = int(steps.argmax())
            jump, first, last = float(steps[at]), float(u[max(at - 1, 0)]), float(u[min(at + 2, 4096)])
            if last - first < 1e-7:
                break
        slopes = self._evaluate(torch.linspace(-8.0, 8.0, 4097, dtype=torch.float64))[1]
        return (round((first + last) / 2, 6) + 0.0, jump) if jump > 1e-4 * float(slopes.abs().max()) else None

    def _evaluate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        if self.derivative is not None:
            return self.function(u), self.derivative(u)
        return torch.func.jvp(self.function, (u,), (torch.ones_like(u),))[:2]

    @torch.no_grad()
    def _check_function(self) -> None:
        u = torch.linspace(-4, 4, 65, dtype=torch.float64)
        values, slopes = self._evaluate(u)
        for what, found in (("values", values), ("derivatives", slopes)):
            if not isinstance(found, Tensor) or found.shape != u.shape or found.dtype != u.dtype:
                given = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"{self.name} has to be elementwise on float64 [65], got {what} {given}.")
            if not bool(found.isfinite().all()):
                raise ValueError(f"{self.name} has {what} between -4 and 4 that are not finite.")
        eps = torch.finfo(torch.float64).eps
        size = values.abs().max()
        if not torch.allclose(self._evaluate(u[:3])[0], values[:3], rtol=0, atol=float(4 * eps * size)):
            raise ValueError(f"{self.name} is not elementwise: the same numbers in a smaller tensor give other values.")
        if not bool(slopes.any()):
            raise ValueError(f"{self.name} is constant between -4 and 4: its networks do not depend on their inputs.")
        self.odd = bool(((values + values.flip(0)).abs() <= 4 * eps * size).all())


def activation_of(activation: str | Function | Activation) -> Activation:
    """Return the moment map of "relu", "erf", "tanh", "gelu" (with the error function), or of a smooth function.

    Raises:
        ValueError: for an unknown name, or a function that is not elementwise or not finite.
        TypeError: for anything else.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in _NAMED:
            raise ValueError(f"Unknown activation {activation!r}: choose from {list(_NAMED)}, or pass a function.")
        return _named(activation)
    if callable(activation):
        return Quadrature(activation)
    raise TypeError(f"An activation is a name, a function or an Activation, got {type(activation).__name__}.")


@cache
def _named(name: str) -> Activation:
    """An activation by its name; made once, since a quadrature remembers how far its rules reach."""
    if name == "tanh":
        return Quadrature(torch.tanh, lambda u: torch.cosh(u.clamp(-350, 350)).pow(-2), name="tanh")
    if name == "gelu":
        normal, root = torch.special.ndtr, math.sqrt(2 * math.pi)
        return Quadrature(lambda u: u * normal(u), lambda u: normal(u) + u * torch.exp(-u * u / 2) / root, name="gelu")
    return Relu() if name == "relu" else Erf()


@cache
def _rule(nodes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Points and weights for a standard normal, [n] each, without negligible ones.

    Up to 128 nodes the Gauss-Hermite rule. Beyond, computed Gauss weights lose digits with n, while equally spaced
    nodes as dense as its middle ones converge as fast for analytic functions (Goodwin 1949) and have exact weights.
    """
    if nodes <= _GAUSS:
        from scipy.special import roots_hermitenorm  # here, since it takes long to import

        points, weights = roots_hermitenorm(nodes)
    else:
        count = math.ceil(2 * _FARTHEST * math.sqrt(nodes) / math.pi)
        points = np.linspace(-_FARTHEST, _FARTHEST, count)
        weights = np.exp(-(points**2) / 2)
    keep = np.abs(points) <= _FARTHEST
    return torch.from_numpy(points[keep]).to(device), torch.from_numpy(weights[keep] / weights.sum()).to(device)


def _basis(nodes: int, terms: int, device: torch.device) -> Tensor:
    """Weights times normalised Hermite polynomials, [terms, n]."""
    rounded = 1 << max(5, (terms - 1).bit_length())  # few different ones are kept
    return _basis_of(nodes, rounded, device)[:terms]


@cache
def _basis_of(nodes: int, terms: int, device: torch.device) -> Tensor:
    points, weights = (t.cpu().numpy() for t in _rule(nodes, device))
    # With the root of the weights inside, the recursion neither over- nor underflows.
    rows = np.empty((terms, len(points)))
    rows[0] = np.sqrt(weights)
    rows[1] = points * rows[0]
    for k in range(1, terms - 1):
        rows[k + 1] = (points * rows[k] - math.sqrt(k) * rows[k - 1]) / math.sqrt(k + 1)
    return torch.from_numpy(rows * np.sqrt(weights)).to(device)


def _terms(correlation: Tensor, nodes: int) -> int:
    """How many terms a series with these correlations [P] needs."""
    largest = float(correlation.max()) if len(correlation) else 0.0
    if largest < 1e-3:
        return 8
    return min(nodes // 4, math.ceil(math.log(_NEGLIGIBLE) / math.log(largest)) if largest < 1 else nodes)


def _relevant(slopes: Tensor) -> int:
    """How many terms of a series with these coefficients [K, N] matter to any signal."""
    size = slopes.detach().square()
    found = (size > _NEGLIGIBLE * size.sum(0)).any(-1).nonzero()
    return int(found[-1]) + 1 if len(found) else 1


def _blocks(terms: int, pairs: int) -> Iterator[slice]:
    """Blocks of terms from the last to the first, of a size that keeps numbers in the cache and calls few."""
    size = min(terms, max(1, _NUMBERS_AT_ONCE // max(1, pairs)))
    for start in range((terms - 1) // size * size, -1, -size):
        yield slice(start, min(start + size, terms))


def _powers(r: Tensor, count: int) -> Tensor:
    """Powers `r^0` to `r^count`, [count + 1, P]."""
    found = torch.ones_like(r).unsqueeze(0)
    base = r
    while len(found) <= count:
        found = torch.cat([found, found * base])
        base = base * base
    return found[: count + 1]


def _series(slopes: Tensor, pairs: Pairs, r: Tensor) -> tuple[Tensor, Tensor]:
    """`sum A_k r^k / (k+1)` and `sum A_k r^k` with `A_k = b_k b'_k`, from b [K, N] and correlations [P]; [P] each."""
    covariance, slope = torch.zeros_like(r), torch.zeros_like(r)
    blocks = list(_blocks(len(slopes), len(r)))
    powers = _powers(r, blocks[-1].stop)
    for block in blocks:
        orders, count = _orders(block, r), block.stop - block.start
        values = slopes[block, pairs.rows] * slopes[block, pairs.columns] * powers[:count]
        slope = torch.addcmul(values.sum(0), slope, powers[count])
        covariance = torch.addcmul((values / orders).sum(0), covariance, powers[count])
    return covariance, slope


def _orders(block: slice, like: Tensor) -> Tensor:
    """Orders k + 1 of the terms of a block, [terms, 1]."""
    return torch.arange(block.start + 1, block.stop + 1, dtype=like.dtype, device=like.device).unsqueeze(-1)


def _close_distances(
    slopes: Tensor, root: Tensor, pairs: Pairs, r: Tensor, of_pairs: tuple[tuple[Tensor, Tensor], ...]
) -> tuple[Tensor, Tensor]:
    """`E[(s(u) - s(v))^2]` and `E[s(u)^2] - E[s(v)^2]` of close pairs, without cancellation.

    The first is `sum (a_k - a'_k)^2 + 2 sum a_k a'_k (1 - r^k)`.

    Args:
        slopes: b_k. [K, N]
        root: standard deviations. [N]
        pairs: the close ones, mirrored. [P]
        r: their correlations. [P]
        of_pairs: sums of squared derivatives of all a_k and derivatives of `E[s^2]` with respect to the root;
            `E[s]`; `E[s^2]`. Of the first and second signals [P] each.
    """
    (g1, g2), (p1, p2), (m1, m2), (e1, e2) = of_pairs
    s1, s2 = pairs.of(root)
    rest, tail, spread = torch.zeros_like(r), torch.zeros_like(r), (m1 - m2).square()
    blocks = list(_blocks(len(slopes), len(r)))
    powers = _powers(r, blocks[-1].stop)
    for block in blocks:
        orders, count = _orders(block, r), block.stop - block.start
        b1, b2 = slopes[block, pairs.rows], slopes[block, pairs.columns]
        tails = tail + (b1 * b2 / orders).flip(0).cumsum(0).flip(0)  # of A_k / (k+1) from here on
        # sum A_k (1 - r^(k+1)) / (k+1) / (1 - r)
        rest = torch.addcmul((tails * powers[:count]).sum(0), rest, powers[count])
        tail = tails[0]
        spread = spread + ((s1 * b1 - s2 * b2).square() / orders).sum(0)
    step = tilt_of(pairs) / nonzero(s1 + s2)  # s1 - s2
    # Of nearly equal norms the differences are the trapezoidal integral of the derivatives in between.
    equal = step.abs() < _CLOSE_NORMS * (s1 + s2)
    spread = torch.where(equal, step.square() * (g1 + g2) / 2, spread)
    tilt = torch.where(equal, step * (p1 + p2) / 2, e1 - e2)
    return spread + (pairs.near - step.square()) * rest, tilt  # near less (s1 - s2)^2 is 2 (1 - r) sqrt(q1 q2)
