"""How far training moves the tangent kernel of deep networks, over scale and regularity of their weights.

The tangent experiments (Li, Luo, Yip; Huang, Yau) ask when the kernel hardly moves while a network is trained; those of
Marion et al. say which (beta, H) freeze a deep network, give it a limit ODE or SDE, or make it explode. Here the two
meet: res-1 networks with fractional weights and branches scaled by depth^-beta learn which digits are odd, by gradient
descent on all samples, and the kernel on the samples is compared with what it was. Nobody has published this figure.

Every network takes the same number of steps of the same size in units of its own kernel: a step multiplies the
residual along the kernel's largest eigenvector by 1/2, as long as the kernel is what it was. Without that the
comparison would be one of learning rates. Outputs are not centred, so a network whose states explode starts with a
loss to match, as it does in practice. All Hurst indices and scales of a seed share the two end matrices.

The minutes of "paper" are scaled from those of "small".

The rules of `check` were settled on results of seeds 0, 1, ...; the verdicts of "small" and "paper" are of seeds 1000,
1001, ..., at which nobody had looked.

Sources: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929; Li, Luo, Yip 2020, arXiv 2007.03714.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from abyssal.nn.grid.grid import ResidualGrid
from abyssal.nn.grid.updates import Sgd
from abyssal.papers.experiment import Experiment, Finding, Row, Work, chosen, grid
from abyssal.papers.shared.grids import draw, draw_heat, even, finite, flushed, images, tabulated, travel
from abyssal.sweep import seed_of
from abyssal.util.stats import mean
from abyssal.weights.families import FractionalNoise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Settings", "train_column"]

Array = np.ndarray
HALF = 0.5  # of the residual along the first eigenvector goes in a step
NEAR = 0.25  # how far from the ways that states travel on this grid a value is still taken from its end


@dataclass(frozen=True)
class Settings:
    """How much is trained.

    Attributes:
        depth: of the networks.
        width: of the networks.
        betas: scales are depth^-beta.
        hursts: regularities.
        samples: images that are trained on, and between which the kernel is.
        steps: of gradient descent.
        seeds: independent weights for each Hurst index.
        first_seed: seeds count from here; see the module's docstring.
    """

    depth: int
    width: int
    betas: tuple[float, ...]
    hursts: tuple[float, ...]
    samples: int = 48
    steps: int = 40
    seeds: int = 6
    first_seed: int = 0


SIZES = {
    "tiny": Settings(40, 16, (0.3, 0.6, 1.2), (0.2, 0.8), 12, 5, 2),
    "small": Settings(200, 30, even(0.2, 1.3, 12), even(0.1, 0.9, 5), first_seed=1000),
    "paper": Settings(1000, 40, even(0.2, 1.3, 23), even(0.1, 0.9, 9), 96, 40, first_seed=1000),
}


def train_column(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train all scales of one Hurst index and seed.

    Args:
        cell: the fields of `Settings`, with one `hurst` and one `seed`.

    Returns:
        By beta: `drift`, |K_t - K_0| / |K_0| at the end; `alignment`, the cosine between both; `loss_before` and
        `loss_after`; `kernel`, log10 of the trace of K_0 by sample; `moved`, log10 of |h_L - h_0| / |h_0| before
        training. NaN where a network failed or its kernel is not finite.
    """
    data = images("digits", cell["samples"])
    odd = (data.y % 2 * 2 - 1).double()[:, None]
    x = data.x.double()
    seed = seed_of({"seed": cell["seed"]})  # all Hurst indices share the two end matrices
    weights = draw(FractionalNoise(cell["hurst"]), cell["depth"], cell["width"], data.features, 1, seed)
    weights = {name: tensor.double() for name, tensor in weights.items()}
    scales = torch.tensor([float(cell["depth"]) ** -beta for beta in cell["betas"]], dtype=torch.float64)
    with flushed():
        grid = ResidualGrid(
            *(tensor.expand(len(scales), *tensor.shape[1:]) for tensor in weights.values()),
            scale=scales,
            learning_rate=0.0,
            update=Sgd(),
            loss="mse",
            largest_loss=math.inf,
            batch=len(x),
        )
        start = _kernels(grid, x)
        first = torch.linalg.eigvalsh(start.nan_to_num(0))[:, -1]
        # Gradient flow of the mean square has r' = -(2/n) K r.
        grid.learning_rate = torch.where(first > 0, HALF * len(x) / (2 * first), 0)
        losses = [grid.step(x, odd) for _ in range(cell["steps"])]
        end = _kernels(grid, x)
        grid.learning_rate = 0.0  # a step that changes nothing, for the loss at the end
        losses.append(grid.step(x, odd))
        moved = travel(weights["stem"][0], weights["outer"][0], scales, x)
    norms = start.flatten(1).norm(dim=1), end.flatten(1).norm(dim=1)
    found = {
        "drift": (end - start).flatten(1).norm(dim=1) / norms[0],
        "alignment": (end * start).sum((1, 2)) / norms[0] / norms[1],
        "loss_before": losses[0],
        "loss_after": losses[-1],
        "kernel": start.diagonal(dim1=1, dim2=2).mean(1).log10(),
        "moved": moved,
    }
    return {name: value.numpy() for name, value in found.items()}


