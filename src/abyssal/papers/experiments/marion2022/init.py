"""Figures 1 to 7 of Marion, Fermanian, Biau, Vert: what scale and regularity of weights do to a network when drawn.

Random res-3 networks, `h <- h + L^-beta V relu(W h)`, width 40. Figures 1 and 3: states and gradients against depth,
independent weights. Figure 2: the law of |h_L|/|h_0| at beta = 1/2 and its SDE limit. Figures 4 and 5: as 1 and 3 with
weights smooth in depth. Figures 6 and 7: heat maps over beta and the Hurst index of fractional weights.

The minutes of "paper" are a guess from those of "small" and of the phase diagram at the paper's size.

Source: arXiv 2206.06929; JMLR 26 (2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from abyssal.limits import sde
from abyssal.papers.experiment import Experiment, Finding, Row, Work
from abyssal.papers.shared.grids import even
from abyssal.scaling.phases.crossing import model_means
from abyssal.scaling.phases.diagram import PhaseDiagram, phase_diagram
from abyssal.util.stats import Interval, every, student

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

__all__ = ["EXPERIMENT", "FIGURES", "Settings"]

Array = np.ndarray


@dataclass(frozen=True)
class Settings:
    """How much is drawn.

    Attributes:
        depths: of figures 1, 3, 4 and 5; the largest is that of the other figures.
        models: independent networks at each depth and beta.
        histogram: networks in figure 2, of width 100.
        betas: of the heat maps.
        hursts: of the heat maps.
        map_models: independent networks of each Hurst index.
    """

    depths: tuple[int, ...]
    models: int
    histogram: int
    betas: tuple[float, ...]
    hursts: tuple[float, ...]
    map_models: int


SIZES = {
    "tiny": Settings((10, 40, 160), 6, 60, even(0.2, 1.3, 6), (0.2, 0.5, 0.8), 2),
    "small": Settings((10, 30, 100, 300), 20, 200, even(0.2, 1.3, 12), even(0.1, 0.9, 5), 3),
    "paper": Settings(
        tuple(int(n) for n in np.linspace(10, 1000, 10)), 50, 1000, even(0.2, 1.3, 70), even(0.05, 0.97, 51), 5
    ),
}
# Weights, the betas of the figures with the critical one in the middle, and what is said to happen at it.
PANELS = {"iid": (0.25, 0.5, 1.0), "rbf": (0.5, 1.0, 2.0)}
LABELS = {"hidden": "$|h_L - h_0|\\,/\\,|h_0|$", "gradient": "$|g_L - g_0|\\,/\\,|g_L|$"}
_WIDTH = 100  # of figure 2
_STABLE = 0.15  # powers of depth nearer to 0 than this count as none
_APART = 0.15  # betas nearer to one another than this count as the same


def run(settings: Settings, work: Work) -> list[Row]:
    """Measure all figures: rows of part "depth", "histogram" and "map", in logarithms to base 10."""
    rows: list[Row] = []
    for weights, betas in PANELS.items():
        for depth in settings.depths:
            found = _diagram(
                work, f"{weights} weights, depth {depth}", weights, depth, betas, settings.models, inputs=1
            )
            rows += _rows("depth", weights, found)
    depth = settings.depths[-1]
    drawn = _diagram(work, "histogram", "iid", depth, (0.5,), settings.histogram, inputs=1, width=_WIDTH, seed=1)
    rows += _rows("histogram", "iid", drawn, "_ratio")
    drawn = _diagram(
        work, "heat map", "fbm", depth, settings.betas, settings.map_models, inputs=10, hursts=settings.hursts
    )
    return rows + _rows("map", "fbm", drawn)


def _diagram(
    work: Work, what: str, weights: str, depth: int, betas: Sequence[float], models: int, **others: Any
) -> PhaseDiagram:
    found = phase_diagram(
        "res3",
        weights,
        depth,
        betas=betas,
        models=models,
        **others,
        store=work.store,
        engine=work.engine,
        jobs=work.jobs,
        progress=lambda _, done, total: work.progress(what, done, total),
    )
    work.seconds += found.seconds
    return found


def _rows(part: str, weights: str, found: PhaseDiagram, kind: str = "") -> list[Row]:
    """Return a row for each network and beta: the mean over its inputs of the metrics' logarithms."""
    # [models, families, betas]
    means = {name: model_means(found.samples[f"{name}{kind}"]) for name in ("hidden", "gradient")}
    families = found.hursts or (None,)
    return [
        {
            "part": part,
            "weights": weights,
            "depth": found.depth,
            "hurst": hurst,
            "beta": beta,
            "model": model,
            **{name: float(mean[model, j, i]) for name, mean in means.items()},
        }
        for j, hurst in enumerate(families)
        for i, beta in enumerate(found.betas)
        for model in range(found.models)
    ]


# ---------------------------------------------------------------------- what comes out


