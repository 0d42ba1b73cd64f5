"""Columns of the long table by size and seed, and powers of a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from abyssal.papers.experiment import Row
from abyssal.util.stats import Slope, power_of_depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["by_seed", "by_size", "label_sizes", "power"]


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
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        if row[value] is not None and all(row[name] == wanted for name, wanted in where.items()):
            found.setdefault(int(row[size]), {})[row["seed"]] = float(row[value])
    sizes = sorted(found)
    seeds = {frozenset(values) for values in found.values()}
    if len(seeds) > 1:
        raise ValueError(f"{value} against {size}: not every seed was measured at every {size}")
    order = sorted(next(iter(seeds), frozenset()), key=str)
    return sizes, np.array([[found[n][seed] for seed in order] for n in sizes], dtype=float).reshape(
        len(sizes), len(order)
    )


def by_seed(rows: Sequence[Row], value: str, **where: object) -> dict[int, float]:
    """Return a column by seed, of the rows in which other columns are as given; None counts as nan."""
    return {
        row["seed"]: math.nan if row[value] is None else float(row[value])
        for row in rows
        if all(row[name] == wanted for name, wanted in where.items())
    }


def power(sizes: Sequence[float], values: np.ndarray) -> Slope:
    """Fit `value = c_seed size^p`: :func:`power_of_depth` with a constant for each seed. [sizes], [sizes, seeds]."""
    return power_of_depth(sizes, values, each_seed=True)


def label_sizes(axes: Axes, sizes: Sequence[float]) -> None:
    """Make the abscissa logarithmic, with a number at each size measured (at every other one where there are many)."""
    shown = sizes[:: 1 + (len(sizes) > 7)]
    axes.set_xscale("log")
    axes.set_xticks(shown, [f"{size:g}" for size in shown])
    axes.set_xticks([], minor=True)
