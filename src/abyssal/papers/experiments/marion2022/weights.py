"""One weight against depth after training: what was smooth stays smooth, what was rough stays rough.

Networks of depth 1,000 (res-1) with weights that are smooth in depth or independent, trained at the scales of the
paper's figure 8; and with fractional noise in between, which the paper does not show. Several seeds of a family are
trained as one batched network. All entries of all weights are measured before and after, and the change: the Hurst
index with its interval, and the step from layer to layer. Steps are relative to the weights' size before training
(independent entries: sqrt 2; a smooth path: of the order of 1/L), since training adds to the size without making
anything smoother; those of the change are relative to its own.

"paper" is the paper's size (MNIST, 300 epochs); its minutes are scaled from those of "small".

The rules of `check` were settled on results of seeds 0, 1, ...; the verdicts of "small" and "paper" are of seeds 1000,
1001, ..., at which nobody had looked.

Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929, section 5, figure 8; settings: `shared/grids.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from abyssal.nn.grid.grid import ResidualGrid
from abyssal.papers.experiment import Experiment, Finding, Row, Work
from abyssal.papers.shared.grids import Networks, draw, finite, flushed, images, train
from abyssal.sweep import seed_of
from abyssal.weights.families import family
from abyssal.weights.hurst import hurst_exponent
from abyssal.weights.smoothness import smoothness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CASES", "EXPERIMENT", "Settings", "train_family"]

# Family, Hurst index, beta: the paper's three, and fractional noise at its critical scale.
CASES: tuple[tuple[str, float | None, float], ...] = (
    ("rbf", None, 1.0), ("iid", None, 1.0), ("iid", None, 0.5), ("fbm", 0.8, 0.8), ("fbm", 0.3, 0.5)
)  # fmt: skip
NAMES = {"rbf": "smooth (RBF)", "iid": "independent", "fbm": "fractional noise"}
SMOOTH, ROUGH = 0.1, 1.0  # steps relative to size: below the first is smooth, above the second is rough
TIMES = ("before", "after", "change")


@dataclass(frozen=True)
class Settings(Networks):
    """How much is trained.

    Attributes, after those of `Networks`:
        epochs: passes over the training images.
        rate: Adam's learning rate, constant.
        batch: images in a minibatch.
        seeds: networks of each family.
        first_seed: seeds count from here; see the module's docstring.
    """

    epochs: int
    rate: float = 0.01
    batch: int = 128
    seeds: int = 3
    first_seed: int = 0


SIZES = {
    "tiny": Settings("digits", 256, 64, 12, 4, batch=32, seeds=2),
    "small": Settings("digits", None, 1000, 30, 40, first_seed=1000),
    "paper": Settings("mnist", None, 1000, 30, 300, first_seed=1000),
}


def train_family(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train a few networks of one family at one scale, and look at their weights before and after.

    Args:
        cell: the fields of `Settings`, with `weights`, `hurst` and `beta`.

    Returns:
        For before, after and the change, by seed: `hurst` (value, low, high) as [seeds, 3], `kind` of path that the
        index refers to, `step` from layer to layer [seeds], and one weight of the first seed [depth]; the accuracy and
        the loss after training, and the size of the change relative to that of the weights before it [seeds].
    """
    data = images(cell["data"], cell["images"])
    law = family(cell["weights"], cell["hurst"])
    starts = [
        draw(law, cell["depth"], cell["width"], data.features, data.classes, seed_of({"seed": seed}))
        for seed in range(cell["first_seed"], cell["first_seed"] + cell["seeds"])
    ]
    given = {name: torch.cat([start[name] for start in starts]) for name in starts[0]}
    with flushed():
        grid = ResidualGrid(
            *given.values(),
            scale=cell["depth"] ** -cell["beta"],
            learning_rate=cell["rate"],
            batch=cell["batch"],
        )
        order = seed_of({"first_seed": cell["first_seed"]}, role="minibatches")  # the same for all networks
        losses = train(grid, data, cell["epochs"], cell["batch"], order)
        accuracy = grid.accuracy(data.test_x, data.test_y)
    after = torch.stack([grid.weights(place).outer for place in range(cell["seeds"])])
    before = given["outer"]
    size = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    found = {"accuracy": accuracy.numpy(), "loss": losses.numpy(), "size": size.numpy()}
    for when, weights in zip(TIMES, (before, after, after - before), strict=True):
        seen = _look(weights)
        if when == "after":  # relative to the size before
            seen["step"] *= (after.flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).numpy()
        found |= {f"{name} {when}": value for name, value in seen.items()}
    return found


def _look(weights: Tensor) -> dict[str, Any]:
    """Return what weights look like as functions of depth. [seeds, depth, width, width]."""
    estimates = [hurst_exponent(part) for part in weights]
    return {
        "hurst": np.array([[e.value, e.low, e.high] for e in estimates]),
        "kind": ",".join(e.kind for e in estimates),
        "step": np.array([smoothness(part).step for part in weights]),
        "weight": weights[0, :, 1, 2].double().numpy(),
    }


