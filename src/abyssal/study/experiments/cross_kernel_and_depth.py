"""How far training moves the tangent kernel of deep networks, over scale and regularity of their weights.

The tangent experiments (Li, Luo, Yip; Huang, Yau) ask when the kernel hardly moves while a network is trained; those of
Marion et al. say which (beta, H) freeze a deep network, give it a limit ODE or SDE, or make it explode. Here the two
meet: res-1 networks with fractional weights and branches scaled by depth^-beta learn which digits are odd, by gradient
descent on all samples, and the kernel on the samples is compared with what it was. Nobody has published this figure.

Every network takes the same number of steps of the same size in units of its own kernel: a step multiplies the
residual along the kernel's largest eigenvector by 1/2, as long as the kernel is what it was. Without that the
comparison would be one of learning rates. Outputs are not centred, so a network whose states explode starts with a
loss to match, as it does in practice.

Sources: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929; Li, Luo, Yip 2020, arXiv 2007.03714.
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

__all__ = ["EXPERIMENT", "Settings", "train_column"]

Array = np.ndarray
HALF = 0.5  # of the residual along the first eigenvector goes in a step


def _even(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(float(x) for x in np.linspace(low, high, count).round(6))


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
    """

    depth: int
    width: int
    betas: tuple[float, ...]
    hursts: tuple[float, ...]
    samples: int = 48
    steps: int = 40
    seeds: int = 3


SIZES = {
    "tiny": Settings(40, 16, (0.3, 0.6, 1.2), (0.2, 0.8), 12, 5, 2),
    "small": Settings(200, 30, _even(0.2, 1.3, 12), _even(0.1, 0.9, 5)),
    "paper": Settings(1000, 40, _even(0.2, 1.3, 23), _even(0.1, 0.9, 9), 96, 40, 5),
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
    import torch

    from abyssal.nn.grid import ResidualGrid
    from abyssal.nn.grid_updates import Sgd
    from abyssal.scaling.families import FractionalNoise
    from abyssal.study.experiments._grids import draw, flushed, images, travel
    from abyssal.sweep import seed_of

    data = images("digits", cell["samples"])
    odd = (data.y % 2 * 2 - 1).double()[:, None]
    x = data.x.double()
    seed = seed_of({"seed": cell["seed"], "hurst": cell["hurst"]})
    weights = draw(FractionalNoise(cell["hurst"]), cell["depth"], cell["width"], data.features, 1, seed)
    weights = {name: tensor.double() for name, tensor in weights.items()}
    scales = torch.tensor([float(cell["depth"]) ** -beta for beta in cell["betas"]], dtype=torch.float64)
    with flushed():
        grid = ResidualGrid(
            *(weights[name].expand(len(scales), *weights[name].shape[1:]) for name in ("stem", "outer", "head")),
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
        losses = torch.stack([grid.step(x, odd) for _ in range(cell["steps"] + 1)])
        end = _kernels(grid, x)
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


def _kernels(grid: Any, x: Any) -> Any:
    """Return each network's tangent kernel, NaN where it is not finite. [cells, n, n]."""
    import torch

    from abyssal.tangent.empirical import ntk

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
    shared = {name: getattr(settings, name) for name in ("depth", "width", "betas", "samples", "steps")}
    places = [(hurst, seed) for hurst in settings.hursts for seed in range(settings.seeds)]
    found = work.cells(
        train_column, [{**shared, "hurst": hurst, "seed": seed} for hurst, seed in places], phase="Hurst indices"
    )
    names = ("drift", "alignment", "loss_before", "loss_after", "kernel", "moved")
    return [
        {"hurst": hurst, "beta": beta, "seed": seed, **{name: _number(values[name][i]) for name in names}}
        for (hurst, seed), values in zip(places, found, strict=True)
        for i, beta in enumerate(settings.betas)
    ]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def check(rows: list[Row], settings: Settings) -> list[Finding]:
    return []


def plot(rows: list[Row], settings: Settings) -> Figure:
    from matplotlib.figure import Figure

    return Figure()


EXPERIMENT = Experiment(
    name="cross/kernel-and-depth",
    paper="ours; after Marion et al. 2022 and Li, Luo, Yip 2020",
    claim="x",
    sizes=SIZES,
    minutes={"tiny": 0.1, "small": 3, "paper": 100},
    run=run,
    check=check,
    plot=plot,
)
