"""Plots of depth checks and of learning-rate transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from abyssal.report.axes import new_figure, save, writable
from abyssal.scaling.transfer.optima import Losses
from abyssal.scaling.transfer.sizes import JUDGED, Sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_check", "draw_transfers"]

_COLOURS = ("#4d4d4d", "#8a5fb0", "#c8553d", "#1b6ca8", "#3f8f4f")
_MARKERS = "s^oDv"
_NAMES = {
    "stream": "stream, at init",
    "output": "output, at init",
    "first_step": "output's change, first step of blocks",
    "output_change": "output's change, all steps",
    "stream_change": "stream's change, all steps",
}


def depth_colours(count: int) -> list[tuple[float, ...]]:
    """Return colours from shallow to deep, told apart also in grey."""
    from matplotlib import colormaps

    return [tuple(colour) for colour in colormaps["viridis_r"](np.linspace(0.12, 1.0, count))]


def draw_transfers(path: Path, transfers: Sequence[Losses]) -> Path:
    """Draw loss against learning rate, a panel for each rule."""
    if not transfers:
        raise ValueError("There is no transfer to draw: give one at least.")
    writable(path)
    figure, panels = new_figure(len(transfers), size=(1.2 + 3.9 * len(transfers), 4.0))
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
    return save(figure, path)


def draw_transfer(axes: Axes, transfer: Losses) -> None:
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


def draw_check(path: Path, check: Sizes) -> Path:
    """Draw four panels."""
    writable(path)
    figure, panels = new_figure(2, 2, size=(11.5, 7.6))
    for axes in panels:
        axes.set_yscale("log")
    _draw_sizes(panels[0], check)
    colours = depth_colours(len(check.depths))
    for depth, colour in zip(check.depths, colours, strict=True):
        place = lambda values: (np.arange(len(values)) + 1) / len(values)  # noqa: E731
        steps = check.by_step(depth)
        panels[1].plot(range(1, len(steps) + 1), _drawn(steps), "o-", color=colour, markersize=4, label=str(depth))
        for axes, values in ((panels[2], "increment"), (panels[3], "stream_change")):
            y = check.profile(depth, lambda run, name=values: getattr(run, name))  # type: ignore[misc]
            axes.plot(place(y), _drawn(y), "o-", color=colour, markersize=2.5, linewidth=1.3, label=str(depth))
    panels[1].set(title="change of the output since initialisation", xlabel="step")
    panels[1].set_xticks(range(1, check.steps + 1, max(1, check.steps // 8)))
    panels[2].set(title="increment / stream, at initialisation", xlabel="block / depth")
    panels[3].set(title=f"change of the stream after {check.steps} steps", xlabel="block / depth")
    panels[1].legend(title="depth", frameon=False, fontsize=8)
    figure.suptitle(f"Depth check, rule {check.rule}: {'passed' if check.passed else 'not passed'}", fontweight="bold")
    return save(figure, path)


def _draw_sizes(axes: Axes, check: Sizes) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    for name, colour, marker in zip(JUDGED, _COLOURS, _MARKERS, strict=True):
        sizes, slope = check.sizes(name), check.slopes[name]
        if not (np.isfinite(sizes) & (sizes > 0)).any():
            continue
        for s in range(len(check.seeds)):
            axes.plot(check.depths, _drawn(sizes[:, s]), marker, color=colour, markersize=4, alpha=0.6)
        power = "" if math.isnan(slope.value) else f" $L^{{{slope.value:+.2f}}}$"
        axes.plot(check.depths, slope.line(check.depths), "-", color=colour, linewidth=1.6, label=_NAMES[name] + power)
    axes.set(title="sizes against depth, with fitted powers", xlabel="depth")
    axes.set_xticks(check.depths, [str(depth) for depth in check.depths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _drawn(values: np.ndarray | list[float]) -> np.ndarray:
    """What a logarithmic axis can show."""
    y = np.asarray(values, dtype=float)
    return np.where(np.isfinite(y) & (y > 0), y, np.nan)
