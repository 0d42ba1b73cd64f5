"""The picture of a sweep: a heat map over two parameters, or curves over one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from abyssal.sweep.result import SweepResult

__all__ = ["draw", "label"]

_MOST = 6  # results drawn
_MOST_NUMBERS = 120  # cells of a heat map that are labelled with their numbers
_WIDE = 100.0  # ratio from which an axis or colours are logarithmic
_MOST_BITS = 64  # of a whole number that is shown in full
_SEED = "seed"


def draw(result: SweepResult) -> tuple[Figure | None, str]:
    """Draw the numeric results over what varies; a parameter called `seed` is averaged over.

    Returns:
        The figure, and its caption; None, and why, where neither one nor two parameters vary.
    """
    names = result.numbers
    over = [name for name in result.varied if name != _SEED]
    if not over and result.varied:
        over = result.varied
    if not names:
        return None, "No result is a number, so there is nothing to draw."
    if len(over) not in (1, 2):
        varying = f"{', '.join(over)} vary" if over else "nothing varies"
        return None, f"A picture needs one or two parameters that vary; here {varying}."
    averaged = " Mean over seeds." if _SEED in result.varied and _SEED not in over else ""
    more = f" The first {_MOST} of {len(names)} results." if len(names) > _MOST else ""
    shown = names[:_MOST]
    if len(over) == 1:
        dots = " Dots are cells." if averaged else ""
        return _curves(result, over[0], shown), f"Over {over[0]}.{averaged}{dots}{more}"
    return (
        _heat_maps(result, over, shown),
        f"Over {over[0]} and {over[1]}.{averaged} A cross stands for a cell that failed or is no finite float.{more}",
    )


def _order(values: Sequence[Any]) -> list[Any]:
    """Return different values, numbers ascending, others as they come."""
    distinct = list({json.dumps(value): value for value in values}.values())
    numbers = all(isinstance(value, int | float) for value in distinct)
    return sorted(distinct) if numbers else distinct


def label(value: Any) -> str:
    """Return a value as a short text."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"{Decimal(value):.4g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> float:
    """Return a number as one that can be drawn: infinite where it is a whole one beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _logarithmic(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() / finite.min() >= _WIDE)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _panels(names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each result, at most two beside each other, each so many inches high."""
    from matplotlib.figure import Figure

    columns = min(len(names), 2)
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(9, height * lines), layout="constrained")
    return figure, [figure.add_subplot(lines, columns, i + 1, title=name) for i, name in enumerate(names)]


def _heat_maps(result: SweepResult, over: Sequence[str], names: Sequence[str]) -> Figure:
    rows = result.rows
    across, down = (_order([row[name] for row in rows]) for name in over)
    by_place: dict[tuple[Any, Any], list[Any]] = {}
    for row in rows:
        by_place.setdefault((row[over[0]], row[over[1]]), []).append(row)
    figure, panels = _panels(names, min(6.0, max(2.6, 0.34 * len(down) + 1.4)))
    for axes, name in zip(panels, names, strict=True):
        grid = np.full((len(down), len(across)), math.nan)
        for i, y in enumerate(down):
            for j, x in enumerate(across):
                here = by_place.get((x, y), [])
                values = [_number(row[name]) for row in here if isinstance(row.get(name), int | float)]
                grid[i, j] = _mean(values) if here and len(values) == len(here) else math.nan
                if here and not math.isfinite(grid[i, j]):
                    axes.plot(j, i, "x", color="#b00020", markersize=8)
        _heat_map(figure, axes, grid, [label(x) for x in across], [label(y) for y in down])
        axes.set(xlabel=over[0], ylabel=over[1])
    return figure


def _heat_map(figure: Figure, axes: Axes, grid: np.ndarray, across: Sequence[str], down: Sequence[str]) -> None:
    from matplotlib.colors import LogNorm, Normalize

    finite = grid[np.isfinite(grid)]
    bounds = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    norm = LogNorm(*bounds) if _logarithmic(grid) else Normalize(*bounds)
    shown = np.ma.masked_invalid(grid)
    image = axes.imshow(shown, origin="lower", aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axes.set_xticks(range(len(across)), across, rotation=45 if max(map(len, across)) > 4 else 0)
    axes.set_yticks(range(len(down)), down)
    figure.colorbar(image, ax=axes)
    if grid.size > _MOST_NUMBERS:
        return
    for (i, j), value in np.ndenumerate(grid):
        if math.isfinite(value):
            # viridis is dark below and light above.
            colour = "white" if norm(value) < 0.6 else "black"
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=7, color=colour)


def _curves(result: SweepResult, over: str, names: Sequence[str]) -> Figure:
    rows = result.rows
    places = _order([row[over] for row in rows])
    numbers = all(isinstance(place, int | float) and not isinstance(place, bool) for place in places)
    numbers = numbers and all(math.isfinite(_number(place)) for place in places)
    x = np.array(places, dtype=float) if numbers else np.arange(len(places), dtype=float)
    figure, panels = _panels(names, 3.0)
    for axes, name in zip(panels, names, strict=True):
        cells = [
            [_number(row[name]) for row in rows if row[over] == place and isinstance(row.get(name), int | float)]
            for place in places
        ]
        means = np.array([_mean(values) for values in cells])
        axes.plot(x, means, marker="o" if max(map(len, cells)) == 1 else None)
        if max(map(len, cells)) > 1:
            for place, values in zip(x, cells, strict=True):
                axes.plot([place] * len(values), values, "o", color="C0", alpha=0.4, markersize=4)
        if numbers and _logarithmic(x):
            axes.set_xscale("log")
        if not numbers:
            axes.set_xticks(x, [label(place) for place in places])
        if _logarithmic(means):
            axes.set_yscale("log")
        axes.set_xlabel(over)
        axes.grid(alpha=0.3)
    return figure
