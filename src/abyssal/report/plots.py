"""Plots in one style, as SVG that lives inside a page.

Colours are written as CSS variables (`--ink`, `--series-1`, ...), so that a plot follows the page's light
or dark scheme; text stays text and takes the page's font. Curves are told apart by colour, marker and a
label at their end, never by colour alone.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # matplotlib takes a quarter of a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SERIES", "Curve", "Drawing", "curves", "drawing"]

SERIES, SHADES = 4, 10
_DPI = 100
# Room around the axes, in CSS pixels: left for numbers, below for the axis, right for names at curves' ends.
LEFT, BELOW, RIGHT, ABOVE = 64.5, 46.2, 118.3, 36.3
# Colours that nobody would draw with, put in place of the CSS variables while matplotlib works.
INK, MUTED, GRID, PAPER = "#01fe01", "#01fe02", "#01fe03", "#01fe04"
_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
SERIES_COLOURS = tuple(f"#01fe{0x10 + i:02x}" for i in range(SERIES))
_COLOURS |= {colour: f"--series-{i + 1}" for i, colour in enumerate(SERIES_COLOURS)}
HEAT_COLOURS = tuple(f"#01fe{0x20 + i:02x}" for i in range(SHADES))
_COLOURS |= {colour: f"--heat-{i}" for i, colour in enumerate(HEAT_COLOURS)}
_MARKERS = ("o", "s", "D", "^")
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,  # points: 12.5 px at 100 dpi
    "axes.labelsize": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.2,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        label: its name, written at its end; a line break is kept.
        x: where. [points]
        y: what; points that a log axis cannot show (0, nan) are left out. [points]
        series: which colour and marker, from 1 to `SERIES`.
        style: "markers" joins measured points, "line" is for many, "wide" and "dashed" let curves that lie on
            each other all be seen, "dots" is for points of which some stand alone among many, "points" joins nothing,
            "steps" holds each value until the next point.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    series: int
    style: Literal["markers", "line", "wide", "dashed", "dots", "points", "steps"] = "markers"


@dataclass
class Drawing:
    """A figure being drawn, and its SVG once the `with` block of `drawing` has ended.

    Attributes:
        figure: what is drawn on.
        axes: its one pair of axes.
        titles: what is shown when an artist is pointed at, by the artist's gid.
        svg: an inline SVG element.
    """

    figure: Figure
    axes: Axes
    titles: dict[str, str] = field(default_factory=dict)
    svg: str = ""


@contextmanager
def drawing(
    alt: str,
    size: tuple[int, int],
    *,
    left: float = LEFT,
    right: float = RIGHT,
    below: float = BELOW,
    above: float = ABOVE,
) -> Iterator[Drawing]:
    """Give a figure in the page's style with one pair of axes; leave its SVG in `.svg`.

    Args:
        alt: what the plot shows, in words.
        size: in CSS pixels, as are the rooms around the axes.
        left: room for numbers.
        right: room for names at curves' ends.
        below: room for the axis.
        above: room for what is plotted.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": alt}  # typed by name in newer versions of matplotlib only
    width, height = size
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="none")
        box = (left / width, below / height, 1 - (left + right) / width, 1 - (below + above) / height)
        picture = Drawing(figure, figure.add_axes(box, facecolor="none"))
        yield picture
        picture.svg = _inline(figure, alt, picture.titles)


def curves(
    lines: Sequence[Curve],
    *,
    alt: str,
    x_label: str,
    y_label: str,
    x_scale: Literal["linear", "log2"] = "linear",
    y_scale: Literal["linear", "log"] = "linear",
    y_unit: str = "",
    guide: tuple[float, str] | None = None,
    size: tuple[int, int] = (430, 330),
) -> str:
    """Draw curves and return an inline SVG element.

    Args:
        lines: what to draw, later ones over earlier ones.
        alt: what the plot shows, in words, for those who do not see it.
        x_label: the horizontal axis' name.
        y_label: what is plotted; written above the plot, horizontally.
        x_scale: "log2" has a tick at every point of the first curve, named where there is room.
        y_scale: "log" has ticks at powers of ten.
        y_unit: written after the vertical axis' numbers.
        guide: a level to draw across the plot, and its name.
        size: in CSS pixels, at which text is 12.5 pixels high.

    Returns:
        `<svg role="img" aria-label=alt ...>`, sized by its container.
    """
    with drawing(alt, size) as picture:
        axes = picture.axes
        for order, line in enumerate(lines):
            draw_curve(axes, line, order)
        set_scales(axes, lines, x_scale, y_scale, y_unit)
        axes.set_xlabel(x_label)
        write_above(axes, y_label)
        if guide is not None:
            draw_guide(axes, *guide)
        label_ends(axes, lines, size[1] * 0.75)
    return picture.svg


def write_above(axes: Axes, text: str, above: int = 15) -> None:
    """Write a bold line `above` pixels over a panel, from left of its ticks on."""
    axes.annotate(
        text, (0, 1), xycoords="axes fraction", xytext=(-59 * 72 / _DPI, above * 72 / _DPI),
        textcoords="offset points", fontweight="bold",
    )  # fmt: skip


