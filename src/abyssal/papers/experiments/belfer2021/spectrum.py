"""Spectra of residual tangent kernels on the sphere: their decay, and whether depth makes the kernel a spike.

`abyssal.tangent.analytic.resntk` at several depths, for three balances of branch and skip: alpha = 1, 1/sqrt(L), 1/L.
By the Funk-Hecke formula its eigenvalues belong to spherical harmonics of degree k. Beside it the tangent kernel of
fully connected ReLU networks with biases, and the Laplace kernel, of which the paper says that they decay alike.

Source: Belfer, Geifman, Galun, Basri, arXiv 2104.03093. No random numbers: deviations are of the finite degrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from abyssal.papers.experiment import Experiment, Finding, Row, Work, grid, listed
from abyssal.papers.shared.powers import name_panel
from abyssal.report.axes import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Settings", "check", "plot", "run"]

BALANCES = {"1": 0.0, "1/sqrt(L)": 0.5, "1/L": 1.0}  # alpha = L^-power
_COLOUR = {"1": "#c8553d", "1/sqrt(L)": "#1b6ca8", "1/L": "#3f8f4f", "fully connected": "#8a5fb0", "Laplace": "#4d4d4d"}
_MARGIN, _CLOSE = 0.25, 0.05  # of the power: what finite degrees may leave of it; near enough not to come nearer
_KEY = ("kernel", "depth", "dimension")


@dataclass(frozen=True)
class Settings:
    """How much is computed.

    Attributes:
        dimensions: d of the space that the sphere is in.
        depths: L of the spectra, ascending.
        degrees: the highest; the decay is fitted from a quarter of it to a half, and from there on.
        spike_depths: L at which the kernel's half angle is computed, ascending.
    """

    dimensions: tuple[int, ...]
    depths: tuple[int, ...]
    degrees: int
    spike_depths: tuple[int, ...]


def _kernel(name: str, depth: int) -> Callable[[Tensor], Tensor]:
    from abyssal.tangent.analytic.kernels import fully_connected, resntk

    if name in BALANCES:
        return lambda t: resntk(t, depth, float(depth) ** -BALANCES[name])
    if name == "Laplace":
        return lambda t: torch.exp(-torch.sqrt((2 - 2 * t).clamp_min(0)))

    def plain(t: Tensor) -> Tensor:
        pole = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        others = torch.stack([t, torch.sqrt((1 - t * t).clamp_min(0))], -1)
        _, tangent = fully_connected(pole, others, depth=depth, activation="relu", w_std=math.sqrt(2), b_std=0.5)
        found = tangent[0]
        assert found.shape == t.shape
        return found

    return plain


def spectrum_of(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Compute one kernel's eigenvalues, with their errors."""
    from abyssal.tangent.analytic.sphere import sphere_spectrum

    found = sphere_spectrum(_kernel(cell["kernel"], cell["depth"]), cell["dimension"], cell["degrees"])
    return {"eigenvalues": found.eigenvalues, "errors": found.errors}


def half_of(cell: Mapping[str, Any]) -> dict[str, float]:
    """Compute the angle at which a kernel has fallen half-way to its value at a right angle."""
    from abyssal.tangent.analytic.sphere import half_angle

    return {"angle": half_angle(_kernel(cell["kernel"], cell["depth"]))}


