"""Plots of learning-rate transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from abyssal.scaling.transfer.learning_rate import Transfer

__all__ = ["depth_colours", "draw_transfers", "writable"]


def writable(path: Path) -> Path:
    """Return a path to which matplotlib can write.

    Raises:
        ValueError: for a folder that is missing, or another suffix.
    """
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"The plot's file name has to end in one of {', '.join(sorted(formats))}, got {path.name!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"The plot cannot be written to {path}: there is no folder {path.parent}. Make it first.")
    return path


def depth_colours(count: int) -> list[tuple[float, ...]]:
    """Return colours from shallow to deep, told apart also in grey."""
    from matplotlib import colormaps

    return [tuple(colour) for colour in colormaps["viridis_r"](np.linspace(0.12, 1.0, count))]


def draw_transfers(path: Path, transfers: Sequence[Transfer]) -> Path:
    """Draw loss against learning rate, a panel for each rule."""
    from matplotlib.figure import Figure

    if not transfers:
        raise ValueError("There is no transfer to draw: give one at least.")
    writable(path)
    figure = Figure(figsize=(1.2 + 3.9 * len(transfers), 4.0), layout="constrained")
    panels = [figure.add_subplot(1, len(transfers), i + 1) for i in range(len(transfers))]
    finite = np.concatenate([t.mean_losses[np.isfinite(t.mean_losses)] for t in transfers])
    best = finite.min() if len(finite) else 0.0
    # What is far above the best says only that it is far above.
    worst = max(float(t.mean_losses[:, 0][np.isfinite(t.mean_losses[:, 0])].max(initial=best)) for t in transfers)
    top = max(worst, best + 1e-9) + 0.08 * (worst - best)
    for transfer, axes in zip(transfers, panels, strict=True):
        draw_transfer(axes, transfer)
        axes.set_ylim(best - 0.06 * (top - best), top)
    panels[0].set_ylabel("loss")
    panels[-1].legend(title="depth", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    return path


def draw_transfer(axes: Axes, transfer: Transfer) -> None:
    """Draw one rule: a curve for each depth, the best rate of each, and its interval."""
    axes.set_xscale("log", base=2)
    optima = {best.depth: best for best in transfer.optima}
    means = transfer.mean_losses
    for row, (depth, colour) in enumerate(zip(transfer.depths, depth_colours(len(transfer.depths)), strict=True)):
        y = np.where(np.isfinite(means[row]), means[row], np.nan)
        axes.plot(transfer.rates, y, "-", color=colour, linewidth=1.6, label=str(depth), zorder=3)
        for s in range(len(transfer.seeds)):
            axes.plot(transfer.rates, np.where(np.isfinite(y), transfer.losses[row, :, s], np.nan), ".", color=colour,
                      markersize=3, alpha=0.6, zorder=2)  # fmt: skip
        if (best := optima.get(depth)) is not None:
            axes.plot([best.rate], [best.loss], "o", color=colour, markersize=7, markeredgecolor="white", zorder=5)
            if not (math.isnan(best.low) or best.at_edge):
                axes.plot([best.low, best.high], [best.loss] * 2, "-", color=colour, linewidth=3, alpha=0.5, zorder=4)
    error = "" if math.isnan(transfer.shift_error) else f" ± {transfer.shift_error:.2f}"
    axes.set_title(f"{transfer.rule}\nbest rate moves by {transfer.shift:+.2f}{error} factors of 2", fontsize=10)
    axes.set_xlabel("base learning rate")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
