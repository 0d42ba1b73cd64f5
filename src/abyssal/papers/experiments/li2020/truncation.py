"""How well the hierarchy, cut off at order 2, 3 or 4, predicts the tangent kernel: against order, time and width.

Order 2 keeps the kernel as it was at the start, so that its error is the drift; order 3 lets it move by a constant K3;
order 4 by a K3 that moves by a constant K4. Each is compared with the kernel along the true gradient flow of the
parameters. The fully connected network is looked at at equal `t lambda_max`, seed by seed.

Source: Li, Luo, Yip, arXiv 2007.03714. Settings are ours: 10 samples uniform on the unit sphere of dimension 10,
standard normal targets, tanh, L = 8, c_res = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from abyssal.papers.experiment import Experiment, Finding, Row, Work, listed
from abyssal.papers.shared.lly import PAPER, SHORT, Problem, as_width, draw, factor, followed, one_scale, truncation
from abyssal.papers.shared.powers import by_seed, by_size, name_panel, power
from abyssal.report.axes import new_figure
from abyssal.util.stats import every

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "REFERENCE", "Settings", "check", "plot", "run"]

ORDERS = (2, 3, 4)
_COLOURS = {2: "#c8553d", 3: "#b58900", 4: "#1b6ca8"}
# Relative kernel errors of the residual network in an earlier run, one draw: (order, time, width).
REFERENCE = {
    (2, 1.0, 32): 4.1e-2, (2, 1.0, 256): 3.1e-3, (2, 6.0, 32): 8.1e-2, (2, 6.0, 256): 6.3e-3,
    (3, 1.0, 32): 9.9e-3, (3, 1.0, 256): 5.9e-4, (3, 6.0, 32): 8.5e-2, (3, 6.0, 256): 3.8e-3,
    (4, 1.0, 32): 3.6e-4, (4, 1.0, 256): 3.2e-6, (4, 6.0, 32): 9.3e-3, (4, 6.0, 256): 5.0e-5,
}  # fmt: skip


@dataclass(frozen=True)
class Settings(Problem):
    """How much is measured.

    Attributes, beside those of `Problem`:
        times: to look at.
        unit: of the times: "time", t of the residual network's gradient flow; "largest", `n / lambda_max` of each.
    """

    times: tuple[float, ...] = (1.0, 6.0)
    unit: str = "time"


def run(settings: Settings, work: Work) -> list[Row]:
    """Follow both networks, and the hierarchy of each at three orders."""
    return [
        {
            **head,
            "order": order,
            "time": time,
            "kernel_error": float(found["kernel"][i, a, b]),
            "output_error": float(found["outputs"][i, a, b]),
            "drift": float(found["drift"][i, b]),
        }
        for head, i, found in followed(settings, work, truncation, "truncations")
        for a, order in enumerate(ORDERS)
        for b, time in enumerate(settings.times)
    ]


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Judge by powers of the width, by ratios of orders seed by seed, and by the reference's figures."""
    for network, name in SHORT.items():
        powers = {
            (order, time): power(*by_size(rows, "width", "kernel_error", network=network, order=order, time=time))
            for order in ORDERS
            for time in settings.times
        }
        yield Finding(
            f"{name}: the kernel's error falls with width at every order and time",
            "; ".join(f"order {o}, {_when(settings, t)}: {as_width(s)}" for (o, t), s in powers.items()),
            every(slope.below(0.0) for slope in powers.values()),
        )
    for high, low in ((3, 2), (4, 3), (4, 2)):
        yield from (_closer(rows, settings, time, high, low) for time in settings.times)
    if replace(settings, widths=(), seeds=0) == Settings((), 0):
        yield _reference(rows)


def _reference(rows: list[Row]) -> Finding:
    """Whether figures measured before lie between the least and the largest of the seeds."""
    inside = []
    for (order, time, width), told in REFERENCE.items():
        found = by_seed(rows, "kernel_error", network="resnet", order=order, time=time, width=width).values()
        inside += [min(found) <= told <= max(found)] if found else []
    return Finding(
        "figures of an earlier run (one draw of weights and samples) lie within the spread of the seeds",
        f"{sum(inside)} of {len(inside)}",
        all(inside) if len(inside) == len(REFERENCE) else None,
    )


def _when(settings: Settings, time: float) -> str:
    return f"t = {time:g}" if settings.unit == "time" else f"time {time:g} n / lambda_max"


def _closer(rows: list[Row], settings: Settings, time: float, high: int, low: int) -> Finding:
    """Whether the higher order has the smaller error, for the widest residual network at one time."""
    width = settings.widths[-1]
    above, under = (
        by_seed(rows, "kernel_error", network="resnet", width=width, time=time, order=order) for order in (high, low)
    )
    ratio = factor(above, under)
    return Finding(
        f"ResNet, m = {width}, {_when(settings, time)}: order {high} is closer than order {low}",
        f"error by the other's: {ratio.show('.2g')}",
        ratio.below(1),
    )


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Errors against width, a panel for each time and network."""
    panels = [(network, time) for network in SHORT for time in settings.times]
    figure, drawn = new_figure(len(panels))
    figure.set_size_inches(3.6 * len(panels), 3.9)
    for axes, (network, time) in zip(drawn, panels, strict=True):
        for order in ORDERS:
            widths, values = by_size(rows, "width", "kernel_error", network=network, order=order, time=time)
            label = f"order {order}: $m^{{{power(widths, values).value:.2f}}}$"
            draw(axes, widths, values, label, _COLOURS[order])
            told = [(w, REFERENCE[order, time, w]) for w in widths if (order, time, w) in REFERENCE]
            if told and network == "resnet":
                named: dict[str, Any] = {"label": "earlier run"} if order == ORDERS[-1] else {}
                axes.plot(*zip(*told, strict=True), "k_", markersize=12, **named)
        when = _when(settings, time) if network == "resnet" else f"as at {_when(settings, time)}"
        name_panel(axes, f"{SHORT[network]}, {when}", "width m", settings.widths)
    # Quartiles of the largest errors would hide the rest: a truncation that blows up has any error.
    one_scale(drawn, [row["kernel_error"] for row in rows], most=2.0)
    drawn[0].set_ylabel("relative error of the kernel")
    return figure


EXPERIMENT = Experiment(
    name="li2020/truncation",
    paper=PAPER,
    claim="The hierarchy cut off at a finite order approximates the kernel's dynamics, the better the wider the "
    "network.",
    sizes={
        "tiny": Settings((16, 32), 4, depth=4, n=5, features=5),
        "small": Settings((32, 64, 128, 256), 16),
        "paper": Settings((32, 64, 128, 256, 512, 1024), 64, (1.0, 2.0, 4.0, 6.0)),
    },
    minutes={"tiny": 0.03, "small": 0.8, "paper": 150},
    run=run,
    check=check,
    plot=plot,
    hardware="a few cores, hours",
)
