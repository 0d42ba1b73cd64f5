"""Where a plot is written, checked before any work, and the few colours the plots of this room share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib takes a quarter of a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "LIMIT", "new_figure", "power_guide", "save"]

COLOURS = ("#1b6ca8", "#c8553d", "#3f8f4f", "#8a5fb0", "#b58900", "#4d4d4d")
LIMIT = "#111111"


def new_figure(columns: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with `columns` plots side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 3.9), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.7)
    return figure, axes


def power_guide(axes: Axes, depths: list[int], through: float, power: float, label: str) -> None:
    """Draw a dotted line `through * (depth / first depth) ** power`."""
    ends = [min(depths), max(depths)]
    axes.plot(ends, [through * (n / ends[0]) ** power for n in ends], ":", color="#777777", label=label)


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure; the suffix says the format.

    Raises:
        ValueError: for a folder that is missing, or a suffix that matplotlib does not write.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"The plot cannot be written to {target}: the folder {target.parent} does not exist. Make it.")
    formats = figure.canvas.get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in formats:
        raise ValueError(
            f"The plot's file name has to end in one of {', '.join(sorted(formats))}, got {target.name!r}."
        )
    figure.savefig(target, dpi=150)
    return target
