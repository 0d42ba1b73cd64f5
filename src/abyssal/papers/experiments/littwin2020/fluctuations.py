"""How much the tangent kernel differs from one random network to the next, against depth, with and without skips.

K(x, x) of ReLU networks at one input. Residual: `h <- h + alpha V relu(W h)`, for scales whose squares sum to a
bounded number over depth (alpha = 1/L and 1/sqrt(L)) and for alpha = 1, where they do not; plain: the same two layers
without the skip. The law of K has a heavy tail where it fluctuates much, so the measure is the variance of log K over
networks: for small fluctuations that is the relative variance, and `E K^2 / (E K)^2` is its exponential where K is
lognormal.

The rules of `check` were settled on an earlier draw of networks; the verdicts of "small" and "paper" are of a draw at
which nobody had looked, that of seed 1000.

Source: Littwin, Galanti, Wolf, arXiv 2001.10460, whose statement we recall and test: O(1/m) uniformly in depth for
summable scales, exp(c L / m) without skips. Settings are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from abyssal.limits.law import moments
from abyssal.papers.experiment import Experiment, Finding, Row, Work, chosen, grid, listed
from abyssal.papers.shared.lly import one_scale
from abyssal.papers.shared.powers import label_sizes
from abyssal.report.axes import new_figure
from abyssal.sweep import seed_of
from abyssal.util.stats import Interval, every

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "KINDS", "Settings", "check", "log_kernels", "plot", "run"]

# The power p of alpha = L^-p, or None without a skip; and whether the squares' sum is bounded over depth.
KINDS: dict[str, tuple[float | None, bool]] = {
    "alpha = 1/L": (1.0, True),
    "alpha = 1/sqrt(L)": (0.5, True),
    "alpha = 1": (0.0, False),
    "no skips": (None, False),
}
_COLOUR = {"alpha = 1/L": "#3f8f4f", "alpha = 1/sqrt(L)": "#1b6ca8", "alpha = 1": "#b58900", "no skips": "#c8553d"}
_AT_ONCE = 32 << 20  # bytes of weights at a time
_DEEP = 8  # the least depth that tells whether growth goes on


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        depths: L, blocks of two layers, ascending.
        widths: m, ascending.
        networks: independent ones, of each kind, depth and width.
        features: length of the input.
        seed: of all networks; see the module's docstring.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    networks: int
    features: int = 10
    seed: int = 0


def fluctuation(cell: Mapping[str, Any]) -> dict[str, float]:
    """Draw networks of one kind, depth and width; returns the moments of log K(x, x) over them."""
    weights = 2 * cell["depth"] * cell["width"] ** 2 * 8
    generator = torch.Generator().manual_seed(seed_of(cell))
    at_once = max(1, _AT_ONCE // weights)
    logs = np.concatenate(
        [
            log_kernels(cell["kind"], cell["depth"], cell["width"], cell["features"], size, generator).numpy()
            for start in range(0, cell["networks"], at_once)
            if (size := min(at_once, cell["networks"] - start))
        ]
    )
    dead = int(np.isneginf(logs).sum())  # every unit of some layer off: narrow networks without skips
    found = moments(logs[np.isfinite(logs)])
    return {"log_mean": found.mean, "log_variance": found.variance, "error": found.variance_error, "dead": dead}


def log_kernels(kind: str, depth: int, width: int, features: int, count: int, generator: torch.Generator) -> Tensor:
    """Return log K(x, x) of random networks at one input of norm 1, K in the tangent parametrisation.

    `h_0 = A x`, `a = sqrt(2) relu(W h / sqrt(m))`, `b = V a / sqrt(m)`, `h <- h + alpha b` (without skips:
    `h <- sqrt(2) relu(b)`), `f = w . h / sqrt(m)`; standard normal entries, all trained.

    Args:
        kind: of `KINDS`.
        depth: L.
        width: m.
        features: length of x; by rotation invariance x is the first unit vector.
        count: networks.
        generator: of the weights.

    Returns:
        [count], float64.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator, dtype=torch.float64)

    power = KINDS[kind][0]
    alpha = 1.0 if power is None else float(depth) ** -power
    root = math.sqrt(width)
    h = normal(width, features)[:, :, 0]
    kept = []
    for _ in range(depth):
        first, second = normal(width, width), normal(width, width)
        u = torch.einsum("smk,sk->sm", first, h) / root
        a = math.sqrt(2) * u.clamp_min(0)
        b = torch.einsum("smk,sk->sm", second, a) / root
        kept.append((first, second, h, u, a, b))
        h = math.sqrt(2) * b.clamp_min(0) if power is None else h + alpha * b
    w = normal(width)
    kernel = h.square().sum(1) / width
    p = w / root  # f's gradient by h
    for first, second, h_in, u, a, b in reversed(kept):
        by_b = math.sqrt(2) * (p * (b > 0)) if power is None else alpha * p
        by_u = math.sqrt(2) * (torch.einsum("smk,sm->sk", second, by_b) * (u > 0)) / root
        of_second, of_first = by_b.square().sum(1) * a.square().sum(1), by_u.square().sum(1) * h_in.square().sum(1)
        kernel = kernel + (of_second + of_first) / width
        back = torch.einsum("smk,sm->sk", first, by_u) / root
        p = back if power is None else p + back
    return (kernel + p.square().sum(1)).log()  # by A, whose input has norm 1


