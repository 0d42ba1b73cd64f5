"""A heat map of figures over blocks and choices, as SVG that lives inside a page.

Written by hand, not by matplotlib: ten thousand cells have to stay small (cells of one shade are one path),
follow the page's light or dark scheme (shades are CSS variables, `--heat-0` to `--heat-9`), and answer to the
pointer where they are few enough to be pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from abyssal.report.depth_plots import Stretch
from abyssal.report.plots import SERIES

__all__ = ["SHADES", "Choices", "heat_map"]

SHADES = 10
_TEXT_HEIGHT, _TEXT_WIDTH = 12.5, 6.6  # CSS pixels of one character of a label
_LEAST_CELL = 1.5  # pixels; narrower cells are joined, and show the largest of their values
_FINE = 6.0  # pixels; outlines of narrower cells are drawn thinner
_MOST_TITLES = 1600  # cells that are drawn one by one, with a title each


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


@dataclass(frozen=True)
class _Grid:
    """Where cells lie, in CSS pixels."""

    left: float
    top: float
    cell: float
    row: float
    columns: int
    rows: int

    @property
    def width(self) -> float:
        return self.cell * self.columns

    @property
    def height(self) -> float:
        return self.row * self.rows


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
    left = 8 + _TEXT_WIDTH * max(len(name) for name in rows)
    joined = max(1, math.ceil(_LEAST_CELL * len(columns) / (width - left - 8)))
    count = math.ceil(len(columns) / joined)
    named = len(stretches) > 1
    grid = _Grid(
        left=left,
        top=30 + 16 * named,
        cell=min(74.0, (width - left - 8) / count),
        row=22.0,
        columns=count,
        rows=len(rows),
    )
    cells = [[_joined(line[i : i + joined]) for i in range(0, len(columns), joined)] for line in values]
    shades = [[_shade(value, exponents) for value in line] for line in cells]
    parts = [f'<text x="0" y="12" class="name">{escape(title)}</text>']
    if joined == 1 and len(columns) * len(rows) <= _MOST_TITLES:
        parts += _titled(cells, shades, rows, columns, grid)
    else:
        parts += _merged(shades, grid)
    parts += _row_names(rows, grid)
    parts += _stretch_lines(stretches, joined, grid)
    parts += _outlines(choices, joined, grid)
    parts += _column_numbers(len(columns), joined, grid)
    bottom = grid.top + grid.height + 40
    parts_of_legend, height = _legend(exponents, choices, width, bottom)
    parts += parts_of_legend
    return (
        f'<svg role="img" class="heat" aria-label="{escape(alt)}" viewBox="0 0 {width} {height:.0f}" '
        f'preserveAspectRatio="xMidYMid meet">{"".join(parts)}</svg>'
    )


def _joined(values: Sequence[float | None]) -> float | None:
    known = [math.inf if math.isnan(value) else value for value in values if value is not None]
    return max(known) if known else None


def _shade(value: float | None, exponents: tuple[int, int]) -> int | None:
    """Return the number of a shade; -1 for exact, None for what was not measured."""
    if value is None:
        return None
    if value == 0:
        return -1
    if not math.isfinite(value):
        return SHADES - 1
    low, high = exponents
    place = (math.log10(value) - low) / (high - low)
    return min(SHADES - 1, max(0, int(place * SHADES)))


def _style(shade: int | None) -> str:
    if shade is None:
        return "cell-none"
    return "cell-exact" if shade < 0 else f"cell-{shade}"


def _titled(
    cells: Sequence[Sequence[float | None]],
    shades: Sequence[Sequence[int | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    grid: _Grid,
) -> list[str]:
    gap = 1 if grid.cell >= 8 else 0
    parts = []
    for i, line in enumerate(shades):
        for j, shade in enumerate(line):
            if shade is None:
                continue
            value = cells[i][j]
            said = "exact" if value == 0 else f"{value:.1e}"
            parts.append(
                f'<rect class="{_style(shade)}" x="{grid.left + j * grid.cell:.1f}" '
                f'y="{grid.top + i * grid.row:.1f}" width="{grid.cell - gap:.1f}" height="{grid.row - 1:.1f}">'
                f"<title>{escape(columns[j])}, {escape(rows[i])}: {said}</title></rect>"
            )
    return parts


def _merged(shades: Sequence[Sequence[int | None]], grid: _Grid) -> list[str]:
    """Draw all cells of one shade as one path, neighbours in a row as one rectangle of it."""
    paths: dict[int, list[str]] = {}
    for i, line in enumerate(shades):
        for start, end, shade in _runs(line):
            if shade is None:
                continue
            x, y = grid.left + start * grid.cell, grid.top + i * grid.row
            wide = (end - start) * grid.cell
            paths.setdefault(shade, []).append(f"M{x:.1f} {y:.1f}h{wide:.1f}v{grid.row - 1:.0f}h-{wide:.1f}z")
    return [f'<path class="{_style(shade)}" d="{"".join(paths[shade])}"/>' for shade in sorted(paths)]


def _runs(values: Sequence[int | None]) -> list[tuple[int, int, int | None]]:
    """Return `(start, end, value)` of each run of equal values."""
    runs: list[tuple[int, int, int | None]] = []
    for i, value in enumerate(values):
        if runs and runs[-1][2] == value:
            runs[-1] = (runs[-1][0], i + 1, value)
        else:
            runs.append((i, i + 1, value))
    return runs


def _row_names(rows: Sequence[str], grid: _Grid) -> list[str]:
    return [
        f'<text x="{grid.left - 7:.1f}" y="{grid.top + (i + 0.5) * grid.row + 4:.1f}" text-anchor="end">'
        f"{escape(name)}</text>"
        for i, name in enumerate(rows)
    ]


def _stretch_lines(stretches: Sequence[Stretch], joined: int, grid: _Grid) -> list[str]:
    if len(stretches) < 2:
        return []
    parts, names, free = [], [], 0.0
    for stretch in stretches:
        x = grid.left + stretch.start / joined * grid.cell
        wide = len(stretch.name) * _TEXT_WIDTH
        if stretch.start:
            parts.append(f'<path class="part" d="M{x - 0.5:.1f} {grid.top - 14:.1f}v{grid.height + 14:.1f}"/>')
        if x >= free and x + wide <= grid.left + max(grid.width, 1) + 8:
            names.append(f'<text class="quiet" x="{x + 2:.1f}" y="{grid.top - 5:.1f}">{escape(stretch.name)}</text>')
            free = x + wide + _TEXT_WIDTH
    return parts + names  # names over lines, which would strike them through


def _outlines(choices: Sequence[Choices], joined: int, grid: _Grid) -> list[str]:
    """Outline the chosen cells, one rectangle per run; where choices share a cell, later ones lie inside."""
    parts = []
    taken: list[list[int]] = []  # of the choices so far, one row per column of the grid
    for choice in choices:
        picked = [choice.rows[i] for i in range(0, len(choice.rows), joined)]
        depths = [sum(rows[j] == row for rows in taken) for j, row in enumerate(picked)]
        taken.append(picked)
        path = []
        for start, end, key in _runs([SERIES * row + depth for row, depth in zip(picked, depths, strict=True)]):
            assert key is not None
            row, depth = divmod(key, SERIES)
            inset = 0.5 + 2.7 * depth
            wide = (end - start) * grid.cell - 1
            aside = min(inset, max(0.0, wide / 2 - 0.5))
            x, y = grid.left + start * grid.cell + aside, grid.top + row * grid.row + inset
            across = wide - 2 * aside
            path.append(f"M{x:.1f} {y:.1f}h{across:.1f}v{grid.row - 1 - 2 * inset:.1f}h-{across:.1f}z")
        d = "".join(path)
        fine = " fine" if grid.cell < _FINE else ""
        parts.append(f'<path class="halo{fine}" d="{d}"/><path class="choice choice-{choice.series}{fine}" d="{d}"/>')
    return parts


def _column_numbers(columns: int, joined: int, grid: _Grid) -> list[str]:
    """Number some columns below the map, as many as there is room for."""
    fitting = max(2, int(grid.width / 46))
    step = next(
        n * 10**power for power in range(9) for n in (1, 2, 5) if columns / (n * 10**power) <= fitting
    )  # fmt: skip
    y = grid.top + grid.height + 14
    parts = [
        f'<text x="{grid.left + (i // joined + 0.5) * grid.cell:.1f}" y="{y:.1f}" text-anchor="middle">{i}</text>'
        for i in range(0, columns, step)
    ]
    name = "block" if joined == 1 else f"block ({joined} to a column, the worst of them shown)"
    parts.append(f'<text x="{grid.left:.1f}" y="{y + 17:.1f}">{name}</text>')
    return parts


def _legend(exponents: tuple[int, int], choices: Sequence[Choices], width: int, top: float) -> tuple[list[str], float]:
    """Draw the shades with their powers of ten, then the outlines with their names, wrapped at the width."""
    low, high = exponents
    parts = [
        f'<rect class="cell-exact" x="1" y="{top:.0f}" width="22" height="12"/>'
        f'<text x="29" y="{top + 10.5:.1f}">exact</text>'
    ]
    left, shade_width = 76.0, min(22.0, (width - 84) / SHADES)
    parts += [
        f'<rect class="cell-{i}" x="{left + i * shade_width:.1f}" y="{top:.0f}" width="{shade_width + 0.3:.1f}" '
        f'height="12"/>'
        for i in range(SHADES)
    ]
    span = shade_width * SHADES
    every = max(1, math.ceil(38 * (high - low) / span))
    parts += [
        f'<text x="{left + (power - low) / (high - low) * span:.1f}" y="{top + 26:.1f}" text-anchor="middle">'
        f"{_power(power)}</text>"
        for power in range(low, high + 1, every)
    ]
    x, y = 1.0, top + 44
    if choices:
        for choice in choices:
            wide = 34 + _TEXT_WIDTH * len(choice.label)
            if x > 1 and x + wide > width:
                x, y = 1.0, y + 21
            d = f"M{x + 1:.1f} {y:.1f}h20v12h-20z"
            parts.append(
                f'<path class="choice choice-{choice.series}" d="{d}"/>'
                f'<text x="{x + 28:.1f}" y="{y + 10.5:.1f}">{escape(choice.label)}</text>'
            )
            x += wide + 6
        y += 21
    return parts, y


def _power(exponent: int) -> str:
    if exponent == 0:
        return "1"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


assert SERIES == 4  # the template has as many outlines
