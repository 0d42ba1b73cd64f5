"""The error of gradients whose activations are recovered backwards, against depth, on trained networks.

Residual networks `x + f_n(x)/N` (Euler) and Heun's, between a linear stem and a linear head, trained on scikit-learn's
digits with exact gradients in float32; then, in float64, the gradient of a fresh batch's loss under the paper's
adjoint and under `Reverse(k)`, whose last refinement is free, relative to exact backpropagation. Euler networks start
from weights that are independent over depth, as they are initialised in practice; Heun networks from smooth ones, as
the paper asks for its higher order.

Source: Sander, Ablin, Peyré 2022, arXiv 2205.14612, on the adjoint's error; docs/how-it-works.md on refinements.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from abyssal.certify.drift import DriftWarning
from abyssal.demo.digits import load_digits
from abyssal.engine.api import reconstruct, release
from abyssal.engine.policy import PaperAdjoint, Reverse
from abyssal.nn import DigitsResNet, depth_smooth_
from abyssal.papers.experiment import Experiment, Finding, Row, Work, chosen, grid, listed
from abyssal.papers.shared.powers import by_size, draw_seeds, name_panel, power
from abyssal.papers.shared.training import SCHEMES
from abyssal.report.axes import COLOURS, new_figure, power_guide

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

# Scheme, policy, power of N that theory has, and whether the paper proves it.
CURVES = (
    ("Euler", "PaperAdjoint()", -1, True),
    ("Euler", "Reverse(0)", -1, False),
    ("Euler", "Reverse(1)", -2, False),
    ("Euler", "Reverse(2)", -3, False),
    ("Heun", "PaperAdjoint()", -2, True),
    ("Heun", "Reverse(1)", -4, False),
)
_ROUNDING = 1e-12  # errors below it are float64's own


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        depths: residual functions N.
        width: of the states.
        steps: of training, Adam at 1e-3 on batches of 128.
        seeds: networks of each scheme and depth.
    """

    depths: tuple[int, ...]
    width: int
    steps: int
    seeds: int


def measure(cell: Mapping[str, Any]) -> dict[str, float]:
    """Train one network; return its accuracy on held-out digits and the gradient error of every policy."""
    digits = load_digits()
    network = _trained(cell, digits.train_images, digits.train_labels)
    with torch.no_grad():
        accuracy = (network(digits.test_images).argmax(-1) == digits.test_labels).double().mean().item()
    network.double()
    images, labels = digits.test_images[:64].double(), digits.test_labels[:64]

    def gradient() -> Tensor:
        loss = F.cross_entropy(network(images), labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])

    exact, found = gradient(), {"accuracy": accuracy}
    policies = {"PaperAdjoint()": PaperAdjoint()} | {f"Reverse({k})": Reverse(k) for k in range(3)}
    for scheme, name, *_ in CURVES:
        if scheme != cell["scheme"]:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)  # the error is what is measured
            reconstruct(network, policies[name], blocks="stack.steps.*")
            found[name] = float((gradient() - exact).norm() / exact.norm())
            release(network)
    return found


def _trained(cell: Mapping[str, Any], images: Tensor, labels: Tensor) -> nn.Module:
    torch.manual_seed(cell["seed"])
    network = DigitsResNet(cell["depth"], cell["width"], scheme=SCHEMES[cell["scheme"]])
    if cell["scheme"] == "Heun":
        depth_smooth_(network.stack.blocks, generator=torch.Generator().manual_seed(cell["seed"]))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    batches = torch.Generator().manual_seed(cell["seed"])
    for _ in range(cell["steps"]):
        chosen = torch.randint(len(labels), (128,), generator=batches)
        optimizer.zero_grad()
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return network