def run(settings: Settings, work: Work) -> list[Row]:
    """Compute spectra and half angles."""
    pairs = [(kernel, depth) for kernel in (*BALANCES, "fully connected") for depth in settings.depths]
    cells: list[dict[str, Any]] = [
        {"kernel": kernel, "depth": depth, "dimension": dimension, "degrees": settings.degrees}
        for dimension in settings.dimensions
        for kernel, depth in [*pairs, ("Laplace", 1)]
    ]
    rows: list[Row] = []
    for cell, found in zip(cells, work.cells(spectrum_of, cells, phase="spectra"), strict=True):
        rows += [
            {**{name: cell[name] for name in _KEY}, "degree": degree,
             "eigenvalue": float(value), "error": float(found["errors"][degree]), "half_angle": None}
            for degree, value in enumerate(found["eigenvalues"])
        ]  # fmt: skip
    halves = grid({}, kernel=BALANCES, depth=settings.spike_depths)
    for cell, found in zip(halves, work.cells(half_of, halves, phase="half angles"), strict=True):
        rows.append({**cell, "half_angle": found["angle"]})
    return rows


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Judge powers by how far they are from d, spikes by half angles."""
    half = settings.degrees // 2
    for names, claim in (
        (tuple(BALANCES), "ResNTK's eigenvalues decay as k^-d, at every depth and balance"),
        (("fully connected", "Laplace"), "so do those of the fully connected NTK with biases and the Laplace kernel"),
    ):
        # A power in the limit: it has to be near, and the nearer the higher the degrees.
        keys = {tuple(row[c] for c in _KEY): None for row in rows if row["kernel"] in names and "degree" in row}
        off = [[_off(rows, key, settings.degrees, low) for low in (False, True)] for key in keys]
        upper, nearer = max(high for high, _ in off), [high <= max(_CLOSE, low) for high, low in off]
        yield Finding(
            claim,
            f"the power is d to {upper:.2f} over degrees {half} to {2 * half}, to {max(low for _, low in off):.2f} "
            f"over {half // 2} to {half}; nearer (or within {_CLOSE:g}) in {sum(nearer)} of {len(nearer)} spectra",
            False if not all(nearer) else True if upper <= _MARGIN else None,
        )
    angles = {name: _angles(rows, name) for name in BALANCES}
    first, last = settings.spike_depths[0], settings.spike_depths[-1]
    for name, spiky in (("1", True), ("1/sqrt(L)", False), ("1/L", False)):
        change = angles[name][last] / angles[name][first]
        yield Finding(
            f"alpha = {name}: with depth the kernel " + ("becomes a spike" if spiky else "keeps its shape"),
            f"half angle {angles[name][first]:.3f} at L = {first}, {angles[name][last]:.3f} at L = {last}",
            change < 0.25 if spiky else 0.75 < change < 1.25,
        )


def _off(rows: list[Row], key: tuple[Any, ...], degrees: int, low: bool) -> float:
    """How far the power is from d in a half of the degrees, that of even or of odd ones, whichever is worse."""
    first, last = (degrees // 4, degrees // 2) if low else (degrees // 2, degrees)
    dimension, worst = key[2], 0.0
    mine = [row for row in rows if "degree" in row and tuple(row[c] for c in _KEY) == key]
    for parity in (0, 1):
        used = [
            (row["degree"], row["eigenvalue"])
            for row in mine
            if first <= row["degree"] <= last and row["degree"] % 2 == parity and row["eigenvalue"] > 30 * row["error"]
        ]
        if len(used) < 3:
            return math.inf
        x, y = np.log([k + (dimension - 2) / 2 for k, _ in used]), np.log([value for _, value in used])
        worst = max(worst, abs(-float(np.polyfit(x, y, 1)[0]) - dimension))
    return worst


def _angles(rows: list[Row], name: str) -> dict[int, float]:
    mine = [row for row in rows if row["kernel"] == name and row.get("half_angle") is not None]
    return {row["depth"]: row["half_angle"] for row in mine}


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Eigenvalues against degree at the largest depth, and half angles against depth."""
    figure, every = new_figure(len(settings.dimensions) + 1)
    depth = settings.depths[-1]
    for axes, dimension in zip(every, settings.dimensions, strict=False):
        for name, colour in _COLOUR.items():
            mine = [
                row
                for row in rows
                if row["kernel"] == name
                and row.get("dimension") == dimension
                and row["depth"] in (depth, 1)
                and row["degree"] >= 1
                and row["eigenvalue"] > 30 * row["error"]
            ]
            degrees, values = (np.array([row[c] for row in mine]) for c in ("degree", "eigenvalue"))
            label = f"alpha = {name}" if name in BALANCES else name
            axes.loglog(degrees, values / values[0], ".", color=colour, markersize=3, label=label)
        axes.loglog([4, settings.degrees], [0.05 * (k / 4) ** -dimension for k in (4, settings.degrees)], ":",
                    color="#777777", label=f"$k^{{-{dimension}}}$")  # fmt: skip
        name_panel(axes, f"eigenvalues, d = {dimension}, L = {depth}", "degree k")
    for name in BALANCES:
        angles = _angles(rows, name)
        every[-1].plot(list(angles), list(angles.values()), "o-", color=_COLOUR[name], label=f"alpha = {name}", ms=4)
    name_panel(every[-1], "half angle of the kernel", "depth L", settings.spike_depths, yscale="log")
    return figure


EXPERIMENT = Experiment(
    name="belfer2021/spectrum",
    paper="Belfer, Geifman, Galun, Basri 2021, arXiv 2104.03093",
    claim="On the sphere the residual tangent kernel's eigenvalues decay as k^-d, as those of the fully connected and "
    "of the Laplace kernel do; with depth it becomes a spike or keeps its shape, by the balance of skip and branch.",
    sizes={
        "tiny": Settings((3,), (2,), 32, (2, 32, 128)),
        "small": Settings((3, 5), (2, 8, 32), 128, (2, 8, 32, 128, 512)),
        "paper": Settings((3, 4, 5, 8), (2, 8, 32), 256, (2, 8, 32, 128, 512, 1024)),
    },
    minutes={"tiny": 0.03, "small": 0.3, "paper": 3},
    run=run,
    check=check,
    plot=plot,
    hardware="one core, minutes",
)
