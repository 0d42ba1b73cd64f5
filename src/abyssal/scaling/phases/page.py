"""A phase diagram as files: a table, a picture, and a page with both heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from abyssal.report.page import Column, Figure, Headline, Page, Section, Table, write
from abyssal.report.plots import Curve, curves, drawing, write_above
from abyssal.scaling.phases.crossing import Critical
from abyssal.scaling.phases.diagram import CLIP, PhaseDiagram
from abyssal.util.environment import Environment

__all__ = ["build_page", "save"]

_SIZE = (430, 380)
_MOST_ROWS = 13
_LETTERS = {"hidden": ("h", "|h_L − h_0| / |h_0|"), "gradient": ("g", "|g_L − g_0| / |g_L|")}
_REGIMES = {
    "identity": "frozen: the metric falls with depth",
    "ode": "a limit without quadratic variation, as of a differential equation",
    "sde": "a limit with quadratic variation, as of a stochastic differential equation",
    "explosion": "the metric grows with depth",
    "collapse": "the positive part of the state, which alone drives res1, vanishes",
}


def save(diagram: PhaseDiagram, folder: Path, command: str, environment: Environment) -> Path:
    """Write `phase.csv`, `phase.png` and `index.html` into a folder, each whole or not at all; return the page."""
    diagram.to_csv(folder / "phase.csv")
    diagram.plot(folder / "phase.png")
    return write(build_page(diagram, command, environment), folder / "index.html")


def build_page(diagram: PhaseDiagram, command: str, environment: Environment) -> Page:
    """Return the page; every number on it comes from the diagram."""
    points = len(diagram.betas) * len(diagram.hursts or (None,))
    weights = f" with {diagram.init} weights" if diagram.init else ""
    lead = (
        f"{diagram.network}{weights}, depth {diagram.depth:,}, width {diagram.width}, branches scaled by "
        f"`depth^-beta`: {points:,} points, each the mean over {diagram.models} independent models and "
        f"{diagram.inputs} inputs."
    )
    return Page(
        title=_title(diagram),
        lead=lead,
        command=command,
        headlines=_headlines(diagram),
        sections=(_map(diagram, "hidden"), _map(diagram, "gradient"), _critical(diagram), _regimes(diagram)),
        facts={**environment.facts(), "Seed": str(diagram.seed), "CPU time": f"{diagram.seconds:.0f} s in all"},
    )


def _title(diagram: PhaseDiagram) -> str:
    at = diagram.critical_beta()
    known = at.value[np.isfinite(at.value)]
    if not len(known):
        return "No scale in this range moves states by their own length"
    low, high = f"{known.min():.2f}", f"{known.max():.2f}"
    if low == high:
        return f"States move by their own length at beta = {low}"
    return f"States move by their own length at beta from {low} to {high}"


def _headlines(diagram: PhaseDiagram) -> tuple[Headline, ...]:
    hidden, gradient = diagram.critical_beta(), diagram.critical_beta("gradient")
    heads = []
    for j in sorted({0, (len(hidden.value) - 1) // 2, len(hidden.value) - 1}):
        where = "" if hidden.hursts[j] is None else f" at Hurst index {hidden.hursts[j]:g}"
        heads.append(Headline(_beta(hidden, j), f"beta at which states move by their own length{where}"))
    if len(heads) == 1:
        heads.append(Headline(_beta(gradient, 0), "beta at which gradients do"))
    return tuple(heads)


def _map(diagram: PhaseDiagram, metric: str) -> Section:
    letter, formula = _LETTERS[metric]
    name = "States" if metric == "hidden" else "Gradients"
    values = diagram.hidden if metric == "hidden" else diagram.gradient
    title = f"{name}: {formula}"
    alt = f"log10 of {formula} over beta" + ("" if diagram.hursts is None else " and Hurst index")
    finite = values[np.isfinite(values)]
    reach = f"Values go from 10^{finite.min():.1f} to 10^{finite.max():.1f}." if finite.size else ""
    text = {
        "hidden": "How far the last state is from the first one, relative to it. `h_0` is a random linear image of "
        "the input, and every layer adds `depth^-beta` times its branch.",
        "gradient": "The same of the loss's gradients by the states, on their way from the last layer to the first.",
    }[metric]
    if diagram.hursts is None or len(diagram.hursts) < 2:
        mean = values.reshape(len(diagram.betas), -1)[:, 0]
        line = Curve(f"log10\n|Δ{letter}| / |{letter}|", diagram.betas, np.clip(mean, -CLIP, CLIP).tolist(), 1, "dots")
        svg = curves([line], alt=alt, x_label="beta", y_label=f"log10 of {formula}", guide=(0.0, "1"))
        caption = f"Cut off at 10^±{CLIP:g}. {reach}"
    else:
        svg = _heat(diagram, metric, alt)
        caption = (
            "Blue falls short of 1, red goes beyond; full colour at 10^±3 and outside. Black: where the metric is 1, "
            f"with its 95 % interval. {reach}"
        )
        if diagram.init == "fbm":
            caption += " Dashed: beta = max(1/2, H)."
    return Section(title, (text,), Figure(svg, caption))


def _heat(diagram: PhaseDiagram, metric: str, alt: str) -> str:
    with drawing(alt, _SIZE, right=70) as picture:
        axes = picture.axes
        axes.grid(False)
        # On the map's own colours, which do not change with the page's scheme: black, not its ink.
        mesh = diagram.draw_map(axes, metric)
        axes.set_xlabel("Hurst index")
        box = axes.get_position()
        bar = picture.figure.add_axes((box.x1 + 0.03, box.y0, 0.03, box.height))
        picture.figure.colorbar(mesh, cax=bar, extend="both")
        bar.grid(False)
        write_above(axes, "beta")
        bar.set_title("log10", fontsize=8)
    return picture.svg


def _critical(diagram: PhaseDiagram) -> Section:
    hidden, gradient = diagram.critical_beta(), diagram.critical_beta("gradient")
    shown = _few(len(hidden.value))
    named = diagram.hursts is not None
    rows = tuple(
        (f"{hidden.hursts[j]:g}" if named else diagram.init or diagram.network, _beta(hidden, j), _beta(gradient, j))
        for j in shown
    )
    columns = (Column("Hurst index" if named else "weights", named), Column("states"), Column("gradients"))
    caption = "Beta at which the metric is 1, with its 95 % interval over models"
    return Section(
        "Where the metrics are 1",
        (
            "This is one depth. At the critical beta a metric tends to a number of order one as depth grows, not to "
            f"1, so these are off by about `log10(that number) / log10({diagram.depth})`, which the intervals do not "
            "hold. "
            "`abyssal.scaling.critical_beta` compares depths instead.",
        ),
        table=Table(caption, columns, rows),
    )


def _regimes(diagram: PhaseDiagram) -> Section:
    names, counts = np.unique(diagram.regimes(), return_counts=True)
    total = int(counts.sum())
    rows = tuple(
        (str(name) or "nothing moved", _REGIMES.get(str(name), ""), f"{count / total:.0%}")
        for name, count in zip(names, counts, strict=True)
    )
    columns = (Column("regime", False), Column("meaning", False), Column("of the points"))
    return Section(
        "Regimes",
        (
            "By `log10(metric) / log10(depth)`, an estimate of the metric's slope in depth: below -0.1 frozen, above "
            "0.1 exploding. `diagram.regimes(other)` takes slopes from a second depth, and "
            "`abyssal.scaling.phases.critical.regime` gives them with their uncertainty.",
        ),
        table=Table("How much of the diagram each regime takes", columns, rows),
    )


def _beta(critical: Critical, j: int) -> str:
    value, low, high = (float(figure[j]) for figure in (critical.value, critical.low, critical.high))
    if not np.isfinite(value):
        return "outside"
    return f"{value:.2f}" if not np.isfinite(low) else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _few(count: int) -> Sequence[int]:
    return np.unique(np.linspace(0, count - 1, min(count, _MOST_ROWS)).round().astype(int)).tolist()
