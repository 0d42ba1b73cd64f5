"""Where a plot of this room is written, and the few colours that its plots share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib takes a quarter of a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "FAINT", "new_figure", "save", "writable"]

COLOURS = ("#1b6ca8", "#c8553d", "#3f8f4f", "#8a5fb0", "#b58900", "#4d4d4d")
FAINT = "#999999"


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


def new_figure(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with `rows * columns` panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.7 * rows), layout="constrained")
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.7)
    return figure, panels


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure; the suffix says the format.

    Raises:
        ValueError: as `writable`.
    """
    target = writable(path)
    figure.savefig(target, dpi=150)
    return target
