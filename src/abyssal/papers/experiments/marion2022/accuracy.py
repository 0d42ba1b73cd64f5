"""Accuracy over scale and regularity: which of Marion et al.'s random networks of depth 1,000 can be trained.

For each Hurst index one set of weights (per seed) is trained at all scales depth^-beta and learning rates, as one
batched network (:mod:`abyssal.nn.grid`); the accuracy of a (beta, H) is the best over learning rates. Beside it
stands how far the same networks' states travel before training, which is what the paper's theory speaks of.

"paper" is the size of the paper's figure 9, on MNIST; its minutes are scaled from those of "small", which has the same
networks, grid and number of epochs, on scikit-learn's digits.

Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929, section 5; settings: `shared/grids.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from abyssal.nn.grid.grid import ResidualGrid
from abyssal.papers.experiment import Experiment, Finding, Row, Work, chosen, grid, listed
from abyssal.papers.shared.grids import (
    Networks,
    draw,
    draw_heat,
    even,
    finite,
    flushed,
    images,
    tabulated,
    train,
    travel,
)
from abyssal.scaling.phases.crossing import crossing
from abyssal.sweep import seed_of
from abyssal.util.stats import Interval, student
from abyssal.weights.families import FractionalNoise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Settings", "train_column"]

Array = np.ndarray
RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
EXPLODED = 1.0  # |h_L - h_0| / |h_0| before training beyond 10^this counts as an explosion
# Tried at H = 1/2 with no limit: networks beyond this after a step ended at 9 to 25 % where other learning rates reach
# 67 to 96 %, and those that start at 1e7 (beta = 0.19) do come back a little, to 22 %.
HOPELESS = 1e12
CHANCE = 0.1  # of ten classes; also what a network counts that could not be trained at any learning rate


@dataclass(frozen=True)
class Settings(Networks):
    """How much is trained.

    Attributes, after those of `Networks`:
        betas: scales are depth^-beta.
        hursts: regularities.
        rates: learning rates.
        epochs: passes over the training images; learning rates fall tenfold after half of them.
        batch: images in a minibatch.
        seeds: independent weights for each Hurst index.
        cells_at_once: of the batched network; a matter of speed.
        segment: of the batched network; a matter of speed and memory.
    """

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
    "small": Settings("digits", None, 1000, 30, even(0.1, 0.9, 10), even(0.1, 0.9, 10)),
    "paper": Settings("mnist", None, 1000, 30, even(0.1, 0.9, 10), even(0.1, 0.9, 10)),
}


def train_column(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train all scales and learning rates of one Hurst index and seed.

    Args:
        cell: the fields of `Settings` that matter, with one `hurst` and one `seed`.

    Returns:
        Arrays [betas, rates]: accuracy on test images (NaN where training failed), mean loss of the last epoch, and
        the step at which training failed (0 where it did not); and `moved`, log10 of |h_L - h_0| / |h_0| before
        training, the mean over test images. [betas]
    """
    data = images(cell["data"], cell["images"])
    hurst, depth = cell["hurst"], cell["depth"]
    seed = seed_of({"seed": cell["seed"]})  # all Hurst indices share the two end matrices
    weights = draw(FractionalNoise(hurst), depth, cell["width"], data.features, data.classes, seed)
    betas, rates = (torch.tensor(cell[name], dtype=torch.float64) for name in ("betas", "rates"))
    shape = (len(betas), len(rates))
    scales = float(depth) ** -betas[:, None].expand(shape)
    with flushed():
        grid = ResidualGrid(
            *(tensor.expand(scales.numel(), *tensor.shape[1:]) for tensor in weights.values()),
            scale=scales.flatten().float(),
            learning_rate=rates.expand(shape).flatten().float(),
            largest_loss=HOPELESS,
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


def run(settings: Settings, work: Work) -> list[Row]:
    """Train all columns; a row for each network."""
    shared = chosen(settings, "data images depth width betas rates epochs batch cells_at_once segment")
    cells = grid(shared, hurst=settings.hursts, seed=range(settings.seeds))
    return [
        {
            "hurst": cell["hurst"],
            "beta": beta,
            "rate": rate,
            "seed": cell["seed"],
            "accuracy": finite(values["accuracy"][i, j]),
            "loss": finite(values["loss"][i, j]),
            "failed_at_step": int(values["failed"][i, j]) or None,
            "moved": float(values["moved"][i]),
        }
        for cell, values in zip(cells, work.cells(train_column, cells, phase="Hurst indices"), strict=True)
        for i, beta in enumerate(settings.betas)
        for j, rate in enumerate(settings.rates)
    ]


# ---------------------------------------------------------------------- what comes out


def best(rows: list[Row], settings: Settings) -> Array:
    """Return the best accuracy over learning rates, NaN where none gave one. [seeds, betas, hursts]."""
    table = _table(rows, settings, "accuracy")
    return np.where(np.isnan(table).all(3), np.nan, np.nanmax(np.where(np.isnan(table), -1, table), axis=3))


def _table(rows: list[Row], settings: Settings, column: str) -> Array:
    """Return a column of the table. [seeds, betas, hursts, rates]."""
    seeds = range(settings.seeds)
    return tabulated(rows, column, seed=seeds, beta=settings.betas, hurst=settings.hursts, rate=settings.rates)


def moved(rows: list[Row], settings: Settings) -> Array:
    """Return log10 of how far states travel before training, the mean over seeds. [betas, hursts]."""
    return _table(rows, settings, "moved")[..., 0].mean(0)


def _crossing(betas: tuple[float, ...], values: Array, level: float) -> float:
    """Return the beta from which on values stay below a level; the first beta if all do, NaN if the last does not."""
    return betas[0] if (values <= level).all() else float(crossing(betas, values, level))


def borders(rows: list[Row], settings: Settings) -> tuple[Array, Array]:
    """Return, by Hurst index, from which beta on networks can be trained, and from which on states do not explode.

    Returns:
        Where the best accuracy passes half of what the best network of all gains over chance. [hursts]
        Where states grow tenfold before training. [hursts]
    """
    accuracy = np.nan_to_num(best(rows, settings), nan=CHANCE).mean(0)
    level = (CHANCE + accuracy.max()) / 2
    travelled = moved(rows, settings)
    trained = [_crossing(settings.betas, -column, -level) for column in accuracy.T]
    calm = [_crossing(settings.betas, column, EXPLODED) for column in travelled.T]
    return np.array(trained), np.array(calm)


def _explosion(rows: list[Row], settings: Settings) -> Finding:
    """Judge whether networks whose states explode before training end up worse, by an interval of the difference."""
    accuracy = np.nan_to_num(best(rows, settings), nan=CHANCE).mean(0).ravel()
    exploded = moved(rows, settings).ravel() > EXPLODED
    claim = "networks whose states explode before training (tenfold or more) cannot be trained as well as the others"
    if min(exploded.sum(), (~exploded).sum()) < 3:
        return Finding(claim, f"{exploded.sum()} of {len(exploded)} explode", None)
    worse, better = accuracy[exploded], accuracy[~exploded]
    error = math.sqrt(worse.var(ddof=1) / len(worse) + better.var(ddof=1) / len(better))
    half = student(min(len(worse), len(better)) - 1) * error  # fewer degrees of freedom than Welch's
    gap = better.mean() - worse.mean()
    found = Interval(gap, gap - half, gap + half)
    said = (
        f"best accuracy over learning rates: mean {100 * worse.mean():.0f} % of {len(worse)} that explode, "
        f"{100 * better.mean():.0f} % of {len(better)} others (difference {100 * found.low:.0f} to "
        f"{100 * found.high:.0f} points)"
    )
    return Finding(claim, said, found.above(0))


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Judge what explosions cost, whether the border moves with H, and whether it is that of the initialisation."""
    step = float(np.diff(settings.betas).max())  # a border is known to half of it
    trained, calm = borders(rows, settings)
    known = np.isfinite(trained) & np.isfinite(calm)
    yield _explosion(rows, settings)
    said = ", ".join(f"{b:.2f} at H = {h:.2f}" for b, h in zip(trained, settings.hursts, strict=True))
    rise = trained[-1] - trained[0]
    yield Finding(
        "the more regular the weights, the larger the smallest beta that can be trained",
        f"half of the gain over chance is reached from beta = {said}; known to {step / 2:.2f}",
        True if rise > step else False if rise < 0 else None,
    )
    off = np.abs(trained - calm)[known]
    said = "no border on this grid"
    if known.any():
        said = f"they differ by {off.mean():.3f} in beta on average, {off.max():.3f} at most; known to {step:.2f}"
    claim = "the border after training is the one before: where states grow tenfold"
    yield Finding(claim, said, bool(off.mean() <= step) if known.all() else None)


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Draw the heat map of accuracies and that of the best learning rates, with the borders before training."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    accuracy, travelled = np.nanmean(np.nan_to_num(best(rows, settings), nan=CHANCE), axis=0), moved(rows, settings)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels: Any = figure.subplots(1, 2, width_ratios=(1.25, 1))
    rates = _best_rate(rows, settings)
    ends = math.log10(min(settings.rates)) - 0.5, math.log10(max(settings.rates)) + 0.5
    steps = colormaps["cividis"].resampled(round(ends[1] - ends[0]))
    title = "accuracy in %, best over learning rates"
    draw_heat(panels[0], settings, 100 * accuracy, travelled, title, cmap="viridis", vmin=10, vmax=100)
    title = "log10 of that learning rate (white: none trains)"
    draw_heat(panels[1], settings, np.log10(rates), travelled, title, cmap=steps, vmin=ends[0], vmax=ends[1])
    for i, beta in enumerate(settings.betas):
        for j, hurst in enumerate(settings.hursts):
            shade = "white" if accuracy[i, j] < 0.6 else "black"
            panels[0].text(
                hurst, beta, f"{100 * accuracy[i, j]:.0f}", ha="center", va="center", fontsize=8, color=shade
            )
    figure.suptitle(
        f"Depth {settings.depth:,}, width {settings.width}, {settings.epochs} epochs of {settings.data}. "
        "White: where |h_L - h_0| / |h_0| is 0.1, 1 and 10 before training",
        fontsize=10,
    )
    return figure


def _best_rate(rows: list[Row], settings: Settings) -> Array:
    """Return the learning rate of the best accuracy, NaN where all failed. [betas, hursts]."""
    table = np.nan_to_num(_table(rows, settings, "accuracy"), nan=-1).mean(0)
    chosen = np.array(settings.rates)[table.argmax(2)]
    return np.where(table.max(2) < 0, np.nan, chosen)


EXPERIMENT = Experiment(
    name="marion2022/accuracy",
    paper="Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929",
    claim="What scale and regularity of the weights do to a network before training decides whether it can be trained: "
    "below a border that rises with the Hurst index no learning rate helps.",
    sizes=SIZES,
    minutes={"tiny": 0.1, "small": 18, "paper": 800},
    run=run,
    check=check,
    plot=plot,
    hardware="two cores and 7 hours, or a GPU",
)