def _kernels(grid: ResidualGrid, x: Tensor) -> Tensor:
    """Return each network's tangent kernel, NaN where it is not finite. [cells, n, n]."""
    from abyssal.tangent.empirical.ntk import ntk

    found = torch.full((grid.cells, len(x), len(x)), math.nan, dtype=x.dtype)
    for number in grid.active:
        try:
            found[number] = ntk(grid.module(number), x, outputs=0)
        except ValueError as error:
            if "not finite" not in str(error):
                raise
    return found


def run(settings: Settings, work: Work) -> list[Row]:
    """Train all columns; a row for each network."""
    cells = grid(chosen(settings, "depth width betas samples steps"), hurst=settings.hursts, seed=_seeds(settings))
    found = work.cells(train_column, cells, phase="Hurst indices")
    names = ("drift", "alignment", "loss_before", "loss_after", "kernel", "moved")
    return [
        {"hurst": cell["hurst"], "beta": beta, "seed": cell["seed"], **{n: finite(values[n][i]) for n in names}}
        for cell, values in zip(cells, found, strict=True)
        for i, beta in enumerate(settings.betas)
    ]


def _seeds(settings: Settings) -> range:
    return range(settings.first_seed, settings.first_seed + settings.seeds)


# ---------------------------------------------------------------------- what comes out


def table(rows: list[Row], settings: Settings, column: str) -> Array:
    """Return a column, NaN where there is none. [seeds, betas, hursts]."""
    return tabulated(rows, column, seed=_seeds(settings), beta=settings.betas, hurst=settings.hursts)


def at_travel(rows: list[Row], settings: Settings, travelled: float) -> Array:
    """Return log10 of the drift of networks whose states travel a given way, by interpolation between betas.

    Args:
        rows: of the experiment.
        settings: of the experiment.
        travelled: log10 of |h_L - h_0| / |h_0|, of its mean over seeds.

    Returns:
        Log10 of drifts; NaN where no beta comes within `NEAR` of that way. [seeds, hursts]
    """
    drift, moved = np.log10(table(rows, settings, "drift")), table(rows, settings, "moved").mean(0)
    found = np.full((settings.seeds, len(settings.hursts)), np.nan)
    for j in range(len(settings.hursts)):
        order = np.argsort(moved[:, j])
        ways = moved[order, j]
        if ways[0] - NEAR <= travelled <= ways[-1] + NEAR:
            found[:, j] = [np.interp(travelled, ways, drift[seed, order, j]) for seed in range(settings.seeds)]
    return found


