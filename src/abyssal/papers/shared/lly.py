"""What the experiments on Li, Luo and Yip's network share: grids of cells, rows of seeds, comparisons of networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from abyssal.papers.experiment import Row, Work
from abyssal.papers.networks.lly_batch import NETWORKS
from abyssal.papers.shared.lly_cells import seed_chunks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from abyssal.util.stats import Slope

__all__ = [
    "COLOUR",
    "PAPER",
    "SHORT",
    "as_width",
    "by_seed",
    "draw",
    "factor",
    "followed",
    "grid",
    "median_factor",
    "one_scale",
    "worst",
]

PAPER = "Li, Luo, Yip 2020, arXiv 2007.03714"
COLOUR = {"resnet": "#1b6ca8", "plain": "#c8553d"}
SHORT = {"resnet": "ResNet", "plain": "fully connected"}


Found = tuple[dict[str, Any], int, int, dict[str, Any]]


def grid(
    work: Work,
    function: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    common: Mapping[str, Any],
    phase: str,
    *,
    widths: Sequence[int],
    seeds: int,
    networks: Sequence[str] = tuple(NETWORKS),
    **more: Sequence[Any],
) -> Iterator[Found]:
    """Compute a cell for each network, width, handful of seeds, and value of what else varies.

    Args:
        work: computes.
        function: of `lly_cells`.
        common: parameters of all cells; `depth` among them.
        phase: what is shown while it runs.
        widths: m.
        seeds: of each width.
        networks: "resnet", "plain".
        more: further parameters with the values each takes.

    Yields:
        The cell, the seed, its place in the cell's results, and these.
    """
    cells: list[dict[str, Any]] = [
        {**common, "network": network, "width": width, "seeds": chunk}
        for network in networks
        for width in widths
        for chunk in seed_chunks(seeds, width, common["depth"])
    ]
    for name, values in more.items():
        cells = [{**cell, name: value} for cell in cells for value in values]
    for cell, found in zip(cells, work.cells(function, cells, phase=phase), strict=True):
        for place, seed in enumerate(cell["seeds"]):
            yield cell, seed, place, found


def followed(
    settings: Any, work: Work, function: Callable[[Mapping[str, Any]], Mapping[str, Any]], phase: str
) -> Iterator[tuple[Row, int, dict[str, Any]]]:
    """Compute a cell for each network, width and handful of seeds of settings, whose other fields all cells share.

    Args:
        settings: a dataclass with `widths`, `seeds` and the parameters of `function`.
        work: computes.
        function: of `lly_cells`.
        phase: what is shown while it runs.

    Yields:
        What a row begins with (network, width, seed), the seed's place in the cell's results, and these.
    """
    common = {name: value for name, value in asdict(settings).items() if name not in ("widths", "seeds")}
    for cell, seed, place, found in grid(work, function, common, phase, widths=settings.widths, seeds=settings.seeds):
        yield {"network": cell["network"], "width": cell["width"], "seed": seed}, place, found


def by_seed(rows: Sequence[Row], column: str, **where: object) -> dict[object, float]:
    """Return a column of the rows that fit, by seed; what is None or not finite is left out."""
    return {
        row["seed"]: float(row[column])  # type: ignore[arg-type]
        for row in rows
        if row[column] is not None and all(row[name] == value for name, value in where.items())
    }


def factor(above: Mapping[object, float], below: Mapping[object, float]) -> tuple[float, float, float]:
    """Return the geometric mean over seeds of the one by the other, and its 95 % interval (Student's, of logs)."""
    from abyssal.util.stats import student

    logs = np.log([above[seed] / below[seed] for seed in above if seed in below])
    if len(logs) < 2:
        return (math.exp(logs[0]) if len(logs) else math.nan, math.nan, math.nan)
    half = student(len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return math.exp(logs.mean()), math.exp(logs.mean() - half), math.exp(logs.mean() + half)


def median_factor(found: tuple[float, float, float]) -> str:
    """Write a factor and its interval."""
    return f"{found[0]:.2g} ({found[1]:.2g} to {found[2]:.2g})"


def as_width(slope: Slope) -> str:
    """Write a power as one of the width m."""
    return str(slope).replace("L^", "m^")


def worst(answers: Sequence[bool | None]) -> bool | None:
    """Return False if any answer is, True if all are, else None."""
    return False if any(a is False for a in answers) else True if all(answers) else None


def one_scale(every: Sequence[Axes], values: Sequence[float], most: float = math.inf) -> None:
    """Give all panels the logarithmic scale that shows these values, up to a largest one."""
    shown = [value for value in values if 0 < value < math.inf]
    for axes in every:
        axes.set_yscale("log")
        if shown:
            axes.set_ylim(min(shown) / 1.5, min(most, max(shown)) * 1.5)


def draw(axes: Axes, sizes: Sequence[float], values: np.ndarray, label: str, colour: str, style: str = "o-") -> None:
    """Draw the medians over seeds, and the middle half of seeds behind them ([sizes, seeds])."""
    low, middle, high = np.nanquantile(values, [0.25, 0.5, 0.75], axis=1)
    axes.plot(sizes, middle, style, color=colour, label=label, markersize=4)
    axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
