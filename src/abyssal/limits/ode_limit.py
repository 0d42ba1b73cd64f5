"""The ODE that a residual network of depth-smooth weights becomes at beta = 1 as depth grows.

`dH/ds = V(s) relu(W(s) H)` for res-3 and `dH/ds = V(s) relu(H)` for res-1 on [0, 1], every entry of V and W
an independent path of one family divided by the root of the width. The network of depth L takes the same
paths at `s = n/L`, so that its distance to the ODE is that of Euler's method: of order 1/L where the paths
are continuously differentiable.

Source of the networks: Marion, Fermanian, Biau, Vert, arXiv 2206.06929.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from abyssal.limits.networks import Network, check_network, uniform_directions
from abyssal.limits.path_errors import PathErrors
from abyssal.report.axes import COLOURS, Plotted, new_figure
from abyssal.util.checks import whole
from abyssal.weights.families import Family, GaussianProcess, family

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OdeComparison", "OdeLimit", "ode"]

_MAX_BYTES = 2**31


@dataclass(frozen=True, eq=False)
class OdeComparison(PathErrors, Plotted):
    """Distances `|h_L - H_1| / |h_0|` of networks of growing depth from their ODE, path by path.

    Attributes, after those of `PathErrors`:
        network: "res1" or "res3".
        width: d.
        family: of the weights along the depth.
        solver_error: root mean square distance of the ODE's solution from that with steps twice as long; the
            solution itself is better.
    """

    network: Network
    width: int
    family: Family
    solver_error: float

    def __str__(self) -> str:
        """Show the errors as a table."""
        rows = zip(self.depths, self.errors, self.standard_errors, strict=True)
        return "\n".join(
            [
                f"{self.network}, width {self.width}, weights {self.family}, beta = 1: {len(self.squares)} models",
                f"{'depth':>6}  {'|h_L - H| / |h_0|':>20}",
                *(f"{depth:>6}  {error:>11.5f} ±{standard:.5f}" for depth, error, standard in rows),
                f"power of the depth: {self.slope}; error of the solver below {self.solver_error:.1e}",
            ]
        )

    def figure(self) -> Figure:
        """Return the errors against depth."""
        figure, (axes,) = new_figure(1)
        self.draw(axes, COLOURS[0], -1, "1")
        axes.set_title(f"{self.network}, width {self.width}: distance to the ODE")
        axes.legend(frameon=False)
        return figure


@dataclass(frozen=True)
class OdeLimit:
    """The limit of a network with one family of weight paths at beta = 1.

    Attributes:
        network: "res1" or "res3".
        width: d, at least 1.
        family: of the paths, drawn on a grid of [0, 1].
    """

    network: Network
    width: int
    family: Family

    def compare(
        self, depths: Sequence[int] = (20, 40, 80, 160), *, models: int = 8, refinement: int = 8, seed: int = 0
    ) -> OdeComparison:
        """Measure the distance of networks of growing depth from the ODE with the same weight paths.

        The paths are drawn on a grid that contains the points of every depth, and the ODE is solved on it by
        the classical Runge-Kutta method, each of whose steps spans two points of the grid.

        Args:
            depths: at least two different ones. Depths with a small common multiple need a small grid.
            models: networks, each with weights and one input (of uniformly random direction) of its own.
            refinement: least number of grid points per layer of the deepest network.
            seed: of the random numbers.

        Raises:
            TypeError: for numbers that are not whole.
            ValueError: for fewer than two depths or models, numbers below 1, or a grid beyond 2 GiB.
        """
        depths = tuple(depths)
        for depth in depths:
            whole("depth", depth)
        if len(set(depths)) < 2:
            raise ValueError(f"compare needs at least two different depths, got {list(depths)}.")
        whole("models", models, 2)
        whole("refinement", refinement, 2)
        grid = self._grid(depths, refinement)
        generator = torch.Generator().manual_seed(seed)
        squares, solver = np.empty((models, len(depths))), np.empty(models)
        for i in range(models):
            start = uniform_directions(1, self.width, generator)[0].double()
            weights = self._paths(grid, generator)
            end = self._solve(weights, start, stride=1)
            solver[i] = (end - self._solve(weights, start, stride=2)).square().sum()
            for j, depth in enumerate(depths):
                squares[i, j] = (self._network(weights, start, depth) - end).square().sum()
        solver_error = float(np.sqrt(solver.mean()))
        return OdeComparison(depths, squares, self.network, self.width, self.family, solver_error)

    def _grid(self, depths: Sequence[int], refinement: int) -> int:
        """Number of intervals: a multiple of all depths, and of 4 for two step lengths of Runge-Kutta."""
        common = math.lcm(4, *depths)
        grid = common * max(1, math.ceil(refinement * max(depths) / common))
        size = 8 * (grid + 1) * self._matrices() * self.width**2
        if size > _MAX_BYTES:
            raise ValueError(
                f"The depths {list(depths)} need a common grid of {grid} points, {size / 2**30:.1f} GiB of weights at "
                f"width {self.width}. Take depths with a small common multiple (powers of 2), or a smaller width."
            )
        return grid

    def _matrices(self) -> int:
        return 1 if self.network == "res1" else 2

    def _paths(self, grid: int, generator: torch.Generator) -> Tensor:
        """Weights. [grid + 1, matrices, width, width]."""
        count = self._matrices() * self.width**2
        paths = self.family.sample(grid + 1, count, generator, dtype=torch.float64)
        return paths.div_(math.sqrt(self.width)).reshape(grid + 1, self._matrices(), self.width, self.width)

    def _velocity(self, weights: Tensor, h: Tensor) -> Tensor:
        inner = h if self.network == "res1" else weights[1] @ h
        return weights[0] @ inner.relu()

    def _network(self, weights: Tensor, h: Tensor, depth: int) -> Tensor:
        for n in range(depth):
            h = h + self._velocity(weights[n * (len(weights) - 1) // depth], h) / depth
        return h

    def _solve(self, weights: Tensor, h: Tensor, stride: int) -> Tensor:
        """The classical Runge-Kutta method with steps of 2 `stride` points of the grid."""
        size = 2 * stride / (len(weights) - 1)
        for n in range(0, len(weights) - 1, 2 * stride):
            left, middle, right = weights[n], weights[n + stride], weights[n + 2 * stride]
            a = self._velocity(left, h)
            b = self._velocity(middle, h + size / 2 * a)
            c = self._velocity(middle, h + size / 2 * b)
            d = self._velocity(right, h + size * c)
            h = h + size / 6 * (a + 2 * b + 2 * c + d)
        return h


def ode(
    network: str,
    width: int = 40,
    paths: Family | str = "rbf",
    *,
    length_scale: float = 0.1,
    hurst: float | None = None,
) -> OdeLimit:
    """Return the ODE limit of a network with depth-smooth weights and residual scale 1/L.

    Args:
        network: "res1" or "res3".
        width: d, at least 1.
        paths: of the weights along the depth: a family, or a name. The kernels' names ("rbf", "matern12", "matern32",
            "matern52") mean here the values of the process, not its normalised increments; the other names are
            those of :func:`abyssal.weights.families.family`. Only "rbf", "matern32" and "matern52" have the
            differentiable paths for which the rate is 1/L by theory; the others are there to see what they do.
        length_scale: of a kernel named.
        hurst: of a family named that has one.

    Raises:
        TypeError: for a width that is not a whole number.
        ValueError: for an unknown network or family, or a bad parameter.
    """
    check_network(network)
    whole("width", width)
    if not isinstance(paths, Family):
        kernels = ("rbf", "matern12", "matern32", "matern52")
        if paths in kernels and hurst is None:
            paths = GaussianProcess(paths, length_scale, increments=False)
        else:
            paths = family(paths, hurst)
    return OdeLimit(check_network(network), width, paths)