def _compare(claim: str, more: Array, less: Array, what: str, paired: bool = True) -> Finding:
    """Judge whether one group's kernels drift more, by Student's interval over seeds of the log of the ratio.

    Args:
        claim: that they do.
        more: log10 of drifts; NaN is left out. [seeds, hursts of this group]
        less: of the others. [seeds, hursts of that group]
        what: in words.
        paired: whether Hurst indices correspond, and only those count that both have.
    """
    if paired:
        both = np.isfinite(more + less)
        more, less = np.where(both, more, np.nan), np.where(both, less, np.nan)
    kept = np.isfinite(more).any(1) & np.isfinite(less).any(1)
    if kept.sum() < 2:
        return Finding(claim, "no such networks on this grid", None)
    log = mean(np.nanmean(more[kept], axis=1) - np.nanmean(less[kept], axis=1))
    said = f"{what}: {10**log.value:.2f} times (95 %: {10**log.low:.2f} to {10**log.high:.2f}, {kept.sum()} seeds)"
    return Finding(claim, said, log.above(0))


def check(rows: list[Row], settings: Settings) -> list[Finding]:
    """Judge frozen against critical, critical against exploding, and rough against regular at the critical scale."""
    frozen, critical, exploding = (at_travel(rows, settings, way) for way in (-1.5, 0.0, 2.0))
    hursts = np.array(settings.hursts)
    rough, regular = hursts <= 0.5, hursts >= 0.7
    names = f"drift at the critical scale, H <= 1/2 over H >= 0.7 ({rough.sum()} and {regular.sum()} indices)"
    return [
        _compare(
            "the kernel drifts more where states move by their own length than where the network is frozen",
            critical,
            frozen,
            "drift at |h_L - h_0| / |h_0| = 1 over that at 0.03",
        ),
        _compare(
            "it drifts more still where states explode",
            exploding,
            critical,
            "drift at |h_L - h_0| / |h_0| = 100 over that at 1",
        ),
        _compare(
            "at the critical scale, kernels drift more with rough weights (an SDE) than with regular ones (an ODE)",
            critical[:, rough],
            critical[:, regular],
            names,
            paired=False,
        ),
    ]


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Draw the heat map of drifts, and drift against how far states travel."""
    from matplotlib.figure import Figure

    drift, moved = table(rows, settings, "drift"), table(rows, settings, "moved").mean(0)
    mean = np.log10(drift).mean(0)
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels: Any = figure.subplots(1, 2, width_ratios=(1.1, 1))
    draw_heat(panels[0], settings, mean, moved, "log10 of $|K_t - K_0|\\,/\\,|K_0|$", cmap="magma")
    for j, hurst in enumerate(settings.hursts):
        shown = moved[:, j] <= 4
        shade = f"C{j}" if len(settings.hursts) <= 10 else None
        panels[1].plot(moved[shown, j], mean[shown, j], marker="o", markersize=3, color=shade, label=f"H = {hurst:g}")
        logs = np.log10(drift[:, shown, j])
        panels[1].fill_between(moved[shown, j], logs.min(0), logs.max(0), color=shade, alpha=0.15, linewidth=0)
    panels[1].set_xlabel("log10 of $|h_L - h_0|\\,/\\,|h_0|$ before training")
    panels[1].set_title("the same; bands: all seeds", fontsize=10)
    panels[1].legend(fontsize=8)
    figure.suptitle(
        f"Depth {settings.depth:,}, width {settings.width}, {settings.samples} digits, {settings.steps} steps of "
        "gradient descent. White: where |h_L - h_0| / |h_0| is 0.1, 1, 10",
        fontsize=10,
    )
    return figure


EXPERIMENT = Experiment(
    name="cross/kernel-and-depth",
    paper="ours; on Marion et al. 2022, arXiv 2206.06929, and Li, Luo, Yip 2020, arXiv 2007.03714",
    claim="How far training moves the tangent kernel follows the regimes of (beta, H): least where a network is "
    "frozen, more where it has a limit, most where it explodes.",
    sizes=SIZES,
    minutes={"tiny": 0.1, "small": 4, "paper": 200},
    run=run,
    check=check,
    plot=plot,
    hardware="two cores and two hours",
)
