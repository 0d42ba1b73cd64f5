"""Accuracy against depth, by the way gradients are got: from which depth the paper's adjoint trains as well.

Networks `x + f_n(x)/N` and Heun's whose residual functions are those of a pre-activation ResNet (BatchNorm, ReLU,
convolution, twice), from the same weights and on the same batches, trained by backpropagation, by the paper's adjoint
(each state by one step of reversed time) and by `abyssal.reconstruct` as it is by default, which keeps the inputs of
such blocks. Where the adjoint begins to work depends on the residual functions: with LayerNorm on vectors in place of
BatchNorm on images it trained as well from N = 2 on.

The rules of `check` were settled on results of seeds 0, 1, .... Three new seeds (1000 to 1002) did not decide Euler's
steps at N = 16, so "small" has eight at every depth, from 2000 on, at which nobody had looked.

Source: Sander, Ablin, Peyré 2022, arXiv 2205.14612, section 5; data, widths and schedules are ours at the small size,
and where the paper's were not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from abyssal.papers.experiment import Experiment, Finding, Row, Work, chosen, grid, listed
from abyssal.papers.shared.powers import by_seed, label_sizes
from abyssal.papers.shared.training import (
    METHODS,
    SCHEMES,
    accuracy,
    difference,
    gradient_error,
    images_of,
    network,
    points,
    train,
)
from abyssal.report.axes import COLOURS, new_figure
from abyssal.util.stats import Interval, every

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

AS_WELL = 0.05  # of accuracy below backpropagation at most: what few seeds of a short training can tell
WITHIN = f"within {100 * AS_WELL:.0f} points of accuracy"


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        depths: steps N of each network (of each stage for images).
        steps: of training.
        seeds: of weights and batches.
        width: of the state.
        data: "digits" or "cifar10".
        stages: of the network of images, each half as large as the one before.
        batch: images per step.
        rate: of Adam, at the start.
        images: of training, at most; None is all.
        first_seed: seeds count from here; see the module's docstring.
    """

    depths: tuple[int, ...]
    steps: int
    seeds: int
    width: int
    data: str = "digits"
    stages: int = 1
    batch: int = 32
    rate: float = 1e-2
    images: int | None = None
    first_seed: int = 0


