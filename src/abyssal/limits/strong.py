"""Strong errors: a network and its SDE driven by the same Brownian motion, path by path.

res-1 with normal weights *is* an Euler-Maruyama scheme: its weight `V_l` is the increment of the d x d
Brownian motion over `[l/L, (l+1)/L]`, scaled. So both are driven by one motion, and the distance falls like
`L^-1/2`, the strong order of that scheme for noise that multiplies the state.

res-3's increments `V relu(W h)` are not normal but mixtures of normals: given `R = d |relu(W h)|^2 / |h|^2`
(a sum of squares of binomially many normals, independent of everything before) the increment is that of
a d-dimensional Brownian motion over a time `2 R / (d L)` of mean 1/L. So the network is, exactly, an
Euler-Maruyama scheme for its SDE on a clock of its own (Skorokhod's embedding). On that clock the distance
falls like `L^-1/2` as well. At time 1 there is also the distance between the two clocks, of variance
`5 / (d L)`, which the Brownian motion turns into a distance of order `(d L)^-1/4`: the rate of this
coupling, and no statement that there is none better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abyssal.limits.networks import Network, uniform_directions
from abyssal.limits.path_errors import PathErrors

__all__ = ["StrongErrors", "strong_errors"]


@dataclass(frozen=True, eq=False)
class StrongErrors(PathErrors):
    """Distances `|h_L - H_1| / |h_0|` between the last states of network and SDE under one Brownian motion.

    Attributes, after those of `PathErrors`:
        clock: what the comparison was made on: "time 1", or "the network's own clock" (see the module).
        refinement: steps of the SDE's own scheme per layer of the deepest network; the scheme's error makes
            the squared errors wrong by about one part in `refinement`.
    """

    clock: str
    refinement: int


@torch.no_grad()
def strong_errors(
    network: Network, width: int, depths: Sequence[int], *, paths: int = 32, refinement: int = 16, seed: int = 0
) -> tuple[StrongErrors, ...]:
    """Measure strong errors at growing depth.

    Args:
        network: "res1" or "res3"; weights are normal.
        width: d.
        depths: at least two different ones.
        paths: networks, each with a Brownian motion of its own.
        refinement: least number of steps of the SDE's scheme per layer.
        seed: of the random numbers.

    Returns:
        For res-1 the errors at time 1; for res-3 those at time 1, then those on the network's own clock.
    """
    generator = torch.Generator().manual_seed(seed)
    if network == "res1":
        found = _res1(width, depths, paths, refinement, generator)
    else:
        found = np.empty((2, paths, len(depths)))
        for i, depth in enumerate(depths):
            network_end, *ends = _res3(width, depth, paths, refinement, generator)
            for j, end in enumerate(ends):
                found[j, :, i] = (network_end - end).square().sum(dim=-1)
    clocks = ("time 1", "the network's own clock")
    return tuple(StrongErrors(tuple(depths), *pair, refinement) for pair in zip(found, clocks, strict=False))


def _res1(
    width: int, depths: Sequence[int], paths: int, refinement: int, generator: torch.Generator
) -> NDArray[np.float64]:
    """Squared relative errors [1, paths, depths]."""
    steps = math.lcm(*depths)
    steps *= max(1, math.ceil(refinement * max(depths) / steps))
    start = uniform_directions(paths, width, generator)
    fine = start.clone()
    coarse = [start.clone() for _ in depths]
    driven = [torch.zeros(paths, width, width) for _ in depths]
    scale = 1 / math.sqrt(width * steps)
    increment = torch.empty(paths, width, width)
    for step in range(1, steps + 1):
        increment.normal_(generator=generator).mul_(scale)
        fine = fine + _apply(increment, fine)
        for i, depth in enumerate(depths):
            driven[i].add_(increment)
            if step % (steps // depth) == 0:
                coarse[i] = coarse[i] + _apply(driven[i], coarse[i])
                driven[i].zero_()
    squares = [(h - fine).double().square().sum(dim=-1) for h in coarse]
    return torch.stack(squares, dim=-1).unsqueeze(0).numpy()


def _apply(weights: Tensor, h: Tensor) -> Tensor:
    """`V relu(h)`, one V per path [paths, width]."""
    return (weights @ h.relu().unsqueeze(-1)).squeeze(-1)


def _res3(
    width: int, depth: int, paths: int, refinement: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Last states of the network, of the SDE at time 1, and of the SDE on the network's clock. [paths, width] each."""

    def increment(duration: Tensor) -> Tensor:
        return torch.randn(paths, width, generator=generator, dtype=torch.float64) * duration.sqrt().unsqueeze(-1)

    def move(h: Tensor, brownian: Tensor) -> Tensor:
        return h + h.norm(dim=-1, keepdim=True) * brownian / math.sqrt(2 * width)

    network = uniform_directions(paths, width, generator).double()
    on_clock, at_one = network.clone(), network.clone()
    time = torch.zeros(paths, dtype=torch.float64)
    for _ in range(depth):
        hidden = torch.randn(paths, width, generator=generator, dtype=torch.float64).relu()
        duration = hidden.square().sum(dim=-1) * (2 / (width * depth * refinement))
        driven = torch.zeros_like(network)
        for _ in range(refinement):
            # Time 1 is a point of the grid: the increment that crosses it is drawn in two parts.
            until_one = torch.minimum(duration, (1 - time).clamp(min=0))
            before = increment(until_one)
            whole = before + increment(duration - until_one)
            at_one, on_clock, driven = move(at_one, before), move(on_clock, whole), driven + whole
            time = time + duration
        network = move(network, driven)
    missing = (1 - time).clamp(min=0)
    extra = math.ceil(missing.max().item() * depth * refinement)
    for _ in range(extra):
        at_one = move(at_one, increment(missing / extra))
    return network, at_one, on_clock
