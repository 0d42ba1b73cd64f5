"""Accuracy over scale and regularity: which of Marion et al.'s random networks of depth 1,000 can be trained.

For each Hurst index one set of weights (per seed) is trained at all scales depth^-beta and learning rates, as one
batched network (:mod:`abyssal.nn.grid`); the accuracy of a (beta, H) is the best over learning rates. Beside it
stands how far the same networks' states travel before training, which is what the paper's theory speaks of.

"paper" is the size of the paper's figure 9, on MNIST; its minutes are scaled from those of "small", which has the same
networks, grid and number of epochs, on scikit-learn's digits.

Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929, section 5; settings: `_grids.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from abyssal.study.experiment import Experiment, Finding, Row, Work

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from abyssal.study.data import Name

__all__ = ["EXPERIMENT", "Settings", "train_column"]

Array = np.ndarray
RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
EXPLODED = 1.0  # |h_L - h_0| / |h_0| before training beyond 10^this counts as an explosion
FROZEN = -1.0  # below 10^this the network is nearly the identity


def _even(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(float(x) for x in np.linspace(low, high, count).round(6))


@dataclass(frozen=True)
class Settings:
    """How much is trained.

    Attributes:
        data: "digits" or "mnist".
        images: training images; None is all.
        depth: of the networks.
        width: of the networks.
        betas: scales are depth^-beta.
        hursts: regularities.
        rates: learning rates.
        epochs: passes over the training images; learning rates fall tenfold after half of them.
        batch: images in a minibatch.
        seeds: independent weights for each Hurst index.
        cells_at_once: of the batched network; a matter of speed.
        segment: of the batched network; a matter of speed and memory.
    """

    data: Name
    images: int | None
    depth: int
    width: int
    betas: tuple[float, ...]
    hursts: tuple[float, ...]
    rates: tuple[float, ...] = RATES
    epochs: int = 10
    batch: int = 128
    seeds: int = 1
    cells_at_once: int = 16
    segment: int | None = None


SIZES = {
    "tiny": Settings("digits", 256, 60, 16, (0.1, 0.5, 0.9), (0.1, 0.9), (1e-3, 1e-2), 3, 32),
    "small": Settings("digits", None, 1000, 30, _even(0.1, 0.9, 10), _even(0.1, 0.9, 10)),
    "paper": Settings("mnist", None, 1000, 30, _even(0.1, 0.9, 10), _even(0.1, 0.9, 10)),
}


def train_column(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train all scales and learning rates of one Hurst index and seed.

    Args:
        cell: the fields of `Settings` that matter, with one `hurst` and one `seed`.

    Returns:
        Arrays [betas, rates]: accuracy on test images (NaN where training failed), mean loss of the last epoch, and
        the step at which training failed (0 where it did not); and `moved`, log10 of |h_L - h_0| / |h_0| before training,
        the mean over test images. [betas]
    """
    import torch

    from abyssal.nn.grid import ResidualGrid
    from abyssal.scaling.families import FractionalNoise
    from abyssal.study.experiments._grids import draw, flushed, images, train
    from abyssal.sweep import seed_of

    data = images(cell["data"], cell["images"])
    hurst, depth = cell["hurst"], cell["depth"]
    seed = seed_of({"seed": cell["seed"], "hurst": hurst})
    weights = draw(FractionalNoise(hurst), depth, cell["width"], data.features, data.classes, seed)
    betas, rates = (torch.tensor(cell[name], dtype=torch.float64) for name in ("betas", "rates"))
    shape = (len(betas), len(rates))
    scales = float(depth) ** -betas[:, None].expand(shape)
    with flushed():
        grid = ResidualGrid(
            **{name: tensor.expand(scales.numel(), *tensor.shape[1:]) for name, tensor in weights.items()},
            scale=scales.flatten().float(),
            learning_rate=rates.expand(shape).flatten().float(),
            batch=cell["batch"],
            cells_at_once=cell["cells_at_once"],
            segment=cell["segment"],
        )
        moved = travel(weights["stem"][0], weights["outer"][0], scales[:, 0].float(), data.test_x)
        order = seed_of({"seed": cell["seed"]}, role="minibatches")  # the same for all Hurst indices
        losses = train(grid, data, cell["epochs"], cell["batch"], order, drop=max(1, cell["epochs"] // 2))
        accuracy = grid.accuracy(data.test_x, data.test_y)
    failed = torch.zeros(grid.cells)
    for number, failure in grid.failures.items():
        failed[number] = failure.step
    return {
        "accuracy": accuracy.view(shape).numpy(),
        "loss": losses.view(shape).numpy(),
        "failed": failed.view(shape).numpy(),
        "moved": moved.numpy(),
    }


def travel(stem: Any, outer: Any, scales: Any, x: Any) -> Any:
    """Return the mean over images of log10 |h_L - h_0| / |h_0| of a res-1 network, for several scales.

    Args:
        stem: [width, features]
        outer: [depth, width, width]
        scales: [betas]
        x: [images, features]
    """
    import torch

    start = (stem @ x[:64].T).expand(len(scales), -1, -1)
    state, logs = start.clone(), torch.zeros(len(scales), 1, start.shape[2])
    for layer in outer:
        state = state + scales[:, None, None] * (layer @ state.relu())
        # ReLU is homogeneous: a state may be divided by a number, whose logarithm is kept, so that nothing overflows.
        size = state.norm(dim=1, keepdim=True).clamp_min(1e-30)
        state = torch.where(size > 1e10, state / size, state)
        logs = logs + torch.where(size > 1e10, size.log10(), 0)
    off = (state - start * 10**-logs).norm(dim=1, keepdim=True)
    return (off.log10() + logs - (stem @ x[:64].T).norm(dim=0).log10()).mean((1, 2)).double()


def run(settings: Settings, work: Work) -> list[Row]:
    """Train all columns; a row for each network."""
    shared = {
        name: getattr(settings, name)
        for name in (
            "data",
            "images",
            "depth",
            "width",
            "betas",
            "rates",
            "epochs",
            "batch",
            "cells_at_once",
            "segment",
        )
    }
    places = [(hurst, seed) for hurst in settings.hursts for seed in range(settings.seeds)]
    found = work.cells(
        train_column, [{**shared, "hurst": hurst, "seed": seed} for hurst, seed in places], phase="Hurst indices"
    )
    return [
        {
            "hurst": hurst,
            "beta": beta,
            "rate": rate,
            "seed": seed,
            "accuracy": _number(values["accuracy"][i, j]),
            "loss": _number(values["loss"][i, j]),
            "failed_at_step": int(values["failed"][i, j]) or None,
            "moved": float(values["moved"][i]),
        }
        for (hurst, seed), values in zip(places, found, strict=True)
        for i, beta in enumerate(settings.betas)
        for j, rate in enumerate(settings.rates)
    ]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# ---------------------------------------------------------------------- what comes out


def best(rows: list[Row], settings: Settings) -> Array:
    """Return the best accuracy over learning rates, NaN where none gave one. [seeds, betas, hursts]."""
    table = _table(rows, settings, "accuracy")
    return np.where(np.isnan(table).all(3), np.nan, np.nanmax(np.where(np.isnan(table), -1, table), axis=3))


def _table(rows: list[Row], settings: Settings, column: str) -> Array:
    """Return a column of the table. [seeds, betas, hursts, rates]."""
    axes = (tuple(range(settings.seeds)), settings.betas, settings.hursts, settings.rates)
    table = np.full([len(axis) for axis in axes], np.nan)
    for row in rows:
        value = row[column]
        if value is not None:
            place = tuple(
                axis.index(row[name]) for axis, name in zip(axes, ("seed", "beta", "hurst", "rate"), strict=True)
            )
            table[place] = value
    return table


def check(rows: list[Row], settings: Settings) -> list[Finding]:
    return []


def plot(rows: list[Row], settings: Settings) -> Figure:
    raise NotImplementedError


EXPERIMENT = Experiment(
    name="marion2022/accuracy",
    paper="Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929",
    claim="Which networks of depth 1,000 can be trained depends on scale and regularity together, as at initialisation.",
    sizes=SIZES,
    minutes={"tiny": 0.1, "small": 20, "paper": 800},
    run=run,
    check=check,
    plot=plot,
)