def fit(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one network by one method."""
    data = images_of(cell)
    model = network(cell, data.image)
    losses, stored = train(model, cell["method"], data, cell["steps"], cell["batch"], cell["rate"], cell["seed"])
    right, loss = accuracy(model, data)
    return {
        "accuracy": right,
        "test_loss": loss,
        "train_loss": sum(losses[-10:]) / len(losses[-10:]),
        "gradient_error": gradient_error(model, cell["method"], data, cell["batch"]),
        "stored_bytes": stored,
    }


def run(settings: Settings, work: Work) -> list[Row]:
    """Train at every depth, by every scheme and method."""
    common = {**chosen(settings, "steps width data stages batch rate images"), "kind": "image"}
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    cells = grid(common, depth=settings.depths, scheme=SCHEMES, seed=seeds, method=METHODS)
    names = ("scheme", "depth", "method", "seed")
    found = work.cells(fit, cells, phase="training")
    return [{**{name: cell[name] for name in names}, **values} for cell, values in zip(cells, found, strict=True)]


def behind(rows: list[Row], scheme: str, method: str) -> dict[int, Interval]:
    """Return how much more accurate a method is than backpropagation, by depth, paired by seed."""
    depths = sorted({row["depth"] for row in rows})
    return {
        depth: difference(
            rows,
            "accuracy",
            {"scheme": scheme, "depth": depth, "method": method},
            {"scheme": scheme, "depth": depth, "method": "backprop"},
        )
        for depth in depths
    }


def from_depth(differences: Mapping[int, Interval]) -> int | None:
    """Return the depth from which on a method is not behind by more than `AS_WELL`, decidedly; None for none."""
    reached = None
    for depth in sorted(differences, reverse=True):
        if differences[depth].above(-AS_WELL) is not True:
            break
        reached = depth
    return reached


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Judge by differences of accuracy, paired by seed, and their intervals."""
    reached = {}
    for scheme in SCHEMES:
        theirs = behind(rows, scheme, "paper")
        reached[scheme] = from_depth(theirs)
        deepest, first = max(theirs), min(theirs)
        claim = f"{scheme}: in a deep network the paper's adjoint trains as well as backpropagation ({WITHIN})"
        holds = theirs[deepest].above(-AS_WELL)
        since = f"from N = {reached[scheme]} on" if reached[scheme] is not None else "at no depth decidedly"
        yield Finding(claim, f"{since}; at N = {deepest} its accuracy differs by {points(theirs[deepest])}", holds)
        shallow = theirs[min((d for d in theirs if d > 1), default=first)]
        yield Finding(
            f"{scheme}: in a shallow network it does not",
            f"at N = {min((d for d in theirs if d > 1), default=first)} its accuracy differs by {points(shallow)}",
            shallow.below(-AS_WELL),
        )
    yield _fewer(reached, {scheme: behind(rows, scheme, "paper") for scheme in SCHEMES})
    ours = {(scheme, depth): d for scheme in SCHEMES for depth, d in behind(rows, scheme, "ours").items()}
    worst = min(ours, key=lambda key: ours[key].value)
    yield Finding(
        f"ours trains as well as backpropagation at every depth, Euler and Heun ({WITHIN})",
        f"worst for {worst[0]} at N = {worst[1]}: its accuracy differs by {points(ours[worst])}",
        every(d.above(-AS_WELL) for d in ours.values()),
    )


def _fewer(reached: Mapping[str, int | None], differences: Mapping[str, Mapping[int, Interval]]) -> Finding:
    """Judge by whether one scheme is decidedly not as good yet at the depth from which on the other one is."""

    def first(one: str, other: str) -> bool:
        depth = reached[one]
        return depth is not None and differences[other][depth].above(-AS_WELL) is False

    shown = {name: f"N = {depth}" if depth is not None else "no depth measured" for name, depth in reached.items()}
    holds = True if first("Heun", "Euler") else False if first("Euler", "Heun") else None
    return Finding(
        "with Heun's steps the adjoint trains as well from fewer layers on",
        f"Euler from {shown['Euler']}, Heun from {shown['Heun']}",
        holds,
    )


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Accuracy against depth, by method, Euler beside Heun; bars from the worst seed to the best."""
    figure, panels = new_figure(2)
    depths = sorted({row["depth"] for row in rows})
    for axes, scheme in zip(panels, SCHEMES, strict=True):
        for n, (method, name) in enumerate(METHODS.items()):
            found = [
                np.array(list(by_seed(rows, "accuracy", scheme=scheme, depth=depth, method=method).values()))
                for depth in depths
            ]
            middle = np.array([values.mean() for values in found])
            ends = np.array([[m - v.min(), v.max() - m] for m, v in zip(middle, found, strict=True)]).T
            axes.errorbar(
                [depth * 1.04 ** (n - 1) for depth in depths],
                middle,
                ends,
                fmt=("o-", "s--", "^:")[n],
                color=COLOURS[n],
                label=name,
                ms=4,
                capsize=2,
            )
        axes.set(ylim=(0, 1.02), xlabel="depth N (steps)", ylabel="test accuracy", title=f"{scheme}")
        label_sizes(axes, depths)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


EXPERIMENT = Experiment(
    name="sander2022/training",
    paper="Sander, Ablin, Peyré 2022, arXiv 2205.14612",
    claim="The adjoint without stored activations trains deep residual networks as well as backpropagation, and with "
    "Heun's steps fewer layers are enough for it.",
    sizes={
        "tiny": Settings((2, 4), 4, 2, 4, batch=16, images=64),
        "small": Settings((2, 4, 8, 16), 100, 8, 8, first_seed=2000),
        "paper": Settings(
            (2, 4, 8, 16, 32, 64), 40_000, 3, 16, data="cifar10", stages=3, batch=128, rate=1e-3, first_seed=2000
        ),
    },
    minutes={"tiny": 0.1, "small": 11, "paper": 100_000},
    run=run,
    check=check,
    plot=plot,
    hardware="CIFAR-10 and a GPU, days",
)
