"""Training keeps weights Lipschitz in depth, so that the trained network still discretises an ODE.

`h_{n+1} = h_n + V_n s(W_n h_n) / L` between a fixed random stem and a fixed random read-out, full-batch gradient
descent on scikit-learn's digits (one-hot targets, square loss) from weights that do not depend on depth (`W_n = W`,
`V_n = V`). The gradient is taken times L, so that time is the same at every depth. With smooth activations the paper
proves that `L max |W_{n+1} - W_n|` stays bounded in training, uniformly over L, and that the network converges to
an ODE; ReLU is outside of its assumptions and shown beside.

Source: Marion, Wu, Sander, Biau 2023, arXiv 2309.01213; settings ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from abyssal.demo.digits import load_digits
from abyssal.papers.experiment import Experiment, Finding, Row, Work, chosen, grid, listed
from abyssal.papers.shared.powers import by_size, draw_seeds, name_panel, power
from abyssal.report.axes import COLOURS, new_figure, power_guide

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

ACTIVATIONS = ("tanh", "gelu", "relu")


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        depths: L, each twice the one before.
        width: of the states and of the hidden layer.
        images: training images.
        steps: of gradient descent.
        rate: step size, in time units.
        seeds: networks of each activation and depth.
    """

    depths: tuple[int, ...]
    width: int
    images: int
    steps: int
    seeds: int
    rate: float = 0.05


