"""Figures that are files of their own: where one is written, and the colours that they share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from abyssal.util.files import whole

if TYPE_CHECKING:  # matplotlib takes a quarter of a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "FAINT", "LIMIT", "Plotted", "new_figure", "power_guide", "save", "writable"]

COLOURS = ("#1b6ca8", "#c8553d", "#3f8f4f", "#8a5fb0", "#b58900", "#4d4d4d")
LIMIT, FAINT = "#111111", "#999999"


def new_figure(columns: int, rows: int = 1, size: tuple[float, float] | None = None) -> tuple[Figure, list[Axes]]:
    """Return a figure with `rows * columns` panels, row by row, of `size` inches in all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size or (5.2 * columns, 3.9 * rows), layout="constrained")
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.7)
    return figure, panels


class Plotted(ABC):
    """A result with a figure."""

    @abstractmethod
    def figure(self) -> Figure:
        """Return what `plot` writes as a matplotlib figure."""

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw it to a file, whose suffix says the format, and return its path.

        Raises:
            ValueError: as `writable`.
        """
        return save(self.figure(), path)


def power_guide(axes: Axes, depths: Sequence[float], through: float, power: float, label: str) -> None:
    """Draw a dotted line `through * (depth / first depth) ** power`."""
    ends = [min(depths), max(depths)]
    axes.plot(ends, [through * (n / ends[0]) ** power for n in ends], ":", color="#777777", label=label)


def writable(path: str | os.PathLike[str]) -> Path:
    """Return a path to which matplotlib can write.

    Raises:
        ValueError: for a folder that is missing, or a suffix that matplotlib does not write.
    """
    from matplotlib.figure import Figure

    target = Path(path)
    formats = Figure().canvas.get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in formats:
        raise ValueError(
            f"The plot's file name has to end in one of {', '.join(sorted(formats))}, got {target.name!r}."
        )
    if not target.parent.is_dir():
        raise ValueError(f"The plot cannot be written to {target}: there is no folder {target.parent}. Make it first.")
    return target


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure, whole or not at all; the suffix says the format.

    Raises:
        ValueError: as `writable`.
    """
    target = writable(path)
    with whole(target) as beside:
        figure.savefig(beside, format=target.suffix.lstrip(".").lower(), dpi=150)
    return target
