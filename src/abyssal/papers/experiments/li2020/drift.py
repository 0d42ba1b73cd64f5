"""How far the tangent kernel moves in training, and how large K3 and K4 are, against width.

Two networks of the same width, depth and samples: the residual one of Li, Luo and Yip, and the fully connected one of
Huang and Yau, whose kernel is about five times as large and learns so much faster. So times are counted in
`n / lambda_max` and in `n / lambda_min` of the kernel at the start: at equal times the fastest, or the slowest,
direction of each network's kernel has learned equally much.

Sources: Li, Luo, Yip, arXiv 2007.03714; Huang, Yau, arXiv 1909.08156. Settings are ours: samples uniform on the unit
sphere, standard normal targets, tanh, c_res = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from abyssal.papers.experiment import Experiment, Finding, Row, Work, listed
from abyssal.papers.shared.lly import COLOUR, PAPER, SHORT, Problem, as_width, draw, drift, factor, followed
from abyssal.papers.shared.powers import by_seed, by_size, name_panel, power
from abyssal.report.axes import new_figure
from abyssal.util.stats import every

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Settings", "check", "plot", "run"]


@dataclass(frozen=True)
class Settings(Problem):
    """How much is measured.

    Attributes, beside those of `Problem`:
        by_largest: times in units of `n / lambda_max`.
        by_least: times in units of `n / lambda_min`.
    """

    by_largest: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    by_least: tuple[float, ...] = (0.5,)


def run(settings: Settings, work: Work) -> list[Row]:
    """Train both networks at every width."""
    rows: list[Row] = []
    looks = [("max", tau) for tau in settings.by_largest] + [("min", tau) for tau in settings.by_least]
    for head, i, found in followed(settings, work, drift, "drift", order=4):
        row: Row = {
            **head,
            "lambda_max": float(found["eigenvalues"][i, 0]),
            "lambda_min": float(found["eigenvalues"][i, -1]),
            **{name: float(found[name][i]) for name in ("K2", "K3", "K4")},
        }
        for j, (unit, tau) in enumerate(looks):
            for name in ("drift", "loss", "least"):
                row[f"{name}_{unit}_{tau:g}"] = float(found[name][i, j])
        rows.append(row)
    return rows


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Judge by powers of the width and by ratios of the networks, seed by seed."""
    last, slow = f"drift_max_{max(settings.by_largest):g}", f"drift_min_{max(settings.by_least):g}"
    powers = {
        (network, column): power(*by_size(rows, "width", column, network=network))
        for network in SHORT
        for column in (last, "K3", "K4")
    }

    def both(column: str) -> str:
        return "; ".join(f"{SHORT[network]}: {as_width(powers[network, column])}" for network in SHORT)

    yield Finding(
        f"the kernel's drift falls with width (time {max(settings.by_largest):g} n / lambda_max)",
        both(last),
        every(powers[network, last].below(0.0) for network in SHORT),
    )
    # The hierarchy's bounds as we recall them: m^-1/2 for K3 and m^-1 for K4, up to logarithms.
    for name, bound in (("K3", -0.5), ("K4", -1.0)):
        answers = [powers[network, name].below(bound + 0.1) for network in SHORT]
        yield Finding(f"sup|{name}| falls at least as fast as m^{bound:g} (to 0.1)", both(name), every(answers))
    for column, unit in ((last, "n / lambda_max"), (slow, "n / lambda_min")):
        time = column.rpartition("_")[2]
        by_width = [
            factor(*(by_seed(rows, column, network=network, width=width) for network in ("resnet", "plain")))
            for width in settings.widths
        ]
        yield Finding(
            f"the ResNet's kernel moves less than the fully connected one's at equal time {time} {unit}",
            f"drift of the ResNet by the other's, from m = {settings.widths[0]} to {settings.widths[-1]}: "
            + ", ".join(found.show(".2g") for found in (by_width[0], by_width[-1])),
            every(found.below(1) for found in by_width),
        )


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Drift at both kinds of time, and the higher kernels, against width."""
    figure, (fast, slow, higher) = new_figure(3)
    for axes, unit, tau in ((fast, "max", max(settings.by_largest)), (slow, "min", max(settings.by_least))):
        for network, name in SHORT.items():
            column = f"drift_{unit}_{tau:g}"
            widths, values = by_size(rows, "width", column, network=network)
            draw(axes, widths, values, f"{name}: {_power(widths, values)}", COLOUR[network])
        title = f"drift |K - K0| / |K0| at {tau:g} n / lambda_{unit}"
        name_panel(axes, title, "width m", settings.widths, yscale="log")
    for kernel, style in (("K3", "o-"), ("K4", "s--")):
        for network, name in SHORT.items():
            widths, values = by_size(rows, "width", kernel, network=network)
            draw(higher, widths, values, f"{kernel}, {name}: {_power(widths, values)}", COLOUR[network], style)
    name_panel(higher, "largest entries at the start", "width m", settings.widths, yscale="log")
    return figure


def _power(widths: list[int], values: object) -> str:
    return f"$m^{{{power(widths, values).value:.2f}}}$"  # type: ignore[arg-type]


EXPERIMENT = Experiment(
    name="li2020/drift",
    paper=PAPER,
    claim="The wider the network, the less its tangent kernel moves in training; K3 and K4, which move it, fall with "
    "width; and the residual network's moves less than the fully connected one's.",
    sizes={
        "tiny": Settings((16, 32, 64), 4, by_least=(0.25,), depth=4, n=6, features=6),
        "small": Settings((32, 64, 128, 256, 512), 16),
        "paper": Settings((32, 64, 128, 256, 512, 1024, 2048), 64),
    },
    minutes={"tiny": 0.02, "small": 1.3, "paper": 150},
    run=run,
    check=check,
    plot=plot,
    hardware="a few cores, hours",
)
