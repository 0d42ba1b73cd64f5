"""A heat map of figures over blocks and choices, as SVG that lives inside a page.

Cells of one shade are one path, since ten thousand of them have to stay small; where they are few enough to be pointed
at, each is one of its own, with a title.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from abyssal.report.depth_plots import Stretch, part
from abyssal.report.plots import GRID, HEAT_COLOURS, MUTED, PAPER, SERIES_COLOURS, SHADES, Drawing, drawing, tick

if TYPE_CHECKING:  # matplotlib takes a quarter of a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

__all__ = ["Choices", "heat_map"]

# CSS pixels, as all lengths here.
_TEXT = 6.6  # width of one character of a label
_ROW, _WIDEST_CELL = 22.0, 74.0
_LEAST_CELL = 1.5  # narrower cells are joined, and show the largest of their values
_FINE = 6.0  # outlines of narrower cells are drawn thinner
_SHADE, _LEGEND_LINE = 22.0, 21.0
_MOST_TITLES = 1600  # cells that are drawn one by one, with a title each
_POINTS = 0.72  # of a pixel
_EXACT, _UNKNOWN = -1, -2  # in place of a shade


@dataclass(frozen=True)
class Choices:
    """Which row was chosen in each column, to be outlined.

    Attributes:
        label: what the choice is named in the legend.
        rows: one index of a row per column.
        series: which colour, from 1 to `SERIES`.
    """

    label: str
    rows: Sequence[int]
    series: int


def heat_map(
    values: Sequence[Sequence[float | None]],
    *,
    alt: str,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    exponents: tuple[int, int],
    stretches: Sequence[Stretch] = (),
    choices: Sequence[Choices] = (),
    width: int = 430,
) -> str:
    """Draw one row of shaded cells per choice and one column per block; return an inline SVG element.

    Args:
        values: `values[row][column]`; 0 is drawn as exact, None as not measured, nan and infinite as the worst.
        alt: what the map shows, in words, for those who do not see it.
        rows: names of the rows.
        columns: names of the columns; shown when a cell is pointed at.
        title: what the shades say; written above the map.
        exponents: powers of ten of the palest and of the darkest shade; values beyond are drawn as these.
        stretches: the chains, parted by lines; counted in columns.
        choices: cells to outline, of at most `SERIES` choices.
        width: in CSS pixels, at which text is 12.5 pixels high.

    Raises:
        ValueError: if `values` does not fit `rows` and `columns`.
    """
    if len(values) != len(rows) or any(len(line) != len(columns) for line in values):
        raise ValueError(f"heat map: {len(rows)} x {len(columns)} names do not fit the values given")
    left = 8 + _TEXT * max(map(len, rows))
    across = min(_WIDEST_CELL * len(columns), width - left - 8)
    joined = max(1, math.ceil(_LEAST_CELL * len(columns) / across))
    starts = range(0, len(columns), joined)
    known = [[math.nan if v is None else math.inf if math.isnan(v) else v for v in line] for line in values]
    cells = np.fmax.reduceat(np.array(known), starts, axis=1)
    shades = np.digitize(cells, np.logspace(*exponents, SHADES + 1)[1:-1])
    shades[cells == 0], shades[np.isnan(cells)] = _EXACT, _UNKNOWN

    names_beside = max(1, int(width // (40 + _TEXT * max(len(choice.label) for choice in choices)))) if choices else 1
    below = 82 + _LEGEND_LINE * math.ceil((1 + len(choices)) / names_beside)
    above = 26 + 16 * (len(stretches) > 1)
    height = math.ceil(above + _ROW * len(rows) + below)
    with drawing(alt, (width, height), left=left, right=width - left - across, below=below, above=above) as picture:
        axes, figure = picture.axes, picture.figure
        pixel = (len(columns) / across, 1 / _ROW)  # in blocks and in rows
        _set_axes(axes, rows, len(columns), across, joined)
        figure.text(0, 1, title, va="top", fontweight="bold")
        ends = [*starts, len(columns)]
        if joined == 1 and cells.size <= _MOST_TITLES:
            said = [[f"{block}, {row}" for block in columns] for row in rows]
            _titled(picture, cells, shades, said, pixel)
        else:
            _merged(axes, shades, ends, pixel[1])
        part(axes, stretches, MUTED)
        _outline(axes, choices, ends, pixel)
        _scale(figure, exponents, (width, height), below)
        _legend(figure, choices, names_beside)
    return picture.svg


def _set_axes(axes: Axes, rows: Sequence[str], blocks: int, across: float, joined: int) -> None:
    """Name the rows, and number some columns, as many as there is room for."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlim=(-0.5, blocks - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.set_major_locator(MaxNLocator(max(1, int(across / 46)), integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("block" if joined == 1 else f"block ({joined} to a column, the worst of them shown)", loc="left")


