"""The networks res-1 and res-3 with independent weights, drawn by their law and not weight by weight.

`res1`: `h <- h + L^-beta V relu(h)`; `res3`: `h <- h + L^-beta V relu(W h)`; weights of variance 1/width,
new ones in each of the L layers. A matrix of independent normal entries acts on k vectors of width d only
through a normal [d, k] matrix times the root of their Gram matrix: for few inputs an exact draw of a layer
costs O(k d) normals in place of the d^2 entries. The norms of one input through res-3 need O(1) numbers.

Source of the networks: Marion, Fermanian, Biau, Vert, arXiv 2206.06929, as SCIENCE gives them: no biases.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.util.checks import one_of

__all__ = [
    "Distribution",
    "Network",
    "check_distribution",
    "check_network",
    "normal_image",
    "norms",
    "propagate",
    "uniform_directions",
]

Network = Literal["res1", "res3"]
Distribution = Literal["normal", "uniform"]
# Entries of weight matrices alive at once: 32 MB of float32.
_CHUNK = 8_000_000


def check_network(network: str) -> Network:
    """Return the network's name, or raise ValueError."""
    return one_of("network", network, get_args(Network))  # type: ignore[arg-type]


def check_distribution(distribution: str) -> Distribution:
    """Return the distribution's name, or raise ValueError."""
    return one_of("distribution", distribution, get_args(Distribution))  # type: ignore[arg-type]


def uniform_directions(count: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Return unit vectors drawn uniformly: the direction of `h_0 = A x` for normal A [count, width]."""
    x = torch.randn(count, width, generator=generator)
    return x / x.norm(dim=-1, keepdim=True)


def gram_root(x: Tensor) -> Tensor:
    """Return a root `C` of the Gram matrix, `C C^T = x x^T`, also of dependent vectors.

    Args:
        x: k vectors each. [..., k, width]
    """
    if x.shape[-2] == 1:
        return x.norm(dim=-1, keepdim=True)
    return symmetric_root(x @ x.mT)


def symmetric_root(gram: Tensor) -> Tensor:
    """Return the symmetric root of positive semidefinite matrices [..., k, k]."""
    if gram.shape[-1] == 1:
        return gram.clamp(min=0).sqrt()
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def normal_image(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw `V x` for a new matrix V [width, width] of independent normal entries of variance 1/width, exactly.

    Args:
        x: for each network the vectors that this one V maps. [networks, inputs, width]
        generator: for the random numbers.

    Returns:
        Their images. [networks, inputs, width]
    """
    normals = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return gram_root(x) @ normals / math.sqrt(x.shape[-1])


def _uniform_image(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """The same with uniform entries, for which there is no way around the matrices."""
    networks, _, width = x.shape
    out = torch.empty_like(x)
    size = max(1, _CHUNK // width**2)
    for start in range(0, networks, size):
        part = x[start : start + size]
        shape = (len(part), width, width)
        weights = torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
        out[start : start + size] = part @ weights.mul_(2).sub_(1).mul_(math.sqrt(3 / width))
    return out


@torch.no_grad()
def propagate(
    network: Network,
    start: Tensor,
    depth: int,
    *,
    beta: float = 0.5,
    distribution: Distribution = "normal",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the last states of networks of independent weights.

    Args:
        network: "res1" or "res3".
        start: the first states; the inputs of one network share its weights. [networks, inputs, width]
        depth: number of layers L.
        beta: exponent of the residual scale `L^-beta`.
        distribution: of the weights, "normal" or "uniform", of variance 1/width.
        generator: for the random numbers.

    Returns:
        The last states. [networks, inputs, width]
    """
    image = normal_image if distribution == "normal" else _uniform_image
    h = start.clone()
    for _ in range(depth):
        inner = h if network == "res1" else image(h, generator)
        h.add_(image(inner.relu(), generator), alpha=depth**-beta)
    return h


def norms(
    depth: int, width: int, count: int, *, beta: float = 0.5, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw `|h_L|^2 / |h_0|^2` and `|h_L - h_0|^2 / |h_0|^2` of res-3 with normal weights, exactly in law.

    Given `h`, `W h` is normal with independent entries, so `|relu(W h)|^2 = |h|^2 R / d` where R is a sum of
    squares of K normals, K binomial(d, 1/2); and `V relu(W h)` has no preferred direction. So the state
    enters by its component along `h_0` and the length of the rest only: five random numbers per layer.

    Args:
        depth: number of layers L.
        width: d, at least 2.
        count: number of networks, one input each.
        beta: exponent of the residual scale.
        rng: numpy's random generator.

    Returns:
        The two squared ratios. [count] each
    """
    along, across = np.ones(count), np.zeros(count)
    for _ in range(depth):
        active = rng.binomial(width, 0.5, size=count)
        squares = 2 * rng.standard_gamma(active / 2)
        size = np.sqrt((along**2 + across**2) * squares) * (depth**-beta / width)
        rest = 2 * rng.standard_gamma((width - 2) / 2, size=count) if width > 2 else 0.0
        along += size * rng.standard_normal(count)
        across = np.sqrt((across + size * rng.standard_normal(count)) ** 2 + size**2 * rest)
    return along**2 + across**2, (along - 1) ** 2 + across**2
