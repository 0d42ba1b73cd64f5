"""An unmodified ResNet-101 layout: the paper's adjoint cannot train it, reconstruction as it is by default can.

Bottleneck blocks in stages of 3, 4, 23 and 3, ReLU after each sum, BatchNorm, branches without a scale: nothing makes
its steps small, or invertible. Trained by backpropagation, by the paper's adjoint, by `abyssal.reconstruct` as it is
by default (which keeps the inputs of such blocks, since a ReLU after BatchNorm turns small errors of the state into
large ones of the gradient), and with the stream coded in 8 bits a number. SGD, since Adam did not get the small
size to train by backpropagation in as few steps.

Source: Sander, Ablin, Peyré 2022, arXiv 2205.14612, on ResNet-101 without changes; the layout is that of He et
al. 2016, arXiv 1512.03385, table 1, in another width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from abyssal.papers.data import dataset
from abyssal.papers.experiment import Experiment, Finding, Row, Work, chosen, grid
from abyssal.papers.networks.bottleneck import BottleneckResNet
from abyssal.papers.shared.training import accuracy, gradient_error, stored_bytes, train
from abyssal.report.axes import COLOURS, new_figure
from abyssal.util.stats import Interval, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

METHODS = {
    "backprop": "backpropagation",
    "paper": "the paper's adjoint",
    "ours": "ours, by default",
    "code8": "ours, 8 bits a number",
}
FAILS, TRAINS = 0.5, 0.9  # of the fall of the loss that backpropagation reaches


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        layers: blocks of each stage.
        width: inner channels of the first stage's blocks; the stream has four times as many.
        steps: of training.
        seeds: of weights and batches.
        size: of the images; None leaves them.
        data: "digits" or "cifar10".
        batch: images per step.
        rate: of SGD with momentum 0.9, at the start.
    """

    layers: tuple[int, ...]
    width: int
    steps: int
    seeds: int
    size: int | None = None
    data: str = "digits"
    batch: int = 32
    rate: float = 0.05


def fit(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one network by one method; `losses` has one entry per step, nan from where it is no number any more."""
    data = dataset(cell["data"], size=cell["size"])
    torch.manual_seed(cell["seed"])
    model = BottleneckResNet(cell["layers"], cell["width"], data.image[0], data.classes)
    first = gradient_error(model, cell["method"], data, cell["batch"])
    stored = None if cell["method"] == "backprop" else stored_bytes(model, cell["method"], data, cell["batch"])
    plan = cell["steps"], cell["batch"], cell["rate"], cell["seed"], "sgd"
    losses, _ = train(model, cell["method"], data, *plan)
    right, _ = accuracy(model, data)
    return {"losses": np.array(losses), "accuracy": right, "gradient_error": first, "stored_bytes": stored}


def run(settings: Settings, work: Work) -> list[Row]:
    """Train by every method; a row for each of at most 60 stretches of the steps, with its mean loss."""
    common = {**chosen(settings, "width steps size data batch rate"), "layers": list(settings.layers)}
    cells = grid(common, seed=range(settings.seeds), method=METHODS)
    stretches = np.array_split(np.arange(settings.steps), min(60, settings.steps))
    return [
        {
            "method": cell["method"],
            "seed": cell["seed"],
            "step": int(steps[-1]) + 1,
            "loss": float(np.asarray(values["losses"])[steps].mean()),
            "accuracy": values["accuracy"],
            "gradient_error": values["gradient_error"],
            "stored_bytes": values["stored_bytes"],
        }
        for cell, values in zip(cells, work.cells(fit, cells, phase="training"), strict=True)
        for steps in stretches
    ]


def _curve(rows: list[Row], method: str, seed: int) -> list[tuple[int, float]]:
    """Return steps and losses of one training, in their order; nan where the loss is no number any more."""
    return sorted(
        (row["step"], math.nan if row["loss"] is None else row["loss"])
        for row in rows
        if row["method"] == method and row["seed"] == seed
    )


def progress(rows: list[Row], method: str) -> Interval:
    """Return how much of the fall of the loss that backpropagation reaches a method reaches, by seed.

    The fall is from the uniform guess over 10 classes, log 10, to the mean of the last tenth of the training. Where the
    loss is no number any more there is none.
    """

    def fall(name: str, seed: int) -> float:
        mine = _curve(rows, name, seed)
        return math.log(10) - float(np.mean([loss for _, loss in mine[-max(1, len(mine) // 10) :]]))

    falls = [(fall(method, seed), fall("backprop", seed)) for seed in sorted({row["seed"] for row in rows})]
    return mean([mine / theirs if math.isfinite(mine) else 0.0 for mine, theirs in falls])


def check(rows: list[Row], settings: Settings) -> list[Finding]:
    """Judge by how far the loss falls, against backpropagation from the same start on the same batches."""
    found = {method: progress(rows, method) for method in METHODS if method != "backprop"}
    facts = {row["method"]: row for row in rows}  # the last seed's
    return [
        Finding(
            "trained with the paper's adjoint the unmodified ResNet-101 layout fails",
            f"it reaches {found['paper'].show('.0%')} of backpropagation's fall of the loss; gradient error at the "
            f"start {_number(facts['paper']['gradient_error']):.1g}",
            found["paper"].below(FAILS),
        ),
        Finding(
            "ours, as it is by default, trains it",
            f"it reaches {found['ours'].show('.0%')} of backpropagation's fall; it stores {_bytes(facts['ours'])}",
            found["ours"].above(TRAINS),
        ),
        Finding(
            "so does ours with the stream coded in 8 bits a number",
            f"it reaches {found['code8'].show('.0%')} of backpropagation's fall; it stores {_bytes(facts['code8'])}, "
            f"gradient error at the start {_number(facts['code8']['gradient_error']):.1g}",
            found["code8"].above(TRAINS),
        ),
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _bytes(row: Row) -> str:
    return f"{_number(row['stored_bytes']) / 1e6:.2f} MB of the stream"


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Loss curves, every seed a line."""
    figure, (axes,) = new_figure(1)
    figure.set_size_inches(7.2, 4.2)
    for n, (method, name) in enumerate(METHODS.items()):
        for k, seed in enumerate(sorted({row["seed"] for row in rows})):
            line = zip(*_curve(rows, method, seed), strict=True)
            style, label = ("-", "-", "--", ":")[n], name if k == 0 else None
            axes.plot(*line, style, color=COLOURS[n], lw=1.4, label=label)
    top = max(2 * math.log(10), 3.0)
    axes.axhline(math.log(10), color="#999999", lw=0.8)
    axes.text(0.99, math.log(10) + 0.02 * top, "guessing", ha="right", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set(ylim=(0, top), xlabel="step", ylabel="training loss", title="ResNet-101's layout, unmodified")
    axes.legend(frameon=False, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="sander2022/failure",
    paper="Sander, Ablin, Peyré 2022, arXiv 2205.14612",
    claim="An unmodified ResNet-101 cannot be trained by the adjoint without stored activations: its residual steps "
    "are not small. (Reconstruction with kept or coded states can train it.)",
    sizes={
        "tiny": Settings((2, 2, 3, 2), 4, 6, 2, batch=16),
        "small": Settings((3, 4, 23, 3), 4, 120, 3, size=16),
        "paper": Settings((3, 4, 23, 3), 64, 35_000, 3, None, "cifar10", 128, 0.1),
    },
    minutes={"tiny": 0.1, "small": 3.8, "paper": 50_000},
    run=run,
    check=check,
    plot=plot,
    hardware="CIFAR-10 and a GPU, a day",
)
