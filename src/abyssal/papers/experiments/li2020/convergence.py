"""The loss along gradient flow, against the rate that the theory promises, and against a kernel that stands still.

While the kernel's least eigenvalue keeps half its start, the loss is at most `exp(-lambda_min t / n)` of what it was:
the flow gives `dL/dt = -(1/n^2) r^T K r <= -(2/n) lambda_min(K_t) L`. A kernel that stood still would give
`sum_i c_i exp(-2 lambda_i t / n)`, c_i being the shares of the first residual in its eigenvectors: far less at first,
since most of the residual is in the larger eigenvalues' directions, and twice the promised rate in the end.

Source: Li, Luo, Yip, arXiv 2007.03714. Settings as in li2020/drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from abyssal.papers.experiment import Experiment, Finding, Row, Work, listed
from abyssal.papers.shared.lly import COLOUR, PAPER, SHORT, Problem, convergence, followed
from abyssal.papers.shared.powers import name_panel
from abyssal.report.axes import new_figure
from abyssal.util.stats import every, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Settings", "check", "plot", "run"]

_NEAR = 0.1  # of the logarithm of the loss: how near a wide network is to a kernel that stands still


@dataclass(frozen=True)
class Settings(Problem):
    """How much is measured.

    Attributes, beside those of `Problem`:
        by_least: times in units of `n / lambda_min`, ascending.
    """

    by_least: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 1.0)


def run(settings: Settings, work: Work) -> list[Row]:
    """Train both networks at every width."""
    return [
        {
            **head,
            "time": tau,
            "log_loss": float(found["log_loss"][i, j]),
            "log_loss_frozen": float(found["frozen"][i, j]),
            "least": float(found["least"][i, j]),
            "lambda_min": float(found["lambda_min"][i]),
            "lambda_max": float(found["lambda_max"][i]),
        }
        for head, i, found in followed(settings, work, convergence, "convergence")
        for j, tau in enumerate(settings.by_least)
    ]


def _columns(rows: list[Row], network: str, width: int, time: float) -> dict[str, np.ndarray]:
    mine = [row for row in rows if (row["network"], row["width"], row["time"]) == (network, width, time)]
    return {name: np.array([row[name] for row in mine]) for name in ("log_loss", "log_loss_frozen", "least")}


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Count trainings that keep the promise; compare with the kernel that stands still."""
    last, width = settings.by_least[-1], settings.widths[-1]
    for network, name in SHORT.items():
        kept, promised, total = 0, 0, 0
        for m in settings.widths:
            columns = [_columns(rows, network, m, time) for time in settings.by_least]
            # The premise: lambda_min has not fallen below half its start at any look so far.
            premise = np.array([column["least"] >= 0.5 for column in columns]).cumprod(0).astype(bool)
            holds = np.array([c["log_loss"] <= -t for c, t in zip(columns, settings.by_least, strict=True)])
            total, promised, kept = total + premise.size, promised + premise.sum(), kept + (holds & premise).sum()
        yield Finding(
            f"{name}: where lambda_min keeps half its start, the loss falls at least as exp(-lambda_min t / n)",
            f"{kept} of {promised} readings with that premise ({total} in all)",
            bool(kept == promised) if promised else None,
        )
    rates = {}
    for network in SHORT:
        end = _columns(rows, network, width, last)
        rates[network] = -np.median(end["log_loss"]) / last
    yield Finding(
        f"at m = {width} the mean rate over time {last:g} n / lambda_min is the promised one or faster",
        "; ".join(f"{SHORT[network]} {rate:.1f} times the promised one" for network, rate in rates.items()),
        all(rate >= 1 for rate in rates.values()),
    )
    apart = {
        network: mean(end["log_loss"] / end["log_loss_frozen"])
        for network in SHORT
        if (end := _columns(rows, network, width, last))
    }
    yield Finding(
        f"wide networks converge as with a kernel that stands still (log of the loss to {_NEAR:.0%}, m = {width})",
        "; ".join(f"{SHORT[n]} {v.value:.3f} of it ({v.low:.3f} to {v.high:.3f})" for n, v in apart.items()),
        every(v.between(1 - _NEAR, 1 + _NEAR) for v in apart.values()),
    )


def plot(rows: list[Row], settings: Settings) -> Figure:
    """The loss against time: seen, with the kernel standing still, and promised."""
    figure, panels = new_figure(2)
    times = [0.0, *settings.by_least]
    for axes, network in zip(panels, SHORT, strict=True):
        for j, width in enumerate(settings.widths):
            columns = [_columns(rows, network, width, time) for time in settings.by_least]
            seen = [0.0, *(float(np.median(column["log_loss"])) for column in columns)]
            shade = 0.35 + 0.65 * j / max(1, len(settings.widths) - 1)
            axes.plot(times, np.exp(seen), "o-", color=COLOUR[network], alpha=shade, label=f"m = {width}", ms=4)
        frozen = [0.0, *(float(np.median(column["log_loss_frozen"])) for column in columns)]
        axes.plot(times, np.exp(frozen), "--", color="#222222", linewidth=1, label="kernel standing still")
        axes.plot(times, np.exp(-np.array(times)), ":", color="#777777", label="promised: exp(-t)")
        name_panel(axes, f"{SHORT[network]}: loss / first loss", "time in n / lambda_min", yscale="log")
    return figure


EXPERIMENT = Experiment(
    name="li2020/convergence",
    paper=PAPER,
    claim="Gradient flow of a wide network makes the loss fall at a linear rate, by exp(-lambda_min t / n) at least.",
    sizes={
        "tiny": Settings((16, 32), 4, (0.1, 0.25), depth=4, n=5, features=5),
        "small": Settings((16, 64, 256), 16),
        "paper": Settings((16, 64, 256, 1024), 64, (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)),
    },
    minutes={"tiny": 0.02, "small": 0.4, "paper": 100},
    run=run,
    check=check,
    plot=plot,
    hardware="a few cores, hours",
)
