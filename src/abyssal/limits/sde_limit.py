"""The SDE that a residual network of independent weights becomes at beta = 1/2 as depth grows.

res-3: `dH = |H| / sqrt(2 d) dB` with a d-dimensional Brownian motion, so that `log(|H_1|^2 / |H_0|^2)` is
normal of mean 1/2 - 1/d and variance 2/d (Ito's formula: the drift is `(d - 2) / (2 d)`, the noise
`sqrt(2 / d)`, both constant). res-1: `dH = d^-1/2 dB relu(H)` with a d x d Brownian motion, by
Euler-Maruyama. Derived for the networks of Marion, Fermanian, Biau, Vert, arXiv 2206.06929, whose abstract
announces such a limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.limits.comparison import Comparison, DepthLaw
from abyssal.limits.law import Empirical, Law, Normal, kolmogorov_smirnov, moments, wasserstein
from abyssal.limits.networks import (
    Distribution,
    Network,
    check_distribution,
    check_network,
    norms,
    propagate,
    symmetric_root,
    uniform_directions,
)
from abyssal.limits.strong import StrongErrors, strong_errors
from abyssal.util.checks import share, whole

__all__ = ["SdeLimit", "arc_cosine_kernel", "sde"]

Array = NDArray[np.float64]
# Numbers of one simulated batch: keeps the states in the cache, and the memory flat.
_BATCH = 2_000_000


@dataclass(frozen=True)
class SdeLimit:
    """The limit of a network of independent weights at beta = 1/2.

    Attributes:
        network: "res1" or "res3".
        width: d, at least 2.
    """

    network: Network
    width: int = 40

    def __post_init__(self) -> None:
        check_network(self.network)
        whole("width", self.width, 2)

    def law(self) -> Normal | None:
        """Return the exact law of `log(|H_1|^2 / |H_0|^2)`: res-3's; None for res-1, where none is known."""
        return Normal(0.5 - 1 / self.width, 2 / self.width) if self.network == "res3" else None

    def law_at_depth(self, depth: int) -> tuple[float, float]:
        """Return mean and variance of `log(|h_L|^2 / |h_0|^2)` to first order in 1/L: res-3, normal weights.

        The log ratio is a sum of L independent, equally distributed terms, `log(1 + 2 e z + e^2 |z|^2)` with
        `e^2 = R / (d^2 L)`; expanded in e, with the exact moments of R (E R = d/2, E R^2 = d^2/4 + 5d/4):

        mean     = 1/2 - 1/d - (1 + 5/d) (1 - 6/d + 8/d^2) / (8 L) + O(L^-2)
        variance = 2/d - (d + 34 - 100/d) / (4 d^2 L) + O(L^-2)

        Args:
            depth: L.

        Raises:
            ValueError: for res-1.
        """
        if self.network != "res3":
            raise ValueError("The law at finite depth is known for res3 only; simulate res1.")
        d = self.width
        whole("depth", depth)
        mean = 0.5 - 1 / d - (1 + 5 / d) * (1 - 6 / d + 8 / d**2) / (8 * depth)
        return mean, 2 / d - (d + 34 - 100 / d) / (4 * d**2 * depth)

    @torch.no_grad()
    def sample(self, count: int, *, start: Tensor | None = None, steps: int = 1000, seed: int = 0) -> Tensor:
        """Draw last states `H_1` by Euler-Maruyama.

        Several inputs through one limit are driven by one Brownian motion: given the states, their increments
        are jointly normal, independent between components, with the covariance `relu(H) relu(H)^T / d` for
        res-1 and for res-3 `E[relu(u) relu(v)] / d`, u and v normal with the covariance of the states (the
        arc-cosine kernel of Cho and Saul 2009; |H|^2 / (2 d) on its diagonal).

        Args:
            count: number of paths.
            start: the first states of all paths. [width] or [inputs, width]; None draws one direction per path.
            steps: of the scheme; its error in law is of order 1/steps.
            seed: of the random numbers.

        Returns:
            [count, width], or [count, inputs, width] for a start with inputs.

        Raises:
            ValueError: for a start of another width, or numbers below 1.
        """
        whole("count", count)
        whole("steps", steps)
        generator = torch.Generator().manual_seed(seed)
        states = self._start(count, start, generator)
        if self.network == "res1":
            out = propagate("res1", states, steps, generator=generator)
        else:
            out = states
            for _ in range(steps):
                root = symmetric_root(arc_cosine_kernel(out) / (self.width * steps))
                normals = torch.randn(out.shape, generator=generator, dtype=out.dtype)
                out = out + root @ normals
        return out.squeeze(1) if start is None or start.dim() == 1 else out

    def log_ratios(self, count: int, *, steps: int = 1000, seed: int = 0) -> Array:
        """Draw `log(|H_1|^2 / |H_0|^2)` for uniformly random first directions.

        Args:
            count: number of draws.
            steps: of Euler-Maruyama, for res-1; res-3's law is drawn exactly.
            seed: of the random numbers.

        Returns:
            [count]
        """
        whole("count", count)
        law = self.law()
        if law is not None:
            return np.random.default_rng(seed).normal(law.mean, math.sqrt(law.variance), count)
        whole("steps", steps)
        return _network_ratios("res1", self.width, steps, count, "normal", seed)

    def compare(
        self,
        depths: Sequence[int] = (10, 100, 1000),
        *,
        count: int = 20_000,
        distribution: str = "normal",
        steps: int | None = None,
        strong_depths: Sequence[int] = (32, 128, 512),
        paths: int = 32,
        level: float = 0.01,
        seed: int = 0,
    ) -> Comparison:
        """Compare networks of growing depth with the limit, in law and path by path.

        Normal weights cost O(1) random numbers per layer and network for res-3, O(width) for res-1; uniform
        weights cost O(width^2), so ask for fewer networks there (1,000 at width 40 and depth 1,000 take a minute).

        Args:
            depths: for the comparison in law.
            count: networks per depth, one input each, of uniformly random direction.
            distribution: of the network's weights: "normal" or "uniform". There is no coupling for uniform
                ones: the comparison path by path is left out.
            steps: of Euler-Maruyama for res-1's limit; None is twice the largest depth.
            strong_depths: for the comparison path by path; empty leaves it out. res-1 costs
                16 max(strong_depths) width^2 random numbers per path.
            paths: for the same.
            level: of the Kolmogorov-Smirnov test.
            seed: of the random numbers.

        Raises:
            TypeError: for numbers that are not whole.
            ValueError: for depths or numbers below 1, fewer than two draws, or an unknown distribution.
        """
        depths, strong_depths = tuple(depths), tuple(strong_depths)
        for depth in (*depths, *strong_depths):
            whole("depth", depth)
        if not depths:
            raise ValueError("compare needs at least one depth.")
        if len(set(strong_depths)) == 1:
            raise ValueError(f"strong_depths has to hold two different depths or none, got {list(strong_depths)}.")
        whole("count", count, 2)
        whole("paths", paths, 2)
        share("level", level)
        weights = check_distribution(distribution)
        steps = 2 * max(depths) if steps is None else whole("steps", steps)
        reference: Law = self.law() or Empirical(self.log_ratios(count, steps=steps, seed=seed))
        laws = []
        for i, depth in enumerate(depths):
            sample = np.sort(_network_ratios(self.network, self.width, depth, count, weights, seed + 1 + i))
            ks = kolmogorov_smirnov(sample, reference, level)
            laws.append(DepthLaw(depth, moments(sample), ks, wasserstein(sample, reference), sample))
        strong: tuple[StrongErrors, ...] = ()
        if strong_depths and weights == "normal":
            strong = strong_errors(self.network, self.width, strong_depths, paths=paths, seed=seed)
        return Comparison(self.network, self.width, weights, count, reference, tuple(laws), strong)

    def _start(self, count: int, start: Tensor | None, generator: torch.Generator) -> Tensor:
        """First states [count, inputs, width]."""
        if start is None:
            return uniform_directions(count, self.width, generator).unsqueeze(1)
        if start.dim() not in (1, 2) or start.shape[-1] != self.width or not start.is_floating_point():
            raise ValueError(
                f"start has to be a floating [width] or [inputs, width] with width {self.width}, got "
                f"{start.dtype} {tuple(start.shape)}."
            )
        if not start.isfinite().all():
            raise ValueError("start has to be finite.")
        return start.detach().reshape(-1, self.width).expand(count, -1, -1).clone()


