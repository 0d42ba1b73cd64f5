"""The plot of a depth check: sizes against depth, the output step by step, and the stream block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from abyssal.scaling.transfer.check_result import JUDGED, DepthCheck, Run
from abyssal.scaling.transfer.plots import depth_colours, writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["by_step", "draw_check", "profile"]

_COLOURS = ("#4d4d4d", "#8a5fb0", "#c8553d", "#1b6ca8", "#3f8f4f")
_MARKERS = "s^oDv"
_NAMES = {
    "stream": "stream, at init",
    "output": "output, at init",
    "first_step": "output's change, first step of blocks",
    "output_change": "output's change, all steps",
    "stream_change": "stream's change, all steps",
}


def profile(check: DepthCheck, depth: int, values: Callable[[Run], tuple[float, ...]]) -> list[float]:
    """Return [blocks], the median over seeds of what each block of one depth has; nan where no run has a number."""
    runs = [values(run) for run in check.runs if run.depth == depth]
    return [_middle(column) for column in zip(*runs, strict=True)]


def by_step(check: DepthCheck, depth: int) -> list[float]:
    """Return [steps], the median over seeds of the output's change after each step."""
    unit = lambda run: run.output if check.relative else 1.0  # noqa: E731
    return profile(check, depth, lambda run: tuple(moved / unit(run) for moved in run.output_moved))


def draw_check(path: Path, check: DepthCheck) -> Path:
    """Draw four panels."""
    from matplotlib.figure import Figure

    writable(path)
    figure = Figure(figsize=(11.5, 7.6), layout="constrained")
    panels = [figure.add_subplot(2, 2, i + 1) for i in range(4)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_yscale("log")
    _draw_sizes(panels[0], check)
    colours = depth_colours(len(check.depths))
    for depth, colour in zip(check.depths, colours, strict=True):
        place = lambda values: (np.arange(len(values)) + 1) / len(values)  # noqa: E731
        steps = by_step(check, depth)
        panels[1].plot(range(1, len(steps) + 1), _drawn(steps), "o-", color=colour, markersize=4, label=str(depth))
        for axes, values in ((panels[2], "increment"), (panels[3], "stream_change")):
            y = profile(check, depth, lambda run, name=values: getattr(run, name))  # type: ignore[misc]
            axes.plot(place(y), _drawn(y), "o-", color=colour, markersize=2.5, linewidth=1.3, label=str(depth))
    panels[1].set(title="change of the output since initialisation", xlabel="step")
    panels[1].set_xticks(range(1, check.steps + 1, max(1, check.steps // 8)))
    panels[2].set(title="increment / stream, at initialisation", xlabel="block / depth")
    panels[3].set(title=f"change of the stream after {check.steps} steps", xlabel="block / depth")
    panels[1].legend(title="depth", frameon=False, fontsize=8)
    figure.suptitle(f"Depth check, rule {check.rule}: {'passed' if check.passed else 'not passed'}", fontweight="bold")
    figure.savefig(path, dpi=150)
    return path


def _draw_sizes(axes: Axes, check: DepthCheck) -> None:
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


def _middle(values: tuple[float, ...]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


def _drawn(values: np.ndarray | list[float]) -> np.ndarray:
    """What a logarithmic axis can show."""
    y = np.asarray(values, dtype=float)
    return np.where(np.isfinite(y) & (y > 0), y, np.nan)
