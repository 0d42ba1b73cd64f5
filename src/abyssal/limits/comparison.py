"""A network of growing depth against its SDE: the figures, a table of them, a plot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from abyssal.limits.law import KolmogorovSmirnov, Law, Moments, Wasserstein
from abyssal.limits.networks import Distribution, Network
from abyssal.limits.strong import StrongErrors
from abyssal.report.axes import COLOURS, LIMIT, Plotted, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Comparison", "DepthLaw"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DepthLaw:
    """The law of `log(|h_L|^2 / |h_0|^2)` at one depth, against the limit's.

    Attributes:
        depth: L.
        moments: mean and variance, with standard errors.
        ks: the Kolmogorov-Smirnov comparison with the limit.
        wasserstein: the Wasserstein-1 distance to the limit.
        sample: the draws, sorted.
    """

    depth: int
    moments: Moments
    ks: KolmogorovSmirnov
    wasserstein: Wasserstein
    sample: Array


@dataclass(frozen=True, eq=False)
class Comparison(Plotted):
    """A network of growing depth against its SDE.

    Attributes:
        network: "res1" or "res3".
        width: d.
        distribution: of the network's weights.
        count: networks per depth.
        reference: the limit's law: known for res-3, a sample for res-1.
        laws: the comparison in law, one entry per depth.
        strong: the comparison path by path (none if it was not asked for).
    """

    network: Network
    width: int
    distribution: Distribution
    count: int
    reference: Law
    laws: tuple[DepthLaw, ...]
    strong: tuple[StrongErrors, ...]

    def __str__(self) -> str:
        """Show both comparisons as tables."""
        known = "exact" if math.isinf(self.reference.count) else f"{self.reference.count:.0f} simulated paths"
        lines = [
            f"{self.network}, {self.distribution} weights, width {self.width}: log(|h_L|^2 / |h_0|^2) of "
            f"{self.count} networks per depth against the SDE's ({known})",
            " depth              mean          variance       KS  critical  Wasserstein    noise",
        ]
        for law in self.laws:
            ks, area = law.ks, law.wasserstein
            lines.append(
                f"{law.depth:>6}  {_shown(law.moments)}  {ks.statistic:>7.4f}  {ks.critical:>8.4f}  "
                f"{area.distance:>11.4f}  {area.noise:>7.4f}{'  laws differ' if ks.rejects else ''}"
            )
        lines.append(f"{'limit':>6}  {_shown(self.reference.moments)}")
        for strong in self.strong:
            pairs = zip(strong.depths, strong.errors, strong.standard_errors, strict=True)
            lines += [
                f"strong error at {strong.clock}, {len(strong.squares)} paths, root mean square of |h_L - H| / |h_0|:",
                "        " + "  ".join(f"L = {n}: {e:.4f} ±{s:.4f}" for n, e, s in pairs),
                f"        power of the depth: {strong.slope}",
            ]
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Return the densities, and the strong errors against depth."""
        figure, axes = new_figure(2 if self.strong else 1)
        self._draw_densities(axes[0])
        if self.strong:
            self._draw_strong(axes[1])
        return figure

    def _draw_densities(self, axes: Axes) -> None:
        ends = self.reference.quantile(np.array([5e-4, 1 - 5e-4]))
        margin = 0.15 * (ends[1] - ends[0])
        x = np.linspace(ends[0] - margin, ends[1] + margin, 61)
        for i, law in enumerate(self.laws):
            height = np.histogram(law.sample, x)[0] / law.sample.size / np.diff(x)
            axes.stairs(height, x, color=COLOURS[i % len(COLOURS)], label=f"L = {law.depth}")
        density = np.diff(self.reference.cdf(x)) / np.diff(x)
        axes.plot((x[1:] + x[:-1]) / 2, density, color=LIMIT, linewidth=1.6, label="SDE")
        title = f"{self.network}, width {self.width}, {self.distribution} weights"
        axes.set(xlabel="log(|h_L|² / |h_0|²)", ylabel="density", title=title)
        axes.legend(frameon=False)

    def _draw_strong(self, axes: Axes) -> None:
        # res-1's one error, and that on res-3's own clock, fall by the scheme's power; see `strong.py`.
        powers = [(-0.5, "1/2")] if len(self.strong) == 1 else [(-0.25, "1/4"), (-0.5, "1/2")]
        for strong, colour, (power, named) in zip(self.strong, COLOURS, powers, strict=False):
            strong.draw(axes, colour, power, named, f"at {strong.clock}: ")
        axes.set_title("one Brownian motion for both")
        axes.legend(frameon=False)


def _shown(m: Moments) -> str:
    return f"{m.mean:>8.4f} ±{m.mean_error:.4f}  {m.variance:>8.4f} ±{m.variance_error:.4f}"
