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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from abyssal.nn.grid.grid import ResidualGrid
    from abyssal.papers.data import Name
    from abyssal.weights.families import Family

__all__ = ["Images", "Networks", "draw", "even", "finite", "flushed", "images", "train", "travel"]


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
    from abyssal.papers.data import dataset

    data = dataset(name).first(train=train)
    x, test_x = ((part.flatten(1) + 1) / 2 for part in (data.train_images, data.test_images))
    return Images(x, data.train_labels, test_x, data.test_labels)


def draw(family: Family, depth: int, width: int, features: int, classes: int, seed: int) -> dict[str, Tensor]:
    """Return the initial weights of one res-1 network, as a grid of one cell takes them."""
    import torch

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
    import torch

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
    import torch

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
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
