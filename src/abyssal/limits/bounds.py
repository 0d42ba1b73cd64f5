"""Bounds that hold with a stated probability on how far a network of independent weights moves its input.

The question is that of Marion, Fermanian, Biau, Vert, arXiv 2206.06929, who bound `|h_L - h_0| / |h_0|` and the
gradients' counterpart with probability 1 - delta. Their statements were not at hand when this was written: the
bounds here are *ours*, by Markov's, Cantelli's and Chebyshev's inequalities from exact moments, and not theirs.

Write `a = L^-2beta`, `S = |h_L|^2 / |h_0|^2`, `X = |h_L - h_0|^2 / |h_0|^2`, weights independent, symmetric about 0
and of variance 1/d. In res-3, given `h`, `V relu(W h)` is centred with `E|V relu(W h)|^2 = |h|^2 / 2`. So
`E S = (1 + a/2)^L` and `E X = (1 + a/2)^L - 1`, exactly, at every width. In res-1 `E|V relu(h)|^2 = |relu(h)|^2 <=
|h|^2`, so both hold with `a` for `a/2` as upper bounds.

Gradients: for a fixed vector v, `J v` with J the Jacobian of `h_L` in `h_0` obeys the same recursion (`v <- v + a^1/2
V D W v`, D the pattern of active units, and `E|D W v|^2 = |v|^2 / 2` as W and -W have complementary patterns). With a
read-out B of independent symmetric entries, independent of the network, `E[B^T B / |B|^2]` is the identity over d,
so `E|g_0 - g_L|^2 / |g_L|^2 = E|J - I|_F^2 / d`, which is `(1 + a/2)^L - 1` again (at most that with `a` for res-1).

Second moments need normal weights: see `hidden_moments`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from abyssal.limits.networks import (
    Distribution,
    Network,
    check_distribution,
    check_network,
    norms,
    propagate,
    uniform_directions,
)
from abyssal.limits.sde_limit import sde
from abyssal.util.checks import number, one_of, share, whole

__all__ = [
    "HiddenMoments",
    "Violations",
    "check_bounds",
    "gradient_bound",
    "gradient_ratios",
    "hidden_bound",
    "hidden_moments",
    "norm_interval",
]

Array = NDArray[np.float64]
Method = Literal["markov", "cantelli"]
# Entries of weight matrices kept for a backward pass at once: 256 MB of float32.
_KEPT = 64_000_000


@dataclass(frozen=True)
class HiddenMoments:
    """Exact moments of `S = |h_L|^2 / |h_0|^2` and `X = |h_L - h_0|^2 / |h_0|^2`: res-3, normal weights.

    Attributes:
        norm: E S.
        norm_square: E S^2.
        moved: E X.
        moved_square: E X^2.
        product: E X S.
    """

    norm: float
    norm_square: float
    moved: float
    moved_square: float
    product: float


@dataclass(frozen=True)
class Violations:
    """How often a bound failed in simulation.

    Attributes:
        what: the bound, in words.
        low: what the ratio has to be at least; 0 for a bound from above.
        high: what it has to be at most.
        promised: the probability of failure that the bound allows.
        count: networks simulated.
        violations: of them outside.
        interval: of 95 % confidence for the probability of failure (Wilson's).
        quantile: the ratio that this share of the networks exceeds, `promised` of all; half of it for a
            two-sided bound.
    """

    what: str
    low: float
    high: float
    promised: float
    count: int
    violations: int
    interval: tuple[float, float]
    quantile: float

    @property
    def frequency(self) -> float:
        """Share of the networks outside."""
        return self.violations / self.count

    @property
    def looseness(self) -> float:
        """The bound from above over the measured quantile of the same level: 1 is tight."""
        return self.high / self.quantile

    def __str__(self) -> str:
        """Show it in a line."""
        return (
            f"{self.what}: [{self.low:.4g}, {self.high:.4g}] promised to fail with at most {self.promised:.3g}; failed "
            f"{self.violations} times in {self.count} ({self.frequency:.4f}, 95% interval {self.interval[0]:.4f} to "
            f"{self.interval[1]:.4f}); measured quantile {self.quantile:.4g}, {self.looseness:.2f} times below"
        )


def hidden_moments(depth: int, width: int, beta: float = 0.5) -> HiddenMoments:
    """Return exact second and fourth moments of res-3's norms, for normal weights at any depth and width.

    Given `h`, the increment is `xi = a^1/2 V relu(W h)`, without a preferred direction, with `E|xi|^2 = a S / 2` and
    `E|xi|^4 = a^2 S^2 m`, `m = (1 + 5/d)(1 + 2/d) / 4` (`|relu(W h)|^2 = |h|^2 R / d` with E R^2 = d^2/4 + 5d/4, and
    `|V r|^2 = |r|^2 chi^2_d / d`). As `<h_L - h_0, h_L> = (S + X - 1) / 2`, four expectations obey a linear recursion:

        E S'    = (1 + a/2) E S
        E S'^2  = (1 + a (1 + 2/d) + a^2 m) E S^2
        E X'S'  = E XS + (a/2) (E XS + E S^2) + (a/d) (E S^2 + E XS - E S) + a^2 m E S^2
        E X'^2  = E X^2 + a (1 + 2/d) E XS + a^2 m E S^2

    Args:
        depth: L.
        width: d.
        beta: exponent of the residual scale.

    Raises:
        TypeError: for numbers that are not whole.
        ValueError: for numbers below 1, or an exponent that is not finite.
    """
    depth, d = whole("depth", depth), whole("width", width)
    a = depth ** (-2 * number("beta", beta))
    m = (1 + 5 / d) * (1 + 2 / d) / 4
    s, ss, xs, xx = 1.0, 1.0, 0.0, 0.0
    for _ in range(depth):
        xx += a * (1 + 2 / d) * xs + a**2 * m * ss
        xs += a / 2 * (xs + ss) + a / d * (ss + xs - s) + a**2 * m * ss
        ss *= 1 + a * (1 + 2 / d) + a**2 * m
        s *= 1 + a / 2
    return HiddenMoments(s, ss, _mean_moved("res3", depth, beta), xx, xs)


def hidden_bound(
    network: str,
    depth: int,
    *,
    beta: float = 0.5,
    delta: float = 0.05,
    method: str = "markov",
    width: int | None = None,
) -> float:
    """Return a number that `|h_L - h_0| / |h_0|` exceeds with probability at most delta.

    "markov": `sqrt(E X / delta)`, for any symmetric weights of variance 1/width, at every width. "cantelli":
    `sqrt(E X + sqrt(Var X (1 - delta) / delta))`, for res-3 with normal weights; sharper for small delta.

    Args:
        network: "res1" or "res3".
        depth: L.
        beta: exponent of the residual scale.
        delta: probability of failure, strictly between 0 and 1.
        method: "markov" or "cantelli".
        width: d, for "cantelli".

    Raises:
        TypeError: for numbers that are not whole.
        ValueError: for an unknown name, a delta outside (0, 1), numbers below 1, or Cantelli's bound without a width
            or for res-1, whose second moments are not known.
    """
    name = check_network(network)
    whole("depth", depth)
    share("delta", delta)
    mean = _mean_moved(name, depth, number("beta", beta))
    one_of("method", method, get_args(Method))
    if method == "markov":
        return math.sqrt(mean / delta)
    if name != "res3" or width is None:
        raise ValueError(f"Cantelli's bound needs res3 and a width, got {network!r} and width={width}. Use 'markov'.")
    moments = hidden_moments(depth, width, beta)
    spread = max(0.0, moments.moved_square - moments.moved**2)
    return math.sqrt(mean + math.sqrt(spread * (1 - delta) / delta))


def gradient_bound(network: str, depth: int, *, beta: float = 0.5, delta: float = 0.05) -> float:
    """Return a number that `|g_L - g_0| / |g_L|` exceeds with probability at most delta, by Markov's inequality.

    `g_k` is the gradient of a scalar read-out `B h_L`, or of any loss of it, in `h_k`; B has independent symmetric
    entries. The number is that of :func:`hidden_bound`.

    Args:
        network: "res1" or "res3".
        depth: L.
        beta: exponent of the residual scale.
        delta: probability of failure, strictly between 0 and 1.

    Raises:
        TypeError: for a depth that is not a whole number.
        ValueError: as for `hidden_bound`.
    """
    return hidden_bound(network, depth, beta=beta, delta=delta)


def norm_interval(depth: int, width: int, *, beta: float = 0.5, delta: float = 0.05) -> tuple[float, float]:
    """Return an interval that `|h_L| / |h_0|` leaves with probability at most delta: res-3, normal weights.

    Chebyshev's inequality on `|h_L|^2 / |h_0|^2`, with its exact mean and variance; the lower end is 0 where that
    says nothing.

    Args:
        depth: L.
        width: d.
        beta: exponent of the residual scale.
        delta: probability of failure, strictly between 0 and 1.

    Raises:
        TypeError: for numbers that are not whole.
        ValueError: for numbers below 1, an exponent that is not finite, or a delta outside (0, 1).
    """
    share("delta", delta)
    moments = hidden_moments(depth, width, beta)
    spread = math.sqrt(max(0.0, moments.norm_square - moments.norm**2) / delta)
    return math.sqrt(max(0.0, moments.norm - spread)), math.sqrt(moments.norm + spread)


def check_bounds(
    network: str = "res3",
    depth: int = 100,
    width: int = 40,
    *,
    beta: float = 0.5,
    delta: float = 0.05,
    distribution: str = "normal",
    count: int = 10_000,
    gradients: int = 1_000,
    seed: int = 0,
) -> list[Violations]:
    """Count how often each bound that applies fails.

    res-3 with normal weights is simulated exactly in O(1) per layer; uniform weights and gradients need the matrices.

    Args:
        network: "res1" or "res3".
        depth: L.
        width: d, at least 2.
        beta: exponent of the residual scale.
        delta: the probability of failure promised.
        distribution: of the weights.
        count: networks for the hidden states.
        gradients: networks for the gradients; 0 leaves them out.
        seed: of the random numbers.

    Returns:
        Markov's bound; for res-3 with normal weights Cantelli's, Chebyshev's interval for the norm and at beta = 1/2
        the SDE's interval, which is no bound but what the limit predicts; then the gradients' bound.

    Raises:
        TypeError: for numbers that are not whole.
        ValueError: for unknown names, numbers out of range.
    """
    name, weights = check_network(network), check_distribution(distribution)
    whole("depth", depth)
    whole("width", width, 2)
    whole("count", count, 100)
    whole("gradients", gradients, 0)
    share("delta", delta)
    markov = hidden_bound(name, depth, beta=beta, delta=delta)
    exact = name == "res3" and weights == "normal"
    if exact:
        norm, moved = norms(depth, width, count, beta=beta, rng=np.random.default_rng(seed))
    else:
        start = uniform_directions(count, width, torch.Generator().manual_seed(seed)).unsqueeze(1)
        generator = torch.Generator().manual_seed(seed + 1)
        end = propagate(name, start, depth, beta=beta, distribution=weights, generator=generator)
        norm = end.squeeze(1).double().square().sum(-1).numpy()
        moved = (end - start).squeeze(1).double().square().sum(-1).numpy()
    hidden = "|h_L - h_0| / |h_0|"
    found = [_count(f"{hidden}, Markov", np.sqrt(moved), 0.0, markov, delta)]
    if exact:
        cantelli = hidden_bound(name, depth, beta=beta, delta=delta, method="cantelli", width=width)
        found.append(_count(f"{hidden}, Cantelli", np.sqrt(moved), 0.0, cantelli, delta))
        interval = norm_interval(depth, width, beta=beta, delta=delta)
        found.append(_count("|h_L| / |h_0|, Chebyshev", np.sqrt(norm), *interval, delta))
        law = sde("res3", width).law()
        if beta == 0.5 and law is not None:
            low, high = np.exp(law.quantile(np.array([delta / 2, 1 - delta / 2])) / 2)
            found.append(_count("|h_L| / |h_0|, the SDE's interval", np.sqrt(norm), float(low), float(high), delta))
    if gradients:
        ratios = gradient_ratios(name, depth, width, gradients, beta=beta, distribution=weights, seed=seed)
        bound = gradient_bound(name, depth, beta=beta, delta=delta)
        found.append(_count("|g_L - g_0| / |g_L|, Markov", ratios, 0.0, bound, delta))
    return found


@torch.no_grad()
def gradient_ratios(
    network: Network,
    depth: int,
    width: int,
    count: int,
    *,
    beta: float = 0.5,
    distribution: Distribution = "normal",
    seed: int = 0,
) -> Array:
    """Simulate `|g_L - g_0| / |g_L|` by backpropagation in `count` networks, with normal input and read-out. [count].

    The other arguments are those of :func:`check_bounds`.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = depth**-beta

    def matrices(size: int) -> torch.Tensor:
        weights = torch.empty(size, width, width)
        if distribution == "normal":
            return weights.normal_(0, width**-0.5, generator=generator)
        return weights.uniform_(-math.sqrt(3 / width), math.sqrt(3 / width), generator=generator)

    batch = max(1, _KEPT // (2 * depth * width**2))
    found = []
    for first in range(0, count, batch):
        size = min(batch, count - first)
        h = uniform_directions(size, width, generator).unsqueeze(-1)
        kept = []
        for _ in range(depth):
            inner = matrices(size) if network == "res3" else None
            outer = matrices(size)
            hidden = h if inner is None else inner @ h
            kept.append((inner, outer, hidden > 0))
            h = h + scale * (outer @ hidden.relu())
        last = uniform_directions(size, width, generator).unsqueeze(-1)
        g = last
        for inner, outer, active in reversed(kept):
            back = active * (outer.mT @ g)
            g = g + scale * (back if inner is None else inner.mT @ back)
        found.append((g - last).squeeze(-1).double().norm(dim=-1))
    return torch.cat(found).numpy()


def _mean_moved(network: Network, depth: int, beta: float) -> float:
    """E X, or for res-1 an upper bound of it; expm1 keeps the digits of small ones."""
    share = 0.5 if network == "res3" else 1.0
    return math.expm1(depth * math.log1p(share * depth ** (-2 * beta)))


def _count(what: str, ratios: Array, low: float, high: float, promised: float) -> Violations:
    from scipy.stats import binomtest

    outside = int(np.sum((ratios > high) | (ratios < low)))
    share = promised / 2 if low > 0 else promised
    interval = tuple(binomtest(outside, len(ratios)).proportion_ci(method="wilson"))
    quantile = float(np.quantile(ratios, 1 - share))
    return Violations(what, low, high, promised, len(ratios), outside, interval, quantile)
