"""How far a residual network is from the neural ODE through its weights, and the bound on it.

Residual MLPs `x + f_n(x)/N`, float64, against the ODE whose weights are interpolated linearly in depth; weights that
are smooth functions of depth, and independent ones ("rough"). The distance is the largest over a batch.

Source: Sander, Ablin, Peyré 2022, arXiv 2205.14612, Proposition 1; constants of the bound: `abyssal.limits.gap`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from abyssal.limits import ode_gap
from abyssal.nn import depth_smooth_, residual_mlp
from abyssal.papers.experiment import Experiment, Finding, Row, Work, chosen, grid
from abyssal.papers.shared.powers import by_size, draw_seeds, name_panel, power
from abyssal.report.axes import COLOURS, new_figure, power_guide

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

WEIGHTS = ("smooth", "rough")


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        depths: N.
        width: of the states.
        batch: inputs of each network.
        seeds: networks of each kind and depth.
    """

    depths: tuple[int, ...]
    width: int
    batch: int
    seeds: int


def measure(cell: Mapping[str, Any]) -> dict[str, float]:
    """Return one network's distance, how far its ODE moves, and both bounds, at the input that ends farthest."""
    # One path of smooth weights for every depth; rough weights have no path to share.
    generator = torch.Generator().manual_seed(cell["seed"])
    x = torch.randn(cell["batch"], cell["width"], dtype=torch.float64, generator=generator)
    stack = residual_mlp(cell["depth"], cell["width"]).double()
    if cell["weights"] == "smooth":
        depth_smooth_(stack.blocks, generator=generator)
    else:
        for linear in (module for module in stack.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=cell["width"] ** -0.5, generator=generator)
            nn.init.zeros_(linear.bias)
    gap = ode_gap(stack, x, tolerance=1e-8)
    worst = int(gap.distance[-1].argmax())
    if gap.bound is None or gap.rigorous is None or gap.lipschitz is None or gap.acceleration is None:
        raise RuntimeError("an Euler stack of MLPBranch has bounds")  # and nothing else is built above
    return {
        "distance": float(gap.distance[-1, worst]),
        "moved": float(gap.moved[worst]),
        "solver_error": gap.solver_error,
        "bound": float(gap.bound[worst]),
        "rigorous": float(gap.rigorous.bound[worst]),
        "lipschitz": float(gap.lipschitz[worst]),
        "acceleration": float(gap.acceleration[worst]),
        "margin": float((gap.rigorous.bound - gap.distance[-1]).min()),
    }


def run(settings: Settings, work: Work) -> list[Row]:
    """Measure every network."""
    common = chosen(settings, "width batch")
    cells = grid(common, depth=settings.depths, weights=WEIGHTS, seed=range(settings.seeds))
    found = work.cells(measure, cells, phase="networks against their ODEs")
    return [
        {**{name: cell[name] for name in ("weights", "depth", "seed")}, **values}
        for cell, values in zip(cells, found, strict=True)
    ]


def check(rows: list[Row], settings: Settings) -> list[Finding]:
    """Judge by powers of the depth, with intervals over networks and depths."""
    smooth, rough = (power(*by_size(rows, "depth", "distance", weights=w)) for w in WEIGHTS)
    bounds = {w: power(*by_size(rows, "depth", "bound", weights=w)) for w in WEIGHTS}
    broken = sum(row["margin"] < 0 for row in rows)
    return [
        Finding(
            "the distance never exceeds the bound (rigorous constants)",
            f"exceeded in {broken} of {len(rows)} networks",
            broken == 0,
        ),
        Finding("weights smooth in depth: the distance falls as 1/N", f"{smooth}", smooth.between(-1.1, -0.9)),
        Finding(
            "weights smooth in depth: so does the bound", f"{bounds['smooth']}", bounds["smooth"].between(-1.15, -0.85)
        ),
        Finding(
            "weights rough in depth: the bound does not go to 0",
            f"{bounds['rough']}",
            bounds["rough"].above(-0.25),
        ),
        Finding(
            "weights rough in depth: the distance does not fall as 1/N",
            f"{rough}",
            rough.above(-0.9),
        ),
    ]


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Distances and bounds against depth, one plot for each kind of weights."""
    figure, plots = new_figure(2)
    for axes, weights in zip(plots, WEIGHTS, strict=True):
        for colour, column, name in (
            (COLOURS[0], "distance", "distance"),
            (COLOURS[1], "bound", "bound, constants along the trajectory"),
            (COLOURS[3], "rigorous", "bound, rigorous constants"),
        ):
            depths, values = by_size(rows, "depth", column, weights=weights)
            middle = draw_seeds(axes, depths, values, name, colour)
            if column == "distance":
                power_guide(axes, depths, float(middle[0]), -1, "1/N")
        name_panel(axes, f"weights {weights} in depth: |x_N - x(1)|", "depth N", depths, yscale="log")
    return figure


EXPERIMENT = Experiment(
    name="sander2022/ode-gap",
    paper="Sander, Ablin, Peyré 2022, arXiv 2205.14612",
    claim="The distance between a residual network and its neural ODE is bounded, and the bound goes to 0 with depth "
    "only if the residual functions are smooth in depth.",
    sizes={
        "tiny": Settings((8, 16, 32), 8, 4, 2),
        "small": Settings((8, 16, 32, 64, 128, 256), 16, 8, 6),
        "paper": Settings((8, 16, 32, 64, 128, 256, 512, 1024), 64, 32, 20),
    },
    minutes={"tiny": 0.05, "small": 1.6, "paper": 300},
    run=run,
    check=check,
    plot=plot,
    hardware="a few cores, hours",
)