def sde(network: str, width: int = 40) -> SdeLimit:
    """Return the SDE limit of a network of independent weights with residual scale L^-1/2.

    Args:
        network: "res1" or "res3".
        width: d, at least 2.

    Raises:
        TypeError: for a width that is not a whole number.
        ValueError: for an unknown network, or a width below 2.
    """
    return SdeLimit(check_network(network), width)


def arc_cosine_kernel(h: Tensor) -> Tensor:
    """Return `E[relu(u_i) relu(u_j)]` for normal u of covariance `h h^T`.

    Args:
        h: [..., inputs, width]

    Returns:
        [..., inputs, inputs]
    """
    size = h.norm(dim=-1, keepdim=True)
    sizes = size @ size.mT
    cosine = torch.where(sizes > 0, (h @ h.mT) / sizes.clamp(min=torch.finfo(h.dtype).tiny), 0.0).clamp(-1, 1)
    angle = cosine.arccos()
    kernel = sizes / (2 * math.pi) * ((1 - cosine.square()).sqrt() + (math.pi - angle) * cosine)
    # arccos loses half the digits where two inputs coincide; the diagonal is known.
    kernel.diagonal(dim1=-2, dim2=-1).copy_(size.squeeze(-1).square() / 2)
    return kernel


def _network_ratios(
    network: Network, width: int, depth: int, count: int, distribution: Distribution, seed: int
) -> Array:
    """Draw `log(|h_L|^2 / |h_0|^2)` at beta = 1/2 [count]."""
    if network == "res3" and distribution == "normal":
        return np.log(norms(depth, width, count, rng=np.random.default_rng(seed))[0])
    generator = torch.Generator().manual_seed(seed)
    found = []
    batch = max(1, _BATCH // width)
    for first in range(0, count, batch):
        start = uniform_directions(min(batch, count - first), width, generator).unsqueeze(1)
        end = propagate(network, start, depth, distribution=distribution, generator=generator)
        found.append(end.squeeze(1).double().square().sum(dim=-1).log())
    return torch.cat(found).numpy()
