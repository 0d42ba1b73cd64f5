"""Plots of what residual blocks do, block by block, and of what their policies cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from abyssal.report.plots import (
    ABOVE,
    BELOW,
    GRID,
    INK,
    MUTED,
    SERIES_COLOURS,
    Curve,
    draw_curve,
    draw_guide,
    drawing,
    label_ends,
    set_scales,
    write_above,
)

if TYPE_CHECKING:  # matplotlib takes a quarter of a second to import
    from matplotlib.axes import Axes

__all__ = ["Mark", "Stretch", "front", "part", "through_depth"]

_TEXT = 6.2  # width of one character of small text, in CSS pixels


@dataclass(frozen=True)
class Mark:
    """A point with its name beside it.

    Attributes:
        x: where. [a point]
        y: what. [a point]
        text: the name, written up and to the right; to the left in the right third of the plot.
        series: which colour, from 1 to `SERIES`; 0 for the ink's.
    """

    x: float
    y: float
    text: str
    series: int = 0


@dataclass(frozen=True)
class Stretch:
    """Consecutive blocks that belong together, a chain say, on an axis that counts blocks.

    Attributes:
        name: written above the stretch where it fits.
        start: the first block.
        count: how many.
    """

    name: str
    start: int
    count: int


def through_depth(
    lines: Sequence[Curve],
    *,
    alt: str,
    y_label: str,
    stretches: Sequence[Stretch],
    guide: tuple[float, str] | None = None,
    shade_above: bool = False,
    marks: Sequence[Mark] = (),
    size: tuple[int, int] = (430, 330),
) -> str:
    """Draw curves over the blocks of a network, on a log axis, and return an inline SVG element.

    Args:
        lines: what to draw; x counts blocks from 0 over all stretches. A curve is broken between stretches.
        alt: what the plot shows, in words, for those who do not see it.
        y_label: what is plotted; written above the plot, horizontally.
        stretches: the chains, in order; thin lines part them.
        guide: a level to draw across the plot, and its name.
        shade_above: shade what lies above the guide.
        marks: points to name.
        size: in CSS pixels, at which text is 12.5 pixels high.
    """
    from matplotlib.ticker import MaxNLocator

    with drawing(alt, size) as picture:
        axes = picture.axes
        for order, line in enumerate(lines):
            draw_curve(axes, _broken(line, stretches), order)
        blocks = sum(stretch.count for stretch in stretches)
        axes.set_xlim(-0.5 - 0.01 * blocks, blocks - 0.5 + 0.01 * blocks)
        axes.set_yscale("log")
        if guide is not None and lines:
            low, high = axes.get_ylim()
            room = 3 if shade_above else 1.5
            axes.set_ylim(min(low / 1.1, guide[0] / room), max(high * 1.1, guide[0] * room))
        set_scales(axes, lines, "linear", "log", "")
        axes.xaxis.set_major_locator(MaxNLocator(8 if size[0] > 600 else 5, integer=True))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("block")
        write_above(axes, y_label, 15 if len(stretches) < 2 else 21)
        part(axes, stretches)
        if guide is not None:
            if shade_above:
                axes.axhspan(guide[0], axes.get_ylim()[1], color=SERIES_COLOURS[1], alpha=0.09, linewidth=0, zorder=0)
            draw_guide(axes, *guide, at="right")
        _mark(axes, marks)
        label_ends(axes, lines, size[1] - BELOW - ABOVE)
    return picture.svg


def front(
    lines: Sequence[Curve],
    *,
    alt: str,
    x_label: str,
    y_label: str,
    guide: tuple[float, str] | None = None,
    marks: Sequence[Mark] = (),
    size: tuple[int, int] = (430, 330),
) -> str:
    """Draw error against cost, both on log axes, the cost in percent, and return an inline SVG element.

    Args:
        lines: what to draw; x is a fraction, of which the axis shows percent.
        alt: what the plot shows, in words, for those who do not see it.
        x_label: the horizontal axis' name.
        y_label: what is plotted; written above the plot, horizontally.
        guide: a level to draw across the plot, and its name.
        marks: points to name.
        size: in CSS pixels, at which text is 12.5 pixels high.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    with drawing(alt, size) as picture:
        axes = picture.axes
        for order, line in enumerate(lines):
            draw_curve(axes, line, order)
        axes.set_xscale("log")
        set_scales(axes, lines, "linear", "log", "")
        if guide is not None:
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, guide[0] / 2), max(high, guide[0] * 2))
        axes.xaxis.set_major_locator(FixedLocator(_ticks(*axes.get_xlim())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.set_xlabel(x_label)
        write_above(axes, y_label)
        if guide is not None:
            draw_guide(axes, *guide, at="left")
        _mark(axes, marks)
        label_ends(axes, lines, size[1] - BELOW - ABOVE)
    return picture.svg


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two on a log axis: three to six of them, if there are as many."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [digit * 10.0**ten for ten in tens for digit in digits if low <= digit * 10.0**ten <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / 6))]


def _broken(line: Curve, stretches: Sequence[Stretch]) -> Curve:
    """Return the curve with a gap wherever one stretch ends and the next begins."""
    starts = {stretch.start for stretch in stretches[1:]}
    x: list[float] = []
    y: list[float] = []
    for at, value in zip(line.x, line.y, strict=True):
        if at in starts and x:
            x.append(at)
            y.append(math.nan)
        x.append(at)
        y.append(value if value > 0 else math.nan)
    return replace(line, x=x, y=y)


def part(axes: Axes, stretches: Sequence[Stretch], colour: str = GRID) -> None:
    """Draw thin lines between stretches, and their names above where each fits."""
    if len(stretches) < 2:
        return
    low, high = axes.get_xlim()
    width = axes.bbox.width
    free = -1.0  # right end of the last name written, in pixels
    for stretch in stretches:
        if stretch.start > 0:
            axes.axvline(stretch.start - 0.5, color=colour, linewidth=1.2, zorder=2)
        left = (stretch.start - 0.5 - low) / (high - low) * width
        if left >= free and left + _TEXT * len(stretch.name) <= width + 20:
            axes.annotate(
                stretch.name, (max(stretch.start - 0.5, low), 1.0), xycoords=("data", "axes fraction"),
                xytext=(3, 2), textcoords="offset points", color=MUTED, fontsize=8,
            )  # fmt: skip
            free = left + _TEXT * (len(stretch.name) + 1)


def _mark(axes: Axes, marks: Sequence[Mark]) -> None:
    for mark in marks:
        colour = SERIES_COLOURS[mark.series - 1] if mark.series else INK
        place = axes.transAxes.inverted().transform(axes.transData.transform((mark.x, mark.y)))[0]
        side = -1 if place > 2 / 3 else 1
        axes.plot(
            [mark.x], [mark.y], marker="o", markersize=9, markerfacecolor="none", markeredgecolor=colour,
            markeredgewidth=1.8, zorder=20,
        )  # fmt: skip
        axes.annotate(
            mark.text, (mark.x, mark.y), xytext=(7 * side, 4), textcoords="offset points", color=colour,
            ha="left" if side > 0 else "right", fontsize=8.5, fontweight="bold", zorder=21, linespacing=1.15,
        )  # fmt: skip