def _column(rows: list[Row], metric: str, **where: object) -> Array:
    """Return a metric's logarithms of the rows that are meant. [rows]."""
    return np.array([row[metric] for row in rows if all(row[k] == v for k, v in where.items())], dtype=float)


def _slope(rows: list[Row], metric: str, weights: str, beta: float, depths: Sequence[int]) -> Interval:
    """Return the power of depth in the mean logarithm of a metric, with its 95 % interval over models."""
    columns = [_column(rows, metric, part="depth", weights=weights, beta=beta, depth=depth) for depth in depths]
    x = np.log10(np.asarray(depths, dtype=float)) - np.log10(depths).mean()
    x /= (x**2).sum()
    value = float(sum(a * column.mean() for a, column in zip(x, columns, strict=True)))
    variance = sum(a**2 * column.var(ddof=1) / len(column) for a, column in zip(x, columns, strict=True))
    half = student(min(len(column) for column in columns) - 1) * math.sqrt(float(variance))
    return Interval(value, value - half, value + half)


def _regimes(figure: str, rows: list[Row], settings: Settings, weights: str, metric: str) -> Finding:
    """Judge figures 1, 3, 4 and 5: explosion below the critical beta, a limit at it, the identity above."""
    betas = PANELS[weights]
    bounds = ((_STABLE, math.inf), (-_STABLE, _STABLE), (-math.inf, -_STABLE))
    said, answers = [], []
    for beta, (least, most) in zip(betas, bounds, strict=True):
        power = _slope(rows, metric, weights, beta, settings.depths)
        answers.append(power.between(least, most))
        said.append(f"L^{power.value:+.2f} ± {power.high - power.value:.2f} at {beta:g}")
    kind = "independent weights" if weights == "iid" else "weights smooth in depth"
    claim = (
        f"figure {figure}: {'states' if metric == 'hidden' else 'gradients'}, {kind}: explode below "
        f"beta = {betas[1]:g}, have a limit there, do not move above"
    )
    return Finding(claim, ", ".join(said), every(answers))


def _histogram(rows: list[Row], settings: Settings) -> Finding:
    """Judge figure 2: both ratios have the mean of the SDE's law at this depth, within four standard errors."""
    limit = sde("res3", _WIDTH)
    expected, variance = limit.law_at_depth(settings.depths[-1])
    answers, said = [], []
    for metric in ("hidden", "gradient"):
        logs = 2 * math.log(10) * _column(rows, metric, part="histogram")
        error = logs.std(ddof=1) / math.sqrt(len(logs))
        answers.append(abs(logs.mean() - expected) <= 4 * error if error < 0.05 else None)
        said.append(f"{metric}: mean {logs.mean():.3f} ± {error:.3f}, variance {logs.var(ddof=1):.4f}")
    claim = f"figure 2: the log of the squared ratios at beta = 1/2 is N({expected:.3f}, {variance:.4f}), as the SDE's"
    return Finding(claim, "; ".join(said), every(answers))


def _map(rows: list[Row], settings: Settings) -> PhaseDiagram:
    """Return the heat maps as a diagram again; inputs are averaged over already."""
    shape = (len(settings.hursts), len(settings.betas), settings.map_models, 1)
    samples = {
        metric: _column(rows, metric, part="map").reshape(shape).transpose(2, 0, 1, 3)
        for metric in ("hidden", "gradient")
    }
    return PhaseDiagram(
        "res3", "fbm", settings.depths[-1], 40, settings.betas, settings.hursts, seed=0, samples=samples
    )


def _border(figure: str, diagram: PhaseDiagram, metric: str) -> Finding:
    """Judge figures 6 and 7: beta of the border is the same for rough weights, and grows with H for regular ones."""
    critical = diagram.critical_beta(metric)
    hursts = np.array(critical.hursts, dtype=float)
    value, low, high = (np.asarray(part) for part in (critical.value, critical.low, critical.high))
    regular, rough = np.flatnonzero(hursts >= 0.7), np.flatnonzero(hursts <= 0.5)
    first, last = int(rough[0]), int(regular[-1])
    # From the roughest to the most regular: intervals that do not touch decide.
    grows = True if low[last] > high[first] else False if high[last] < low[first] else None
    falls = bool(np.any(high[regular][1:] < low[regular][:-1]))
    # How far apart the rough ones are: at most, and at least.
    most, least = high[rough].max() - low[rough].min(), low[rough].max() - high[rough].min()
    same = True if most < _APART else False if least > _APART else None
    answers = [grows, not falls, same]
    what = "states" if metric == "hidden" else "gradients"
    claim = (
        f"figure {figure}: {what}: the more regular the weights, the larger the beta of the border; the same for all H "
        "up to 1/2"
    )
    said = ", ".join(
        f"{value[j]:.2f} ({low[j]:.2f} to {high[j]:.2f}) at H = {hursts[j]:g}" for j in sorted({first, rough[-1], last})
    )
    return Finding(claim, said, every(answers) if np.isfinite(value).all() else None)