def run(settings: Settings, work: Work) -> list[Row]:
    """Train and measure every network."""
    seeds = range(settings.seeds)
    cells = grid(chosen(settings, "width steps"), depth=settings.depths, scheme=SCHEMES, seed=seeds)
    found = work.cells(measure, cells, phase="training, then errors")
    return [
        {
            **{name: cell[name] for name in ("scheme", "depth", "seed")},
            "policy": policy,
            "error": values[policy] if values[policy] > _ROUNDING else None,
            "accuracy": values["accuracy"],
        }
        for cell, values in zip(cells, found, strict=True)
        for scheme, policy, *_ in CURVES
        if scheme == cell["scheme"]
    ]


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Judge by the powers of N, without the shallowest depth: theory is about large N."""
    deep = [row for row in rows if row["depth"] >= settings.depths[1]]
    accuracy = min(row["accuracy"] for row in rows)
    yield Finding("the networks are trained", f"held-out accuracy at least {accuracy:.3f}", accuracy > 0.8)
    for scheme, policy, expected, proved in CURVES:
        sizes, errors = by_size(_whole(deep), "depth", "error", scheme=scheme, policy=policy)
        slope = power(sizes, errors)
        claim = f"{scheme}, {policy}: the gradient error falls {'at least ' if proved else ''}as N^{expected}"
        # What the paper proves is a bound: a faster fall is within it.
        holds = slope.below(expected + 0.25) if proved else slope.between(expected - 0.35, expected + 0.35)
        measured = f"{slope}" if math.isfinite(slope.value) else "too few errors above rounding"
        yield Finding(claim + (" (paper)" if proved else " (abyssal)"), measured, holds)
    ratio = _ratio(rows, settings)
    yield Finding(
        "Euler: the free refinement makes Reverse(1) more accurate than the paper's adjoint, which costs as much",
        f"at N = {settings.depths[-1]}: {ratio:.0f} times",
        ratio > 1,
    )


def _whole(rows: list[Row]) -> list[Row]:
    """Leave out depths where a seed's error was below rounding."""
    gone = {(r["scheme"], r["policy"], r["depth"]) for r in rows if r["error"] is None}
    return [row for row in rows if (row["scheme"], row["policy"], row["depth"]) not in gone]


def _ratio(rows: list[Row], settings: Settings) -> float:
    deepest = [row for row in rows if row["depth"] == settings.depths[-1]]

    def errors(policy: str) -> np.ndarray:
        return by_size(deepest, "depth", "error", scheme="Euler", policy=policy)[1]

    return float(np.median(errors("PaperAdjoint()")) / np.median(errors("Reverse(1)")))


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Gradient error against depth, one plot for each scheme."""
    figure, plots = new_figure(2)
    colours = dict(zip(("PaperAdjoint()", "Reverse(0)", "Reverse(1)", "Reverse(2)"), COLOURS, strict=False))
    for axes, wanted in zip(plots, SCHEMES, strict=True):
        for scheme, policy, expected, _ in CURVES:
            if scheme != wanted:
                continue
            sizes, errors = by_size(_whole(rows), "depth", "error", scheme=scheme, policy=policy)
            if not sizes:
                continue
            label = "the paper's adjoint" if policy == "PaperAdjoint()" else policy
            middle = draw_seeds(axes, sizes, errors, label, colours[policy])
            power_guide(axes, sizes, float(middle[-1]) * (sizes[0] / sizes[-1]) ** expected, expected, f"N^{expected}")
        title = f"{wanted}: relative gradient error, trained"
        name_panel(axes, title, "depth N", settings.depths, yscale="log")
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        axes.legend(shown.values(), shown.keys(), frameon=False, fontsize=8)
    return figure


EXPERIMENT = Experiment(
    name="sander2022/gradient-error",
    paper="Sander, Ablin, Peyré 2022, arXiv 2205.14612",
    claim="Activations recovered backwards give gradients whose error falls with depth, as 1/N with Euler steps and as "
    "1/N^2 with Heun steps on depth-smooth networks.",
    sizes={
        "tiny": Settings((8, 16, 32), 16, 20, 2),
        "small": Settings((16, 32, 64, 128, 256), 24, 120, 4),
        "paper": Settings((8, 16, 32, 64, 128, 256, 512), 64, 2000, 10),
    },
    minutes={"tiny": 0.1, "small": 3, "paper": 600},
    run=run,
    check=check,
    plot=plot,
    hardware="a few cores, a day",
)
