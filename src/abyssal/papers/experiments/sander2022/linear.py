"""Gradient descent on a deep linear residual network keeps it smooth in depth.

Minimises `|(I + A_N/N) ... (I + A_1/N) - B|^2 / 2` from two starts: `A_n = 0`, which the paper's theorem covers, and
independent random `A_n`, which it does not. The gradient is taken times N, so that time is the same at every
depth (a step of gradient flow `dA_n/dt = -N dL/dA_n`).

Source: Sander, Ablin, Peyré 2022, arXiv 2205.14612, section 3; the settings are ours where the
paper's were not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from abyssal.papers.experiment import Experiment, Finding, Row, Work, chosen, grid
from abyssal.papers.shared.powers import by_size, name_panel, power
from abyssal.report.axes import COLOURS, new_figure, power_guide

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

STARTS = ("zero", "rough")


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        depths: N, each twice the one before.
        width: of the matrices.
        seeds: of the target B, and of the rough start.
        steps: of gradient descent.
        rate: step size, in time units.
    """

    depths: tuple[int, ...]
    width: int
    seeds: int
    steps: int
    rate: float = 0.1


def descend(cell: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Train one network; returns, after every step from the start on, its loss and `N max |A[n+1] - A[n]|`.

    Returns:
        `loss` and `jump` [steps + 1], and the weights at the end at 17 places of depth, `path` [17, width, width].
    """
    from scipy.linalg import expm

    depth, width = cell["depth"], cell["width"]
    random = np.random.default_rng([cell["seed"], 0])
    identity = np.eye(width)
    # exp of a matrix is within reach of every depth; entries of 0.5/sqrt(width): the loss at the start is small.
    target = expm(0.5 * random.standard_normal((width, width)) / math.sqrt(width))
    weights = np.zeros((depth, width, width))
    if cell["start"] == "rough":
        own = np.random.default_rng([cell["seed"], depth])
        weights = own.standard_normal((depth, width, width)) / math.sqrt(width)
    losses, jumps = [], []
    for step in range(cell["steps"] + 1):
        factors = identity + weights / depth
        below = _products(factors)  # below[n] = factors[n-1] ... factors[0]
        above = _products(factors[::-1].transpose(0, 2, 1))  # above[n] = (factors[N-1] ... factors[N-n])^T
        residual = below[-1] - target
        losses.append(0.5 * float((residual**2).sum()))
        jumps.append(depth * float(np.abs(_spectral(np.diff(weights, axis=0))).max()))
        if step < cell["steps"]:
            # The loss's gradient is 1/N of this; times N, as the gradient flow of the paper has it.
            weights = weights - cell["rate"] * above[depth - 1 :: -1] @ residual @ below[:depth].transpose(0, 2, 1)
    places = np.linspace(0, depth - 1, 17)
    low = np.minimum(places.astype(int), depth - 2)
    part = (places - low)[:, None, None]
    return {
        "loss": np.array(losses),
        "jump": np.array(jumps),
        "path": (1 - part) * weights[low] + part * weights[low + 1],
    }


def _products(factors: np.ndarray) -> np.ndarray:
    """Return `I, F_0, F_1 F_0, ...`. [n + 1, width, width]."""
    found = np.empty((len(factors) + 1, *factors.shape[1:]))
    found[0] = np.eye(factors.shape[1])
    for n, factor in enumerate(factors):
        np.matmul(factor, found[n], out=found[n + 1])
    return found


def _spectral(matrices: np.ndarray) -> np.ndarray:
    norms: np.ndarray = np.linalg.norm(matrices, ord=2, axis=(1, 2))
    return norms


def run(settings: Settings, work: Work) -> list[Row]:
    """Train at every depth, from both starts."""
    common = chosen(settings, "width steps rate")
    cells = grid(common, depth=settings.depths, seed=range(settings.seeds), start=STARTS)
    found = work.cells(descend, cells, phase="gradient descent")
    paths = {(c["start"], c["seed"], c["depth"]): f["path"] for c, f in zip(cells, found, strict=True)}
    rows: list[Row] = []
    for cell, values in zip(cells, found, strict=True):
        here, deeper = ((cell["start"], cell["seed"], depth) for depth in (cell["depth"], 2 * cell["depth"]))
        rows.append(
            {
                **{name: cell[name] for name in ("start", "depth", "seed")},
                "loss_start": float(values["loss"][0]),
                "loss_end": float(values["loss"][-1]),
                "jump_start": float(values["jump"][0]),
                "jump_largest": float(values["jump"].max()),
                "jump_end": float(values["jump"][-1]),
                "from_double_depth": float(_spectral(paths[here] - paths[deeper]).max()) if deeper in paths else None,
            }
        )
    return rows


def check(rows: list[Row], settings: Settings) -> list[Finding]:
    """Judge by powers of the depth, with intervals over seeds and depths."""
    falls = [row["loss_end"] / row["loss_start"] for row in rows if row["start"] == "zero"]
    sizes, largest = by_size(rows, "depth", "jump_largest", start="zero")
    bounded = power(sizes, largest)
    limit = power(*by_size(rows, "depth", "from_double_depth", start="zero"))
    rough = power(*by_size(rows, "depth", "jump_end", start="rough"))
    return [
        Finding(
            "gradient descent from A = 0 reaches the target",
            f"the loss falls to {max(falls):.0e} of its start, or less",
            max(falls) < 1e-3,
        ),
        Finding(
            "N max |A[n+1] - A[n]| stays bounded over N and over training, from A = 0",
            f"its largest value in training is between {largest.min():.2f} and {largest.max():.2f}; {bounded}",
            bounded.below(0.1),
        ),
        Finding(
            "the weights after training become a function of depth at rate 1/N, from A = 0",
            f"distance between the weights of depth N and of depth 2N: {limit}",
            limit.between(-1.1, -0.9),
        ),
        Finding(
            "the contrast, outside of the theorem: a start that is rough in depth stays rough",
            f"N max |A[n+1] - A[n]| after training: {rough}",
            rough.above(0.5),
        ),
    ]


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Jumps against depth from both starts, and the distance to the limit."""
    figure, (jumps, limit) = new_figure(2)
    names = {"zero": "from A = 0", "rough": "from random A"}
    styles = (("o-", "jump_largest", "largest in training"), ("s--", "jump_start", "at the start"))
    for colour, start in zip(COLOURS, STARTS, strict=False):
        for style, column, when in styles:
            depths, values = by_size(rows, "depth", column, start=start)
            if values.any():  # all zero at the start from A = 0
                jumps.plot(
                    depths, np.median(values, axis=1), style, color=colour, label=f"{names[start]}, {when}", ms=4
                )
    name_panel(jumps, "N max |A[n+1] - A[n]|", "depth N", settings.depths, yscale="log")
    depths, values = by_size(rows, "depth", "from_double_depth", start="zero")
    middle = np.median(values, axis=1)
    limit.plot(depths, middle, "o-", color=COLOURS[0], label="from A = 0", ms=4)
    power_guide(limit, depths, float(middle[0]), -1, "1/N")
    name_panel(limit, "weights of depth N against those of depth 2N", "depth N", depths, yscale="log")
    return figure


EXPERIMENT = Experiment(
    name="sander2022/linear",
    paper="Sander, Ablin, Peyré 2022, arXiv 2205.14612",
    claim="With linear residual functions and a small initial loss, gradient descent keeps the network smooth in "
    "depth, and it converges to an ODE at rate 1/N, uniformly over depth and training.",
    sizes={
        "tiny": Settings((16, 32, 64), 4, 2, 60),
        "small": Settings((16, 32, 64, 128, 256, 512, 1024), 8, 4, 150),
        "paper": Settings((16, 32, 64, 128, 256, 512, 1024, 2048, 4096), 20, 20, 1000),
    },
    minutes={"tiny": 0.01, "small": 1, "paper": 200},
    run=run,
    check=check,
    plot=plot,
    hardware="a few cores, hours",
)
