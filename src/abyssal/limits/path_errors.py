"""Errors of networks of growing depth, path by path, and the power of the depth that they follow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from abyssal.limits.law import Slope, root_mean_square, slope
from abyssal.report.axes import power_guide

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PathErrors"]


@dataclass(frozen=True, eq=False)
class PathErrors:
    """Errors of networks of growing depth, path by path.

    Attributes:
        depths: of the network.
        squares: the squared relative errors. [paths, depths]
    """

    depths: tuple[int, ...]
    squares: NDArray[np.float64]

    @property
    def errors(self) -> tuple[float, ...]:
        """Root mean square over paths. [depths]."""
        return tuple(root_mean_square(self.squares)[0].tolist())

    @property
    def standard_errors(self) -> tuple[float, ...]:
        """Of those. [depths]."""
        return tuple(root_mean_square(self.squares)[1].tolist())

    @cached_property
    def slope(self) -> Slope:
        """The power of the depth they follow."""
        return slope(self.depths, self.squares)

    def draw(self, axes: Axes, colour: str, guide: float, named: str, where: str = "") -> None:
        """Draw the errors against depth, and a dotted line of a power that theory knows."""
        label = f"{where}power {self.slope.value:.2f}"
        axes.errorbar(self.depths, self.errors, self.standard_errors, marker="o", capsize=2, color=colour, label=label)
        power_guide(axes, list(self.depths), self.errors[0], guide, f"power −{named}")
        axes.set(xscale="log", yscale="log", xlabel="depth L", ylabel="|h_L − H| / |h_0|")
        axes.set_xticks(self.depths, [str(n) for n in self.depths])
        axes.minorticks_off()