def run(settings: Settings, work: Work) -> list[Row]:
    """Draw networks of every kind, depth and width."""
    shared = chosen(settings, "networks features seed")
    cells = grid(shared, kind=KINDS, width=settings.widths, depth=settings.depths)
    found = work.cells(fluctuation, cells, phase="fluctuations")
    return [
        {**cell, **{name: float(value) for name, value in values.items()}}
        for cell, values in zip(cells, found, strict=True)
    ]


def _line(x: np.ndarray, y: np.ndarray, error: np.ndarray) -> Interval:
    """Fit y = a + b x with known errors, and return b; widened where the points scatter more than these."""
    (value, level), covariance = np.polyfit(x, y, 1, w=1 / error, cov="unscaled")
    left = (y - level - value * x) / error
    scatter = max(1.0, float(left @ left) / (len(x) - 2)) if len(x) > 2 else 1.0
    half = 1.96 * math.sqrt(scatter * covariance[0, 0])
    return Interval(float(value), float(value - half), float(value + half))


def _columns(rows: list[Row], kind: str, column: str, **where: object) -> tuple[np.ndarray, ...]:
    mine = [row for row in rows if row["kind"] == kind and all(row[name] == value for name, value in where.items())]
    return tuple(np.array([float(row[name]) for row in mine]) for name in (column, "log_variance", "error"))


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Judge by lines through log variances, with the errors of variances."""
    width, deepest = settings.widths[0], settings.depths[-1]
    for kind, (_, summable) in KINDS.items():
        fits = {}
        for m in settings.widths:
            depth, variance, error = _columns(rows, kind, "depth", width=m)
            # Without summable scales the variance itself is a line in L / m; with them, a power of L tells growth.
            if summable:
                deep = depth >= _DEEP
                fits[m] = _line(np.log(depth[deep]), np.log(variance[deep]), (error / variance)[deep])
            else:
                fits[m] = _line(depth / m, variance, error)
        if summable:
            first = {m: _columns(rows, kind, "depth", width=m)[1] for m in settings.widths}
            measured = "; ".join(
                f"m = {m}: L^{fit.show('.2f')} from L = {_DEEP} on, {first[m][-1] * m:.1f} / m at L = {deepest}"
                for m, fit in fits.items()
            )
            holds = every(fit.below(0.1) for fit in fits.values())
            yield Finding(f"{kind}: fluctuations do not grow with depth", measured, holds)
        else:
            measured = "; ".join(f"m = {m}: c = {fit.show('.2f')}" for m, fit in fits.items())
            claim = f"{kind}: the variance of log K grows with depth as c L / m, c > 0"
            yield Finding(claim, measured, every(fit.above(0) for fit in fits.values()))
    for kind, (_, summable) in KINDS.items():
        if summable:
            fit = _of_width(rows, kind, settings)
            claim = f"{kind}: fluctuations go as 1/m, to 0.3 in the power, from L = {_DEEP} on"
            yield Finding(claim, f"m^{fit.show('.2f')}", fit.between(-1.3, -0.7))
    apart = {kind: _columns(rows, kind, "depth", width=width)[1][-1] for kind in KINDS}
    yield Finding(
        f"skips with summable scales hold fluctuations down (m = {width}, L = {deepest})",
        "variance of log K: " + ", ".join(f"{kind} {value:.3g}" for kind, value in apart.items()),
        max(apart[kind] for kind, (_, summable) in KINDS.items() if summable) < apart["no skips"] / 2,
    )


def _of_width(rows: list[Row], kind: str, settings: Settings) -> Interval:
    """Fit the power of the width, the same at every depth, with a constant for each."""
    xs: list[np.ndarray] = []
    ys: list[np.ndarray] = []
    errors: list[np.ndarray] = []
    for depth in settings.depths:
        if depth >= _DEEP:
            width, variance, error = _columns(rows, kind, "width", depth=depth)
            share = error / variance
            weight = 1 / share**2
            for found, values in ((xs, np.log(width)), (ys, np.log(variance))):
                found.append(values - np.average(values, weights=weight))
            errors.append(share)
    return _line(np.concatenate(xs), np.concatenate(ys), np.concatenate(errors))


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Fluctuations against depth, a panel for each width."""
    figure, panels = new_figure(len(settings.widths))
    for axes, width in zip(panels, settings.widths, strict=True):
        for kind, colour in _COLOUR.items():
            depth, variance, error = _columns(rows, kind, "depth", width=width)
            axes.errorbar(depth, variance, 1.96 * error, fmt="o-", color=colour, label=kind, markersize=4)
        axes.set_xlabel("depth L")
        axes.set_title(f"variance of log K(x, x), width {width}", fontsize=10)
        label_sizes(axes, settings.depths)
    one_scale(panels, [row["log_variance"] for row in rows])
    panels[0].legend(frameon=False, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="littwin2020/fluctuations",
    paper="Littwin, Galanti, Wolf 2020, arXiv 2001.10460 (recalled)",
    claim="From one random network to the next the tangent kernel fluctuates by O(1/m) whatever the depth if the "
    "squares of the residual scales have a bounded sum, and by exp(c L / m) without skips.",
    sizes={
        "tiny": Settings((2, 8, 16, 32), (16, 32), 60),
        "small": Settings((2, 4, 8, 16, 32, 64, 128), (24, 48, 96), 200, seed=1000),
        "paper": Settings((2, 4, 8, 16, 32, 64, 128, 256), (32, 64, 128, 256), 1000, seed=1000),
    },
    minutes={"tiny": 0.02, "small": 2.4, "paper": 300},
    run=run,
    check=check,
    plot=plot,
    hardware="a few cores, hours",
)
