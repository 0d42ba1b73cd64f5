"""Loss against learning rate for each depth, and where it is least.

The best rate of a depth is the lowest point of the parabola, in the logarithm of the rate, through the best rate tried
and its two neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from abyssal.util.stats import student

__all__ = ["Losses", "Optimum", "lowest_point"]


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one depth.

    Attributes:
        depth: of the network.
        rate: where the mean loss over seeds is least.
        low: lower end of its 95 % interval; nan with one seed.
        high: upper end.
        loss: the least mean loss of the grid.
        by_seed: each seed's own best rate; nan where it diverged at all of them.
        at_edge: whether the best is the least or the largest rate tried: the optimum may lie beyond.
    """

    depth: int
    rate: float
    low: float
    high: float
    loss: float
    by_seed: tuple[float, ...]
    at_edge: bool


@dataclass(frozen=True)
class Losses:
    """Loss against learning rate for each depth.

    Attributes:
        rule: that was applied; "none" for none.
        depths: ascending.
        rates: base learning rates, ascending; what each role got of it is the rule's affair.
        seeds: of weights and data.
        losses: inf where the training diverged. [depths, rates, seeds]
        seconds: CPU time of all trainings, also of those that came out of the store.
    """

    rule: str
    depths: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    losses: np.ndarray = field(repr=False)
    seconds: float = 0.0

    @property
    def mean_losses(self) -> np.ndarray:
        """Mean loss over seeds, as [depths, rates]; inf where one of them diverged."""
        return np.asarray(self.losses.mean(axis=2))

    def optimum(self, depth: int) -> Optimum:
        """Return the best learning rate of a depth.

        The interval is the jackknife's over seeds, in the logarithm of the rate, its variance pooled over depths
        (two or three seeds of one depth say nothing of their own spread), with Student's law of
        depths x (seeds - 1) degrees of freedom. It does not cover what the grid and the parabola do.

        Raises:
            ValueError: for a depth that was not trained, or one that diverged at every rate.
        """
        self._check(depth)
        best, edges = self._best
        row = self.depths.index(depth)
        if not np.isfinite(best[row]):
            raise ValueError(f"Depth {depth} diverged at every learning rate: there is no best one. Try smaller ones.")
        half = self._error * self._quantile
        middle, x = float(best[row]), np.log2(self.rates)
        return Optimum(
            depth,
            2**middle,
            2 ** (middle - half),
            2 ** (middle + half),
            float(self.mean_losses[row].min()),
            tuple(2 ** lowest_point(x, self.losses[row, :, s])[0] for s in range(len(self.seeds))),
            bool(edges[row]),
        )

    @property
    def optima(self) -> tuple[Optimum, ...]:
        """The best learning rate of every depth that has one."""
        return tuple(
            self.optimum(depth) for depth, best in zip(self.depths, self._best[0], strict=True) if np.isfinite(best)
        )

    @property
    def shift(self) -> float:
        """log2 of the deepest network's best rate over the shallowest one's; nan where one has none."""
        best = self._best[0]
        return float(best[-1] - best[0])

    @property
    def shift_error(self) -> float:
        """Half of the shift's 95 % interval, from the spread over seeds; nan with one seed."""
        return self._error * self._quantile * math.sqrt(2)

    @property
    def span(self) -> float:
        """log2 of the largest best rate of any depth over the least; chance makes it larger, never smaller."""
        best = self._best[0]
        return float(best.max() - best.min())

    @property
    def transfers(self) -> bool | None:
        """Whether the best rate moves by less than one factor of 2 over the depths; None where that is not decided.

        True if the 95 % interval of the shift lies within a factor of 2 either way, False if it lies outside. Not
        decided with one seed, which gives no interval, or where one of the two best rates is the first or last tried.
        """
        error, edges = self.shift_error, self._best[1]
        if math.isnan(self.shift) or math.isnan(error):
            return None
        if edges[0] or edges[-1]:
            return None
        if abs(self.shift) + error < 1:
            return True
        return False if abs(self.shift) - error >= 1 else None

    def regret(self, depth: int) -> float:
        """Return what a depth loses if trained at the shallowest one's best rate, of the grid: a difference of losses.

        Raises:
            ValueError: for a depth that was not trained.
        """
        self._check(depth)
        mean = self.mean_losses
        row = mean[self.depths.index(depth)]
        return float(row[int(mean[0].argmin())] - row.min())

    def _check(self, depth: int) -> None:
        if depth not in self.depths:
            raise ValueError(f"depth {depth!r} was not trained; the depths are {', '.join(map(str, self.depths))}.")

    @property
    def _best(self) -> tuple[np.ndarray, np.ndarray]:
        """log2 of the best rate of the mean loss, and whether it is at an edge; [depths] each."""
        x = np.log2(self.rates)
        found = [lowest_point(x, row) for row in self.mean_losses]
        return np.array([place for place, _ in found]), np.array([edge for _, edge in found])

    @property
    def _error(self) -> float:
        """Standard error of log2 of a best rate: the jackknife's over seeds, pooled over depths."""
        count = len(self.seeds)
        if count < 2:
            return math.nan
        x, variances = np.log2(self.rates), []
        for row in self.losses[np.isfinite(self._best[0])]:
            left_out = [lowest_point(x, np.delete(row, s, axis=1).mean(axis=1))[0] for s in range(count)]
            variances.append((count - 1) * np.var(left_out))
        return math.sqrt(float(np.mean(variances))) if variances else math.nan

    @property
    def _quantile(self) -> float:
        return student(max(1, int(np.isfinite(self._best[0]).sum()) * (len(self.seeds) - 1)))


def lowest_point(x: np.ndarray, y: np.ndarray) -> tuple[float, bool]:
    """Return where the parabola through the least `y` and its neighbours is lowest, and whether that is at an edge.

    Args:
        x: ascending. [points]
        y: values; what is not finite is never the least, and beside it the point itself is taken. [points]

    Returns:
        Place, nan where no value is finite; and whether the least is the first or the last point.
    """
    y = np.where(np.isfinite(y), y, np.inf)
    i = int(y.argmin())
    if not math.isfinite(y[i]):
        return math.nan, False
    if i in (0, len(y) - 1):
        return float(x[i]), True
    left, right = x[i] - x[i - 1], x[i + 1] - x[i]
    down, up = (y[i - 1] - y[i]) / left, (y[i + 1] - y[i]) / right  # both at least 0
    if not math.isfinite(down + up) or down + up == 0:
        return float(x[i]), False
    # The parabola's slope is -down half way to the left neighbour and up half way to the right one.
    return float(x[i] - left / 2 + (left + right) / 2 * down / (down + up)), False