def draw_guide(axes: Axes, level: float, name: str, at: Literal["left", "right"] = "left") -> None:
    """Draw a dashed line across a panel at a level, with its name at one end."""
    axes.axhline(level, color=MUTED, linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
    axes.annotate(
        name, (0.01 if at == "left" else 0.99, level), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", color=MUTED, fontsize=8, ha=at,
    )  # fmt: skip


def draw_curve(axes: Axes, line: Curve, order: int) -> None:
    """Draw a curve in its series' colour and its own style; a higher order lies over a lower one."""
    colour, marker = SERIES_COLOURS[line.series - 1], _MARKERS[line.series - 1]
    options: dict[str, object] = {"color": colour, "zorder": 3 + order, "solid_capstyle": "round"}
    if line.style == "markers":
        options |= {"marker": marker, "markeredgecolor": PAPER, "markeredgewidth": 0.8}
    elif line.style == "wide":
        options |= {"linewidth": 7.0, "alpha": 0.35}
    elif line.style == "dashed":
        options |= {"linewidth": 3.2, "linestyle": (0, (2.2, 1.6))}
    elif line.style == "steps":
        options |= {"linewidth": 1.8, "drawstyle": "steps-post"}
    elif line.style == "points":
        options |= {"linestyle": "none", "marker": marker, "markersize": 5.0, "markeredgecolor": PAPER}
    elif line.style == "dots":
        options |= {"linewidth": 1.3, "marker": marker, "markersize": 2.4, "markeredgewidth": 0.0}
    else:
        options |= {"linewidth": 1.5}
    axes.plot(line.x, line.y, **options)  # type: ignore[arg-type]


def set_scales(axes: Axes, lines: Sequence[Curve], x_scale: str, y_scale: str, y_unit: str) -> None:
    """Set a panel's scales and ticks; on log2 the ticks are the first curve's x, named as far as there is room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if x_scale == "log2":
        axes.set_xscale("log", base=2)
        ticks = [float(x) for x in lines[0].x]
        every = 1 if len(ticks) <= 7 else 2  # four digits each do not fit side by side
        named = set(ticks[::-every])
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}" if x in named else ""))
    if y_scale == "log":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        few = math.log10(high / low) < 2  # powers of ten alone would leave an axis with one number
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if few else (1,), numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value) + y_unit))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if y_unit:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{y_unit}"))


def tick(value: float) -> str:
    """Write a tick of a log axis as text: math markup would keep its own font."""
    if 0.01 < value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10**exponent)
    return (
        ("" if factor == 1 else f"{factor}·")
        + "10"
        + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def label_ends(axes: Axes, lines: Sequence[Curve], height: float) -> None:
    """Write each curve's name beside its last point, moved apart where names would touch."""
    wanted = []
    axes.autoscale_view()
    axes.set_ylim(axes.get_ylim())  # labels must not move the axes
    for line in lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if _shown(y, axes.get_yscale())]
        if points:
            end = axes.transAxes.inverted().transform(axes.transData.transform(points[-1]))[1]
            wanted.append((float(end), line))
    # From below; curves that end together keep the order they were given in, from above.
    wanted = sorted(reversed(wanted), key=lambda pair: round(pair[0], 2))
    line_height = 16 / height
    heights = [line_height * (1 + line.label.count("\n")) for _, line in wanted]
    for place, (_, line) in zip(_apart([end for end, _ in wanted], heights), wanted, strict=True):
        axes.text(
            1.03, place, line.label, transform=axes.transAxes, color=SERIES_COLOURS[line.series - 1],
            va="center", ha="left", fontweight="bold", linespacing=1.15,
        )  # fmt: skip


def _shown(y: float, scale: str) -> bool:
    return math.isfinite(y) and (scale != "log" or y > 0)


def _apart(centres: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Move labels with ascending centres just so far that none overlaps the next, none below 0."""
    placed: list[float] = []
    for centre, height in zip(centres, heights, strict=True):
        least = placed[-1] + (heights[len(placed) - 1] + height) / 2 if placed else height / 2
        placed.append(max(centre, least))
    most = 1.04
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], most - heights[i] / 2)
        most = placed[i] - heights[i] / 2
    return placed


def _inline(figure: Figure, alt: str, titles: Mapping[str, str]) -> str:
    """Turn a figure into an SVG element that can stand in a page beside others."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    for name, title in titles.items():
        svg = svg.replace(f'<g id="{name}">', f'<g id="{name}"><title>{escape(title)}</title>')
    prefix = "p" + hashlib.sha256(alt.encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)  # ids are unique in a figure, not in a page
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    opening = f'<svg role="img" aria-label="{escape(alt)}" {view_box[0]} preserveAspectRatio="xMidYMid meet">'
    return opening + svg[svg.index(">") + 1 :].strip()