def check(rows: list[Row], settings: Settings) -> list[Finding]:
    """Judge each figure, in the paper's order."""
    diagram = _map(rows, settings)
    return [
        _regimes("1", rows, settings, "iid", "hidden"),
        _histogram(rows, settings),
        _regimes("3", rows, settings, "iid", "gradient"),
        _regimes("4", rows, settings, "rbf", "hidden"),
        _regimes("5", rows, settings, "rbf", "gradient"),
        _border("6", diagram, "hidden"),
        _border("7", diagram, "gradient"),
    ]


# ---------------------------------------------------------------------- figures


def _draw_depths(figure: FigureBase, rows: list[Row], settings: Settings, weights: str, metric: str) -> None:
    """One panel per beta: mean and its 95 % interval over models, as the paper draws it."""
    panels = figure.subplots(1, 3)
    panels[0].set_ylabel(LABELS[metric])
    for axes, beta in zip(panels, PANELS[weights], strict=True):
        columns = [
            10.0 ** _column(rows, metric, part="depth", weights=weights, beta=beta, depth=depth)
            for depth in settings.depths
        ]
        mean = np.array([column.mean() for column in columns])
        error = np.array([1.96 * column.std(ddof=1) / math.sqrt(len(column)) for column in columns])
        axes.plot(settings.depths, mean, marker="o", markersize=3)
        axes.fill_between(settings.depths, mean - error, mean + error, alpha=0.25)
        axes.set_title(f"beta = {beta:g}", fontsize=9)
        axes.set_xlabel("L")
        if mean.max() > 100 * mean.min():
            axes.set_yscale("log")


def _draw_histograms(figure: FigureBase, rows: list[Row], settings: Settings) -> None:
    """The laws of both ratios at beta = 1/2, width 100, and the SDE's."""
    law = sde("res3", _WIDTH).law()
    assert law is not None
    low, high = law.quantile(np.array([1e-4, 1 - 1e-4])).tolist()
    x = np.linspace(low, high, 200)
    density = np.gradient(law.cdf(x), x)
    labels = {"hidden": "$|h_L|\\,/\\,|h_0|$", "gradient": "$|g_0|\\,/\\,|g_L|$"}
    for axes, (metric, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        axes.hist(10.0 ** _column(rows, metric, part="histogram"), bins=30, density=True, alpha=0.5)
        axes.plot(np.exp(x / 2), density * 2 * np.exp(-x / 2), color="black", label="SDE limit")
        axes.set_xlabel(label)
        axes.legend()


def _draw_map(figure: FigureBase, rows: list[Row], settings: Settings) -> None:
    """Both heat maps with their borders."""
    diagram = _map(rows, settings)
    for axes, metric in zip(figure.subplots(1, 2), ("hidden", "gradient"), strict=True):
        diagram.draw_heat(figure, axes, metric)
        axes.set_title(f"$\\log_{{10}}$ of {LABELS[metric]}", fontsize=9)


def _panel(weights: str, metric: str) -> Callable[[FigureBase, list[Row], Settings], None]:
    return lambda figure, rows, settings: _draw_depths(figure, rows, settings, weights, metric)


# Name, heading, height in inches at a width of 9, and what draws it.
FIGURES = (
    ("1", "Figure 1: states, independent weights", 2.7, _panel("iid", "hidden")),
    ("2", "Figure 2: the law at beta = 1/2", 2.9, _draw_histograms),
    ("3", "Figure 3: gradients, independent weights", 2.7, _panel("iid", "gradient")),
    ("4", "Figure 4: states, weights smooth in depth", 2.7, _panel("rbf", "hidden")),
    ("5", "Figure 5: gradients, weights smooth in depth", 2.7, _panel("rbf", "gradient")),
    ("6-7", "Figures 6 and 7: scale and regularity", 3.9, _draw_map),
)


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Draw all seven figures, one under another."""
    from matplotlib.figure import Figure

    heights = [height for _, _, height, _ in FIGURES]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(len(FIGURES), 1, height_ratios=heights)
    for part, (_, heading, _, draw) in zip(parts, FIGURES, strict=True):
        draw(part, rows, settings)
        part.suptitle(heading, fontsize=11, fontweight="bold")
    return figure


EXPERIMENT = Experiment(
    name="marion2022/init",
    paper="Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929",
    claim="With independent weights only branches scaled by depth^-1/2 have a limit, an SDE; with weights smooth in "
    "depth, depth^-1, an ODE; between them the right scale follows the weights' regularity.",
    sizes=SIZES,
    minutes={"tiny": 0.07, "small": 0.3, "paper": 15},
    run=run,
    check=check,
    plot=plot,
    hardware="two cores and ten minutes",
)
