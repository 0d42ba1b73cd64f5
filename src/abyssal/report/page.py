"""One self-contained HTML page: headlines, tables and plots, no outside request, light and dark.

A page is data (`Page`); the template alone knows HTML. Texts are plain, with `code` between backticks and links
within the page; everything is escaped except the SVG of figures, which `plots.py` and `picture.py` make.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from abyssal.util.files import write_whole

__all__ = ["Column", "Figure", "Headline", "Page", "Section", "Table", "render", "write"]


@dataclass(frozen=True)
class Headline:
    """One figure that a reader should take away.

    Attributes:
        value: the figure with its unit, e.g. "57x less".
        text: what it is a figure of.
    """

    value: str
    text: str


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: its heading.
        numeric: whether its cells are aligned to the right, in digits of one width.
        wraps: whether its cells hold sentences, which may break.
    """

    name: str
    numeric: bool = True
    wraps: bool = False

    def style(self) -> str:
        """Return the classes of its cells."""
        return " ".join(["number"] * self.numeric + ["wraps"] * self.wraps)


@dataclass(frozen=True)
class Table:
    """A table; its first column heads the rows.

    Attributes:
        caption: what is in it.
        columns: the columns' headings.
        rows: the cells as texts, one tuple per row, as long as `columns`.
        emphasis: index of the row to stress, if any.
        notes: lines under the table.

    Raises:
        ValueError: if a row has not as many cells as there are columns.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    emphasis: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.caption!r}: row {i} has {len(row)} cells for {len(self.columns)} columns"
                )


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        svg: the markup, from `plots.curves`; trusted, not escaped.
        caption: what it shows, and what to see in it.
        data: the plotted numbers, folded away under it.
        narrow: another drawing of the same for screens below 40 rem, where `svg` would have tiny text; such a
            figure takes the page's whole width.
        whole: takes the page's whole width with one drawing for all screens.
    """

    svg: str
    caption: str
    data: Table | None = None
    narrow: str = ""
    whole: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, some text, and at most one figure, one listing and one table.

    Attributes:
        title: the heading.
        text: paragraphs.
        figure: beside the text where the page is wide, under it where it is narrow.
        table: under both, over the whole width.
        code: lines to type, under the text.
        folded: a longer table, folded away under everything else.
        anchor: what `[text](#anchor)` in any text of the page leads to.
    """

    title: str
    text: tuple[str, ...] = ()
    figure: Figure | None = None
    table: Table | None = None
    code: str = ""
    folded: Table | None = None
    anchor: str = ""


@dataclass(frozen=True)
class Page:
    """What one command found.

    Attributes:
        title: the page's heading: the finding, in a few words.
        lead: what was done, in a sentence or two.
        command: the command line that makes this page.
        headlines: the figures to take away.
        sections: the rest, in order.
        facts: hardware, versions and date, by name.
    """

    title: str
    lead: str
    command: str
    headlines: tuple[Headline, ...] = ()
    sections: tuple[Section, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def render(page: Page) -> str:
    """Return the page as one HTML document."""
    return _environment().get_template("page.html.j2").render(page=page)


def write(page: Page, path: Path) -> Path:
    """Write the page to `path`, whole or not at all, making its folder where needed, and return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(page))
    return path


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("abyssal.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    environment.filters["trusted"] = Markup
    return environment


def _prose(text: str) -> Markup:
    """Escape a text; set what is between backticks as code, keep 1e-2 on one line, make `[text](#anchor)` a link."""
    whole = re.sub(r"\b(\d[\d.]*e-\d+)\b", r'<span class="number-word">\1</span>', str(escape(text)))
    whole = re.sub(r"\[([^\[\]]+)\]\((#[\w-]+)\)", r'<a href="\2">\1</a>', whole)
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", whole))
