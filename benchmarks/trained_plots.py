"""The plots of reconstruct_trained.py: gradient error against stored bytes, step time as colour."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import NullFormatter, ScalarFormatter

from trained_policies import configs
from trained_tables import TITLES, bytes_ratio, image, median_error, time_ratios

# family: marker, line, where its points' labels stand (points to the right, points up)
STYLES = {
    "Code(b)": ("o", "-", (0, 7)),
    "Code(b), first kept": ("o", ":", (0, 7)),
    "Code(b, refine=1)": ("s", "-", (0, -14)),
    "Code(b, refine=1), first kept": ("s", ":", (0, -14)),
    **{f"Reverse({k})": (marker, "--", (9, -3)) for k, marker in enumerate("v<^>")},
    "Keep": ("P", "", (-16, 10)),
    "stash": ("X", "", (0, 8)),
    "default": ("*", "", (-34, 2)),
    "plan": ("D", "", (-22, -9)),
}
_SMALL = 8.5
SHOWN = (1e-5, 3.0)  # errors beyond this are drawn at the edge


def plot_all(results: dict[str, Any], folder: Path) -> None:
    """One PNG per network."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in results["networks"].items():
        figure = _plot(name, network)
        figure.savefig(folder / image(name), dpi=150)
        plt.close(figure)


def _plot(name: str, network: dict[str, Any]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    known = [statistics.median(r) for c in network["cells"] if (r := time_ratios(network, c))]
    norm = Normalize(1.0, max([1.5, *known])) if known else None
    for family, (marker, line, offset) in STYLES.items():
        _draw_family(axes, network, family, marker, line, offset, norm)
    unit = statistics.median(network["unit"])
    axes.axhline(unit, color="0.4", linewidth=1, zorder=1)
    axes.text(1.0, unit, "bf16 autocast ", color="0.3", fontsize=_SMALL, ha="right", va="bottom", zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="stored bytes / checkpointing's (float32)")
    axes.set_ylabel("relative error of the gradient, median")
    axes.set_title(TITLES[name], loc="left")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1) if t >= axes.get_xlim()[0]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlim(right=1.03)
    axes.grid(True, which="major", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=_SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if norm is not None:
        shades = plt.cm.ScalarMappable(norm, "viridis_r")
        figure.colorbar(shades, ax=axes, label="step time / checkpointing's", location="bottom", shrink=0.5, aspect=40)
    return figure


def _draw_family(
    axes: Axes, network: dict[str, Any], family: str, marker: str, line: str, offset: tuple[int, int], norm: Any
) -> None:
    points = []
    for config in configs():
        x, y = bytes_ratio(network, config.name), median_error(network, config.name)
        if config.family == family and not math.isnan(x) and not math.isnan(y):
            points.append((x, min(max(y, SHOWN[0]), SHOWN[1]), config))
    if not points:
        return
    meaning = {"Code": "numbers: bits", "Reve": "numbers: first blocks kept", "plan": "numbers: tolerance"}
    label = family if family not in ("Code(b)", "Reverse(0)", "plan") else f"{family} ({meaning[family[:4]]})"
    axes.plot(
        [p[0] for p in points], [p[1] for p in points], linestyle=line or "none", color="0.6", linewidth=1, zorder=2
    )
    size = 170 if marker == "*" else 48
    for x, y, config in points:
        ratios = time_ratios(network, config.name)
        colour = plt.cm.viridis_r(norm(statistics.median(ratios))) if ratios and norm else "0.55"
        face = "white" if family.endswith("first kept") else colour
        axes.scatter(
            [x],
            [y],
            marker=marker,
            s=size,
            facecolor=face,
            edgecolor=colour,
            linewidth=1.8,
            zorder=3 + (marker in "*D"),
        )
        text = f"{config.label}, exact" if median_error(network, config.name) == 0 else config.label
        if family in ("Reverse(1)", "Reverse(2)", "Reverse(3)"):  # at the same bytes as Reverse(0)
            continue
        axes.annotate(text, (x, y), offset, textcoords="offset points", fontsize=_SMALL, ha="center", zorder=4)
    face = "white" if family.endswith("first kept") else "0.45"
    axes.plot([], [], marker=marker, linestyle=line or "none", color="0.6", markerfacecolor=face,
              markeredgecolor="0.45", markeredgewidth=1.6, label=label)  # fmt: skip
