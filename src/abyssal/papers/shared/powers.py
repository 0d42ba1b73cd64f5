"""Columns of the long table by size and seed, and powers of a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from abyssal.papers.experiment import Row
from abyssal.util.stats import Slope, power_of_depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["by_seed", "by_size", "draw_seeds", "label_sizes", "name_panel", "power"]


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


def name_panel(axes: Axes, title: str, x_name: str, sizes: Sequence[float] | None = None, **others: Any) -> None:
    """Finish a panel: its title, the name of its abscissa, the sizes measured along it, a legend, and what else is set.

    Args:
        axes: with all curves drawn.
        title: of the panel.
        x_name: of the abscissa.
        sizes: see `label_sizes`; None leaves the abscissa as it is.
        others: as `Axes.set` takes them, such as `yscale="log"`.
    """
    axes.set(xlabel=x_name, **others)
    axes.set_title(title, fontsize=10)
    if sizes is not None:
        label_sizes(axes, sizes)
    axes.legend(frameon=False, fontsize=8)


def draw_seeds(axes: Axes, sizes: Sequence[float], values: np.ndarray, label: str, colour: str) -> np.ndarray:
    """Draw every seed as a dot and medians as a line; return the medians. [sizes, seeds] to [sizes]."""
    middle = np.median(values, axis=1)
    axes.plot(sizes, values, ".", color=colour, alpha=0.35, ms=5)
    axes.plot(sizes, middle, "-", color=colour, label=label)
    return middle
