"""Figures 1 to 7 of Marion, Fermanian, Biau, Vert: what scale and regularity of the weights do to a deep network.

    .venv/bin/python examples/marion2022.py                      # reduced size, about a minute
    .venv/bin/python examples/marion2022.py --size paper         # the paper's sizes, ten minutes; resumes if killed

Random res-3 networks, `h <- h + L^-beta V relu(W h)`, width 40, depth up to 1,000. Figures 1 and 3: states and
gradients against depth, independent weights. Figure 2: the law of |h_L|/|h_0| at beta = 1/2 and its SDE limit.
Figures 4 and 5: as 1 and 3 with weights smooth in depth. Figures 6 and 7: heat maps over beta and the Hurst index of
fractional weights. Each is drawn, and what the paper says of it is checked on the numbers.

Source: arXiv 2206.06929; JMLR 26 (2025).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from abyssal.limits import sde
from abyssal.scaling import PhaseDiagram, phase_diagram
from abyssal.sweep import Store

Array = np.ndarray


@dataclass(frozen=True)
class Size:
    """How much is drawn."""

    depths: tuple[int, ...]
    models: int
    histogram: int  # networks in figure 2
    betas: tuple[float, ...]
    hursts: tuple[float, ...]
    map_models: int


def grid(low: float, high: float, count: int) -> tuple[float, ...]:
    """Evenly spaced numbers."""
    return tuple(float(x) for x in np.linspace(low, high, count).round(6))


SIZES = {
    "small": Size((10, 30, 100, 300), 20, 200, grid(0.2, 1.3, 12), grid(0.1, 0.9, 5), 2),
    "paper": Size(
        tuple(int(n) for n in np.linspace(10, 1000, 10)), 50, 1000, grid(0.2, 1.3, 70), grid(0.05, 0.97, 51), 5
    ),
}
IID, SMOOTH = (1.0, 0.25, 0.5), (2.0, 0.5, 1.0)
LABELS = {"hidden": "$|h_L - h_0|\\,/\\,|h_0|$", "gradient": "$|g_L - g_0|\\,/\\,|g_L|$"}
Claim = tuple[str, str, str, bool]  # figure, what the paper says, what was found, whether it holds


def against_depth(init: str, betas: Sequence[float], size: Size, store: Store) -> dict[int, PhaseDiagram]:
    """The metrics at each depth, for a few betas."""
    ordered = sorted(betas)
    return {
        depth: phase_diagram("res3", init, depth, betas=ordered, models=size.models, inputs=1, store=store)
        for depth in size.depths
    }


def draw_against_depth(found: dict[int, PhaseDiagram], betas: Sequence[float], metric: str) -> Figure:
    """One panel per beta: mean and its 95 % interval over models, as the paper draws it."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, beta in zip(figure.subplots(1, len(betas)), betas, strict=True):
        values = np.stack([column(found[depth], metric, beta) for depth in found])  # [depths, models]
        mean, error = values.mean(1), 1.96 * values.std(1, ddof=1) / np.sqrt(values.shape[1])
        axes.plot(list(found), mean)
        axes.fill_between(list(found), mean - error, mean + error, alpha=0.25)
        axes.set_title(f"beta = {beta:g}")
        axes.set_xlabel("L")
        if mean.max() > 100 * mean.min():
            axes.set_yscale("log")
    figure.axes[0].set_ylabel(LABELS[metric])
    return figure


def column(diagram: PhaseDiagram, metric: str, beta: float) -> Array:
    """A metric itself, not its logarithm, of each model at one beta. [models]"""
    return 10.0 ** diagram.samples[metric][:, 0, diagram.betas.index(beta), 0]


def slope(found: dict[int, PhaseDiagram], metric: str, beta: float) -> float:
    """Of the mean logarithm against the logarithm of depth."""
    means = [np.log10(column(diagram, metric, beta)).mean() for diagram in found.values()]
    return float(np.polyfit(np.log10(list(found)), means, 1)[0])


def regimes(figure: str, found: dict[int, PhaseDiagram], metric: str, betas: Sequence[float], critical: float) -> Claim:
    """Stable at the critical beta, exploding below it, frozen above: read from slopes in depth."""
    slopes = {beta: slope(found, metric, beta) for beta in sorted(betas)}
    holds = all(
        abs(s) < 0.15 if beta == critical else (s > 0.15 if beta < critical else s < -0.15)
        for beta, s in slopes.items()
    )
    said = f"explodes below beta = {critical:g}, stable there, identity above ({metric})"
    return figure, said, ", ".join(f"L^{s:+.2f} at {beta:g}" for beta, s in slopes.items()), holds


