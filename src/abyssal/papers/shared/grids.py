"""Grids of small residual networks as Marion et al. trained them: weights, images, minibatches, schedule, settings.

What the paper's text leaves open was taken from the authors' published code (PierreMarion23/scaling-resnets): the
network is res-1, the rule Adam with torch's settings, the loss cross-entropy, minibatches have 128 images, pixels lie
in [0, 1], first and last matrix are uniform with variance 1/fan_in, and learning rates fall tenfold after 5 of 10
epochs.
Its generator of fractional noise is not that for Hurst indices other than 1/2 (its circulant row lacks an entry);
ours is exact. Its fractional networks also have biases, which start at 0; ours have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from abyssal.nn.grid.grid import ResidualGrid
from abyssal.papers.data import Name, dataset
from abyssal.papers.experiment import Row
from abyssal.weights.families import Family

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    *("Images", "Networks", "draw", "draw_heat", "even", "finite", "flushed", "images", "tabulated", "train", "travel"),
]


@dataclass(frozen=True)
class Networks:
    """What is trained, and on which images: the settings of the experiments that train begin with it.

    Attributes:
        data: "digits" or "mnist".
        images: training images; None is all.
        depth: of the networks.
        width: of the networks.
    """

    data: Name
    images: int | None
    depth: int
    width: int


def even(low: float, high: float, count: int) -> tuple[float, ...]:
    """Return numbers at equal distances, both ends among them."""
    return tuple(float(x) for x in np.linspace(low, high, count).round(6))


def finite(value: float) -> float | None:
    """Return a number as rows have it: None where it is not finite."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Images:
    """Images as vectors with pixels in [0, 1].

    Attributes:
        x: [train, features]
        y: [train]
        test_x: [test, features]
        test_y: [test]
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def features(self) -> int:
        """Pixels of an image."""
        return self.x.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.y.max()) + 1


@lru_cache(maxsize=2)
def images(name: Name, train: int | None = None) -> Images:
    """Return images as vectors; of "digits" and "mnist", whose pixels come between -1 and 1."""
    data = dataset(name).first(train=train)
    x, test_x = ((part.flatten(1) + 1) / 2 for part in (data.train_images, data.test_images))
    return Images(x, data.train_labels, test_x, data.test_labels)


def draw(family: Family, depth: int, width: int, features: int, classes: int, seed: int) -> dict[str, Tensor]:
    """Return the initial weights of one res-1 network, in the order in which a grid of one cell takes them."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(out: int, of: int) -> Tensor:
        return (2 * torch.rand(1, out, of, generator=generator) - 1) * math.sqrt(3 / of)

    stem, head = uniform(width, features), uniform(classes, width)
    paths = family.sample(depth, width * width, generator) / math.sqrt(width)
    return {"stem": stem, "outer": paths.view(1, depth, width, width), "head": head}


def train(
    grid: ResidualGrid,
    data: Images,
    epochs: int,
    batch: int,
    seed: int,
    drop: int | None = None,
    each: Callable[[int], None] | None = None,
) -> Tensor:
    """Train a grid.

    Args:
        grid: to be trained.
        data: its training images.
        epochs: passes over them, in whole minibatches.
        batch: images in a minibatch.
        seed: of their order.
        drop: epochs after which learning rates fall tenfold, again and again.
        each: called with the number of steps taken, before the first step and after each.

    Returns:
        Mean loss of the last epoch; NaN for cells that failed. [cells]
    """
    generator = torch.Generator().manual_seed(seed)
    losses = torch.full((grid.cells,), math.nan)
    if each is not None:
        each(0)
    for epoch in range(epochs):
        if drop and epoch and epoch % drop == 0:
            grid.learning_rate = grid.learning_rate / 10
        order = torch.randperm(len(data.y), generator=generator)
        parts = order[: len(order) // batch * batch].view(-1, batch)
        losses = torch.zeros(grid.cells)
        for part in parts:
            losses += grid.step(data.x[part], data.y[part]) / len(parts)
            if each is not None:
                each(grid.steps)
    return losses


def travel(stem: Tensor, outer: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """Return how far states travel through a res-1 network at several scales, however far.

    Args:
        stem: [width, features]
        outer: [depth, width, width]
        scales: [betas]
        x: [images, features]; 64 of them are enough.

    Returns:
        The mean over images of log10 |h_L - h_0| / |h_0|. [betas], float64
    """
    start = (stem @ x[:64].T).expand(len(scales), -1, -1)
    state, logs = start.clone(), start.new_zeros(len(scales), 1, start.shape[2])
    for layer in outer:
        state = state + scales[:, None, None] * (layer @ state.relu())
        # ReLU is homogeneous: a state may be divided by a number whose logarithm is kept, so that nothing overflows.
        size = state.norm(dim=1, keepdim=True)
        large = size > 1e10
        state = torch.where(large, state / size, state)
        logs = logs + torch.where(large, size.log10(), 0)
    off = (state - start * 10**-logs).norm(dim=1, keepdim=True)
    return (off.log10() + logs - start.norm(dim=1, keepdim=True).log10()).mean((1, 2)).double()


@contextmanager
def flushed() -> Iterator[None]:
    """Take numbers below 1e-38 as 0, which they nearly are; processors need a hundred times as long for them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# ---------------------------------------------------------------------- what comes out


def tabulated(rows: Sequence[Row], column: str, **axes: Sequence[Any]) -> np.ndarray:
    """Return a column as a table with an axis for each other column given by its values; NaN where there is none."""
    found = np.full([len(values) for values in axes.values()], np.nan)
    for row in rows:
        if row[column] is not None:
            found[tuple(values.index(row[name]) for name, values in axes.items())] = row[column]
    return found


def draw_heat(axes: Axes, settings: Any, values: np.ndarray, moved: np.ndarray, title: str, **options: Any) -> None:
    """Draw values over Hurst index and beta, with white lines where states travel 0.1, 1 and 10 times their length.

    Args:
        axes: to draw on.
        settings: with `betas` and `hursts`.
        values: [betas, hursts]
        moved: log10 of |h_L - h_0| / |h_0| before training. [betas, hursts]
        title: of the panel.
        options: of `Axes.pcolormesh`.
    """
    mesh = axes.pcolormesh(settings.hursts, settings.betas, values, shading="nearest", rasterized=True, **options)
    axes.figure.colorbar(mesh, ax=axes, shrink=0.9)
    if len(settings.hursts) > 2:
        lines = axes.contour(
            settings.hursts, settings.betas, moved, levels=[-1, 0, 1], colors=["white"] * 3,
            linestyles=["dotted", "solid", "dashed"], linewidths=1.5,
        )  # fmt: skip
        axes.clabel(lines, fmt={-1: "0.1", 0: "1", 1: "10"}, fontsize=8)
    axes.set(xlabel="Hurst index H", ylabel="beta")
    axes.set_title(title, fontsize=10)