def train(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one network.

    Returns:
        `loss_start`, `loss_end`; `jump`, the largest value in training of `L max |.|` (spectral norms) over both
        matrices' differences from block to block; `moved`, how far weights moved, largest over blocks; `output`, of
        8 held-out images. [8, 10]
    """
    depth, width = cell["depth"], cell["width"]
    activations: dict[str, Any] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": torch.relu}
    activation = activations[cell["activation"]]
    digits = load_digits()
    generator = torch.Generator().manual_seed(cell["seed"])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    # The same numbers at every depth: depth alone differs.
    stem, head = normal(width, 64) / 8, normal(10, width) / math.sqrt(width)
    first = (normal(width, width) / math.sqrt(width), normal(width, width) / math.sqrt(width))
    weights = [w.expand(depth, width, width).clone() for w in first]  # W and V
    x = digits.train_images[: cell["images"]].double().flatten(1) @ stem.T
    targets = F.one_hot(digits.train_labels[: cell["images"]], 10).double()
    probe = digits.test_images[:8].double().flatten(1) @ stem.T

    def forward(h: torch.Tensor) -> list[torch.Tensor]:
        states = [h]
        for w, v in zip(*weights, strict=True):
            states.append(states[-1] + activation(states[-1] @ w.T) @ v.T / depth)
        return states

    losses, jump = [], 0.0
    for step in range(cell["steps"] + 1):
        states = forward(x)
        residual = states[-1] @ head.T - targets
        losses.append(0.5 * residual.square().sum(1).mean().item())
        jump = max(jump, *(depth * torch.linalg.matrix_norm(w.diff(dim=0), ord=2).max().item() for w in weights))
        if step < cell["steps"]:
            gradients = _backward(states, residual @ head / len(x), weights, activation)
            weights = [w - cell["rate"] * g for w, g in zip(weights, gradients, strict=True)]
    moved = max(torch.linalg.matrix_norm(w - f, ord=2).max().item() for w, f in zip(weights, first, strict=True))
    return {
        "loss_start": losses[0],
        "loss_end": losses[-1],
        "jump": jump,
        "moved": moved,
        "output": (forward(probe)[-1] @ head.T).numpy(),
    }


def _backward(states: list[Tensor], adjoint: Tensor, weights: list[Tensor], activation: Any) -> list[Tensor]:
    """Return L times the loss's gradients, by going back through the states. Two tensors [depth, width, width]."""
    depth = len(states) - 1
    found: list[list[Tensor]] = [[], []]
    for n in range(depth - 1, -1, -1):
        w, v = weights[0][n], weights[1][n]
        inside = (states[n] @ w.T).requires_grad_()
        hidden = activation(inside)
        (slope,) = torch.autograd.grad(hidden.sum(), inside)
        delta = (adjoint @ v) * slope
        found[1].append(adjoint.T @ hidden.detach())
        found[0].append(delta.T @ states[n])
        adjoint = adjoint + delta @ w / depth
    return [torch.stack(parts[::-1]) for parts in found]


def run(settings: Settings, work: Work) -> list[Row]:
    """Train at every depth, with every activation."""
    common = chosen(settings, "width images steps rate")
    cells = grid(common, depth=settings.depths, activation=ACTIVATIONS, seed=range(settings.seeds))
    found = work.cells(train, cells, phase="training")
    outputs = {
        (c["activation"], c["seed"], c["depth"]): np.asarray(f["output"]) for c, f in zip(cells, found, strict=True)
    }
    rows: list[Row] = []
    for cell, values in zip(cells, found, strict=True):
        here, deeper = ((cell["activation"], cell["seed"], n) for n in (cell["depth"], 2 * cell["depth"]))
        apart = None
        if deeper in outputs:
            apart = float(np.linalg.norm(outputs[here] - outputs[deeper]) / np.linalg.norm(outputs[deeper]))
        named = {name: cell[name] for name in ("activation", "depth", "seed")}
        kept = {name: float(values[name]) for name in ("loss_start", "loss_end", "jump", "moved")}
        rows.append({**named, **kept, "from_double_depth": apart})
    return rows


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Judge by powers of the depth, with intervals over seeds and depths."""
    falls = [row["loss_end"] / row["loss_start"] for row in rows]
    moved = [row["moved"] for row in rows]
    yield Finding(
        "the networks are trained, and their weights move",
        f"the loss falls to {max(falls):.2f} of its start, or less; weights move by {min(moved):.2f} or more",
        max(falls) < 0.5 and min(moved) > 0.1,
    )
    for activation in ACTIVATIONS:
        sizes, jumps = by_size(rows, "depth", "jump", activation=activation)
        bounded = power(sizes, jumps)
        limit = power(*by_size(rows, "depth", "from_double_depth", activation=activation))
        largest = f"its largest value in training is between {jumps.min():.2f} and {jumps.max():.2f}; {bounded}"
        if activation == "relu":
            claim = (
                "relu, outside of the theorem's assumptions: L max |W[n+1] - W[n]| does not stay bounded (seen here)"
            )
            yield Finding(claim, f"{largest}; outputs at depth L against depth 2L: {limit}", bounded.above(0.5))
            continue
        claim = f"{activation}: L max |W[n+1] - W[n]| stays bounded over L and over training"
        yield Finding(claim, largest, bounded.below(0.1))
        claim = f"{activation}: the trained network converges to an ODE, at rate 1/L"
        yield Finding(claim, f"outputs at depth L against depth 2L: {limit}", limit.between(-1.15, -0.85))


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Jumps against depth, and outputs' distance from those at twice the depth."""
    figure, (jumps, limit) = new_figure(2)
    for axes, column, title in (
        (jumps, "jump", "largest L |W[n+1] - W[n]| in training"),
        (limit, "from_double_depth", "trained outputs, depth L against 2L"),
    ):
        for colour, activation in zip(COLOURS, ACTIVATIONS, strict=False):
            sizes, values = by_size(rows, "depth", column, activation=activation)
            middle = draw_seeds(axes, sizes, values, activation, colour)
            if (column, activation) == ("from_double_depth", "tanh"):
                power_guide(axes, sizes, float(middle[0]), -1, "1/L")
        name_panel(axes, title, "depth L", sizes, yscale="log")
    return figure


EXPERIMENT = Experiment(
    name="marion2023/implicit",
    paper="Marion, Wu, Sander, Biau 2023, arXiv 2309.01213",
    claim="A residual network that starts as a discretised ODE stays one in training: weights stay Lipschitz in depth, "
    "uniformly over depth, and the trained network converges to an ODE.",
    sizes={
        "tiny": Settings((8, 16, 32), 8, 32, 30, 2),
        "small": Settings((16, 32, 64, 128, 256), 16, 128, 100, 3),
        "paper": Settings((16, 32, 64, 128, 256, 512, 1024), 64, 1437, 2000, 10),
    },
    minutes={"tiny": 0.05, "small": 1.7, "paper": 1500},
    run=run,
    check=check,
    plot=plot,
    hardware="many cores or a GPU, a day",
)
