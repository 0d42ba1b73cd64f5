"""Powers of a size, with intervals, and verdicts that say when a size of the experiment does not decide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from abyssal.papers.experiment import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from abyssal.util.stats import Slope

__all__ = ["above", "below", "by_size", "label_sizes", "power", "within"]


def by_size(rows: Sequence[Row], size: str, value: str, **where: object) -> tuple[list[int], np.ndarray]:
    """Return a column against the size of what was measured, by seed.

    Args:
        rows: each with a `seed`.
        size: the column of the abscissa, such as "depth".
        value: the column; rows where it is None are left out.
        where: other columns, and what they have to be.

    Returns:
        Sizes, ascending, and values; the seeds in their order. [sizes], [sizes, seeds]

    Raises:
        ValueError: where seeds are missing at some size.
    """
    found: dict[int, dict[object, float]] = {}
    for row in rows:
        if row[value] is not None and all(row[name] == wanted for name, wanted in where.items()):
            found.setdefault(int(_number(row, size)), {})[row["seed"]] = _number(row, value)
    sizes = sorted(found)
    seeds = {frozenset(values) for values in found.values()}
    if len(seeds) > 1:
        raise ValueError(f"{value} against {size}: not every seed was measured at every {size}")
    order = sorted(next(iter(seeds), frozenset()), key=str)
    return sizes, np.array([[found[n][seed] for seed in order] for n in sizes], dtype=float).reshape(
        len(sizes), len(order)
    )


def power(sizes: Sequence[float], values: np.ndarray) -> Slope:
    """Fit `value = c_seed size^p` by least squares in logarithms, one constant per seed.

    The interval is Student's, 95 %; residuals hold noise and what is not a power alike. A seed with a value that is
    not positive and finite is left out.

    Args:
        sizes: [sizes]
        values: [sizes, seeds]
    """
    from abyssal.util.stats import Slope, student

    x = np.log(np.asarray(sizes, dtype=float))
    usable = (np.isfinite(values) & (values > 0)).all(axis=0)
    if len(x) < 2 or not usable.any():
        return Slope(math.nan, math.nan, math.nan)
    y = np.log(values[:, usable])
    dx, dy = x - x.mean(), y - y.mean(axis=0)
    total = dx @ dx * y.shape[1]
    p = float((dx @ dy).sum() / total)
    freedom = y.size - y.shape[1] - 1
    half = math.nan
    if freedom > 0:
        residuals = dy - p * dx[:, None]
        half = student(freedom) * math.sqrt(float((residuals**2).sum()) / freedom / total)
    return Slope(p, p - half, p + half, math.exp(x.mean()), math.exp(y.mean()), y.size)


def below(slope: Slope, bound: float) -> bool | None:
    """Whether a power is below a bound; None where its interval holds the bound, or there is none."""
    return True if slope.high < bound else False if slope.low > bound else None


def above(slope: Slope, bound: float) -> bool | None:
    """Whether a power is above a bound; None where its interval holds the bound, or there is none."""
    return True if slope.low > bound else False if slope.high < bound else None


def within(slope: Slope, value: float, margin: float) -> bool | None:
    """Whether a power is a value up to a margin; None where its interval reaches across the margin's end."""
    lower, upper = above(slope, value - margin), below(slope, value + margin)
    if lower is False or upper is False:
        return False
    return True if lower and upper else None


def label_sizes(axes: Axes, sizes: Sequence[float]) -> None:
    """Make the abscissa logarithmic, with a number at each size measured (at every other one where there are many)."""
    shown = sizes[:: 1 + (len(sizes) > 7)]
    axes.set_xscale("log")
    axes.set_xticks(shown, [f"{size:g}" for size in shown])
    axes.set_xticks([], minor=True)


def _number(row: Mapping[str, object], column: str) -> float:
    value = row[column]
    if not isinstance(value, int | float):
        raise TypeError(f"column {column} holds {value!r}; expected a number")
    return float(value)