def run(settings: Settings, work: Work) -> list[Row]:
    """Train all families: rows of part "network", one per network, and "weight", one per layer."""
    cells = [{**asdict(settings), "weights": name, "hurst": hurst, "beta": beta} for name, hurst, beta in CASES]
    rows: list[Row] = []
    for cell, values in zip(cells, work.cells(train_family, cells, version=3, phase="families"), strict=True):
        named: Row = {"weights": cell["weights"], "hurst": cell["hurst"], "beta": cell["beta"]}
        for place in range(settings.seeds):
            row: Row = {"part": "network", **named, "seed": settings.first_seed + place}
            row |= {name: finite(values[name][place]) for name in ("accuracy", "loss", "size")}
            for when in TIMES:
                index = values[f"hurst {when}"][place]
                row |= {f"{name} {when}": float(index[k]) for k, name in enumerate(("H", "H low", "H high"))}
                row |= {f"kind {when}": values[f"kind {when}"].split(",")[place]}
                row |= {f"step {when}": float(values[f"step {when}"][place])}
            rows.append(row)
        for n in range(settings.depth):
            path = {when: float(values[f"weight {when}"][n]) for when in TIMES}
            rows.append({"part": "weight", **named, "seed": settings.first_seed, "layer": n, **path})
    return rows


# ---------------------------------------------------------------------- what comes out


def _case(rows: list[Row], part: str, case: tuple[str, float | None, float]) -> list[Row]:
    return [row for row in rows if row["part"] == part and (row["weights"], row["hurst"], row["beta"]) == case]


def _column(rows: list[Row], name: str) -> np.ndarray:
    return np.array([math.nan if row[name] is None else row[name] for row in rows], dtype=float)


def _title(case: tuple[str, float | None, float]) -> str:
    name, hurst, beta = case
    return f"{NAMES[name]}{'' if hurst is None else f', H = {hurst:g}'}, beta = {beta:g}"


def _trained(rows: list[Row]) -> bool:
    """Whether all networks learnt something: above 50 % right, where chance is 10 %."""
    return bool((np.nan_to_num(_column(rows, "accuracy")) > 0.5).all())


def _regularity(rows: list[Row], case: tuple[str, float | None, float]) -> Finding:
    """Judge one of the paper's families by the steps from layer to layer, over all seeds."""
    here = _case(rows, "network", case)
    before, after = _column(here, "step before"), _column(here, "step after")
    smooth = case[0] == "rbf"

    def is_so(steps: np.ndarray) -> bool:
        return bool((steps < SMOOTH).all() if smooth else (steps > ROUGH).all())

    said = (
        f"steps / size before training: {before.mean():.3f} before, {after.min():.3f} to {after.max():.3f} after; "
        f"{_index(here)}; weights changed by {100 * _column(here, 'size').mean():.0f} % of their size, accuracy "
        f"{100 * _column(here, 'accuracy').mean():.1f} %"
    )
    claim = f"weights that are {'smooth' if smooth else 'rough'} stay so: {_title(case)}"
    return Finding(claim, said, is_so(after) if is_so(before) and _trained(here) else None)


def _index(here: list[Row]) -> str:
    """Return the Hurst indices before and after, over all scales; the smooth change that is added moves them, too."""
    low, high = _column(here, "H low after").min(), _column(here, "H high after").max()
    kinds = [" or ".join(sorted({str(row[f"kind {when}"]) for row in here})) for when in ("before", "after")]
    before, after = _column(here, "H before").mean(), _column(here, "H after").mean()
    return f"H {before:.2f} as {kinds[0]} before, {after:.2f} ({low:.2f} to {high:.2f}) as {kinds[1]} after"


def _change(rows: list[Row], case: tuple[str, float | None, float]) -> Finding:
    """Judge whether what training adds is a path rather than noise."""
    here = _case(rows, "network", case)
    step, index = _column(here, "step change"), _column(here, "H change")
    kinds = {str(row["kind change"]) for row in here}
    said = (
        f"steps / size of the change: {step.min():.3f} to {step.max():.3f}; H {index.min():.2f} to {index.max():.2f} "
        f"as {' or '.join(sorted(kinds))}; the weights: {_index(here)}"
    )
    claim = f"(ours, not the paper's) what training adds is a path in depth, not noise: {_title(case)}"
    return Finding(claim, said, kinds == {"path"} if _trained(here) else None)


def check(rows: list[Row], settings: Settings) -> list[Finding]:
    """Judge the paper's families by their steps, then what training adds to each family."""
    findings = [_regularity(rows, case) for case in CASES if case[0] != "fbm"]
    return findings + [_change(rows, case) for case in CASES]


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Draw one weight against depth before, after, and the change; a row for each family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.9 * len(CASES)), layout="constrained")
    panels: Any = figure.subplots(len(CASES), 3, sharex=True, sharey="row")
    for line, case in zip(panels, CASES, strict=True):
        path, here = _case(rows, "weight", case), _case(rows, "network", case)[0]
        for axes, when, shade in zip(line, TIMES, ("C0", "C1", "C2"), strict=True):
            axes.plot(_column(path, "layer"), _column(path, when), linewidth=0.7, color=shade)
            head = f"{_title(case)}" if when == "before" else "after training" if when == "after" else "what was added"
            text = f"H = {here[f'H {when}']:.2f} as {here[f'kind {when}']}, step {here[f'step {when}']:.3f}"
            axes.set_title(f"{head}\n{text}", fontsize=8.5, loc="left")
        line[0].set_ylabel("weight")
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    return figure


EXPERIMENT = Experiment(
    name="marion2022/weights",
    paper="Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929",
    claim="Training keeps the regularity of weights in depth: a smooth initialisation stays smooth, an independent one "
    "stays rough.",
    sizes=SIZES,
    minutes={"tiny": 0.1, "small": 4, "paper": 1300},
    run=run,
    check=check,
    plot=plot,
    hardware="two cores and 11 hours, or a GPU",
)