def histograms(size: Size, store: Store) -> tuple[Figure, Claim]:
    """The laws of both ratios at beta = 1/2, width 100, and the SDE's."""
    depth, width = size.depths[-1], 100
    drawn = phase_diagram(
        "res3", "iid", depth, width, betas=[0.5], models=size.histogram, inputs=1, seed=1, store=store
    )
    limit = sde("res3", width)
    law = limit.law()
    assert law is not None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    x = np.linspace(*law.quantile(np.array([1e-4, 1 - 1e-4])), 200)
    density = np.gradient(law.cdf(x), x)
    moments = []
    for axes, metric, label in zip(
        figure.subplots(1, 2),
        ("hidden_ratio", "gradient_ratio"),
        ("$|h_L|\\,/\\,|h_0|$", "$|g_0|\\,/\\,|g_L|$"),
        strict=True,
    ):
        logs = 2 * np.log(10) * drawn.samples[metric].ravel()
        axes.hist(np.exp(logs / 2), bins=30, density=True, alpha=0.5)
        axes.plot(np.exp(x / 2), density * 2 * np.exp(-x / 2), color="black", label="SDE limit")
        axes.set_xlabel(label)
        axes.legend()
        moments.append((logs.mean(), logs.std(ddof=1) / np.sqrt(len(logs)), logs.var(ddof=1)))
    expected, variance = limit.law_at_depth(depth)
    holds = all(abs(mean - expected) <= 4 * error for mean, error, _ in moments)
    found = "; ".join(f"mean {m:.3f} +- {e:.3f}, variance {v:.4f}" for m, e, v in moments)
    said = f"log of the squared ratios is N({law.mean:.3f}, {variance:.4f}) (ours), no explosion"
    return figure, ("2", said, found, holds)


def heat_maps(size: Size, store: Store) -> tuple[PhaseDiagram, list[Claim]]:
    """Figures 6 and 7: regimes by scale and regularity."""
    diagram = phase_diagram(
        "res3", "fbm", size.depths[-1], betas=size.betas, hursts=size.hursts, models=size.map_models, store=store
    )
    claims: list[Claim] = []
    for figure, metric in (("6", "hidden"), ("7", "gradient")):
        critical = diagram.critical_beta(metric)
        rough = [c for c, h in zip(critical.value, size.hursts, strict=True) if h <= 0.5]
        regular = [c for c, h in zip(critical.value, size.hursts, strict=True) if h >= 0.7]
        said = f"the more regular the weights, the larger the beta of the border ({metric})"
        found = f"{rough[0]:.2f} at H = {size.hursts[0]:g}, {regular[-1]:.2f} at H = {size.hursts[-1]:g}"
        holds = bool(np.all(np.diff(regular) > 0) and min(regular) > max(rough) and np.ptp(rough) < 0.1)
        claims.append((figure, said, found, holds))
    return diagram, claims


def main(
    size: Annotated[Literal["small", "paper"], typer.Option(help="How much to draw.")] = "small",
    out: Annotated[Path, typer.Option(help="Folder of the figures, and of what resumes them.")] = Path("marion2022"),
) -> list[Claim]:
    """Draw the figures, and say of each whether it shows what the paper says."""
    chosen = SIZES["small" if os.environ.get("CI") == "true" else size]
    out.mkdir(parents=True, exist_ok=True)
    claims: list[Claim] = []
    with Store(out / "marion2022.sqlite") as store:
        for figures, init, betas, critical in ((("1", "3"), "iid", IID, 0.5), (("4", "5"), "rbf", SMOOTH, 1.0)):
            found = against_depth(init, betas, chosen, store)
            for figure, metric in zip(figures, ("hidden", "gradient"), strict=True):
                draw_against_depth(found, betas, metric).savefig(out / f"figure{figure}.png", dpi=120)
                claims.append(regimes(figure, found, metric, betas, critical))
        histogram, claim = histograms(chosen, store)
        histogram.savefig(out / "figure2.png", dpi=120)
        diagram, of_maps = heat_maps(chosen, store)
        diagram.plot(out / "figure6-7.png")
    table = Table("figure", "what the paper says", "found", "holds")
    claims = sorted([*claims, claim, *of_maps])
    for figure, said, measured, holds in claims:
        table.add_row(figure, said, measured, "yes" if holds else "[bold red]NO")
    Console().print(table)
    Console().print(f"Figures are in {out}/.")
    return claims


if __name__ == "__main__":
    typer.run(main)