def _titled(
    picture: Drawing, cells: np.ndarray, shades: np.ndarray, said: Sequence[Sequence[str]], pixel: tuple[float, float]
) -> None:
    """Draw cells one by one, with what is `said` of each and its value as a title."""
    gap = (pixel[0] if pixel[0] * 8 <= 1 else 0.0, pixel[1])
    for (i, j), shade in np.ndenumerate(shades):
        if shade != _UNKNOWN:
            name = f"cell-{i}-{j}"
            box = (j - 0.5, i - 0.5, 1 - gap[0], 1 - gap[1])
            picture.axes.add_patch(_patch([box], gid=name, **_look(int(shade))))
            picture.titles[name] = f"{said[i][j]}: {'exact' if shade == _EXACT else format(cells[i, j], '.1e')}"


def _merged(axes: Axes, shades: np.ndarray, ends: Sequence[int], gap: float) -> None:
    """Draw all cells of one shade as one path, neighbours in a row as one rectangle of it."""
    for shade in np.unique(shades[shades != _UNKNOWN]).tolist():
        boxes = [
            (ends[start] - 0.5, i - 0.5, ends[end] - ends[start], 1 - gap)
            for i, line in enumerate(shades)
            for start, end, found in _runs(line)
            if found == shade
        ]
        axes.add_patch(_patch(boxes, **_look(shade)))


def _look(shade: int) -> dict[str, Any]:
    if shade == _EXACT:
        return {"fill": False, "edgecolor": GRID, "linewidth": _POINTS}
    return {"facecolor": HEAT_COLOURS[shade], "linewidth": 0}


def _patch(boxes: Sequence[tuple[float, float, float, float]], **look: Any) -> Patch:
    """Return rectangles `(left, top, width, height)` as one path."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)] for x, y, w, h in boxes]
    outline = Path.make_compound_path(*(Path(np.array(around), closed=True) for around in corners))
    return PathPatch(outline, clip_on=False, joinstyle="miter", **look)


def _runs(keys: Sequence[Any]) -> Iterator[tuple[int, int, Any]]:
    """Give `(start, end, key)` of each run of equal keys."""
    for key, run in groupby(range(len(keys)), key=keys.__getitem__):
        inside = list(run)
        yield inside[0], inside[-1] + 1, key


def _outline(axes: Axes, choices: Sequence[Choices], ends: Sequence[int], pixel: tuple[float, float]) -> None:
    """Outline the chosen cells, one rectangle per run; where choices share a cell, later ones lie inside."""
    from matplotlib.patheffects import withStroke

    fine = (ends[1] - ends[0]) / pixel[0] < _FINE
    halo = [] if fine else [withStroke(linewidth=3.2 * _POINTS, foreground=PAPER)]
    taken: list[list[int]] = []  # of the choices so far, one row per cell
    for choice in choices:
        picked = [choice.rows[start] for start in ends[:-1]]
        within = [(row, held.count(row)) for row, *held in zip(picked, *taken, strict=True)]
        boxes = []
        for start, end, (row, depth) in _runs(within):
            inset = 0.5 + 2.7 * depth
            wide = (ends[end] - ends[start]) / pixel[0] - 1
            aside = min(inset, max(0.0, wide / 2 - 0.5)) * pixel[0]
            top = row - 0.5 + inset * pixel[1]
            boxes.append((ends[start] - 0.5 + aside, top, wide * pixel[0] - 2 * aside, 1 - (1 + 2 * inset) * pixel[1]))
        taken.append(picked)
        colour, line = SERIES_COLOURS[choice.series - 1], 1.2 if fine else 1.9
        axes.add_patch(
            _patch(boxes, fill=False, edgecolor=colour, linewidth=line * _POINTS, path_effects=halo, zorder=5)
        )


def _scale(figure: Figure, exponents: tuple[int, int], size: tuple[int, int], below: float) -> None:
    """Draw the shades below the map, with their powers of ten."""
    low, high = exponents
    (width, height), across = size, min(_SHADE * SHADES, size[0] - 40)
    axes = figure.add_axes((18 / width, (below - 54) / height, across / width, 12 / height))
    axes.set(xlim=(low, high), ylim=(0, 1), yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    step = (high - low) / SHADES
    for shade in range(SHADES):
        axes.add_patch(_patch([(low + shade * step, 0, step, 1)], **_look(shade)))
    powers = range(low, high + 1, max(1, math.ceil(38 * (high - low) / across)))
    axes.set_xticks(powers, [tick(10.0**power) for power in powers])
    axes.tick_params(length=0)


def _legend(figure: Figure, choices: Sequence[Choices], beside: int) -> None:
    """Name the outlines, `beside` names to a line."""
    from matplotlib.patches import Patch

    handles = [Patch(label="exact", **_look(_EXACT))]
    for choice in choices:
        colour = SERIES_COLOURS[choice.series - 1]
        handles.append(Patch(label=choice.label, fill=False, edgecolor=colour, linewidth=1.9 * _POINTS))
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 0), ncols=beside, frameon=False, borderpad=0.1,
        borderaxespad=0.2, handlelength=1.6, handleheight=0.9, columnspacing=1.2, labelspacing=0.45,
    )  # fmt: skip
