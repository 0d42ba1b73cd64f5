"""Does the best learning rate stay where it is as a network grows deeper?

Networks of several depths are trained at several learning rates, and the best rate of each depth is read off. Rates far
too large end in no number at all; that is a result, an infinite loss, and not an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from abyssal.models.find import Blocks
from abyssal.scaling.rules.base import Rule
from abyssal.scaling.transfer.optima import Losses
from abyssal.scaling.transfer.plots import draw_transfers
from abyssal.scaling.transfer.short_runs import (
    Build,
    Loss,
    Recipe,
    accepts,
    check_depths,
    check_rates,
    check_seeds,
    example_at,
    loss_of,
    recipe,
)
from abyssal.sweep.engine import check_engine, run
from abyssal.sweep.store import Store
from abyssal.util.checks import whole
from abyssal.util.files import for_json
from abyssal.util.progress import Progress
from abyssal.util.randomness import seeded
from abyssal.util.text import printed

__all__ = ["Train", "Transfer", "learning_rate_transfer", "plot_transfers"]

Train = Callable[[nn.Module, list[dict[str, Any]], int], float]
"""`train(model, groups, seed) -> loss`: trains a model with parameter groups that hold their learning rates."""

VERSION = 1  # of what a cell computes; to be raised when its result changes
_WARM_UP, _LAST = 0.1, 0.1  # parts of the steps: with a rising learning rate, and whose loss is averaged


@dataclass(frozen=True)
class Transfer(Losses):
    """Loss against learning rate for each depth: what :class:`Losses` has, in words and pictures."""

    def verdict(self) -> str:
        """Say in a sentence whether the best rates line up."""
        first, last = self.depths[0], self.depths[-1]
        where = f"from depth {first} to {last}"
        if math.isnan(self.shift):
            return f"{self.rule}: some depth diverged at every rate, so there is nothing to compare."
        error = "" if math.isnan(self.shift_error) else f" (+-{self.shift_error:.2f})"
        moved = f"{self.rule}: the best learning rate moves by {self.shift:+.2f}{error} factors of 2 {where}"
        edges = [depth for depth, edge in zip(self.depths, self._best[1], strict=True) if edge]
        said = {True: "less than one factor of 2", False: "a factor of 2 or more", None: "not decided"}[self.transfers]
        note = ""
        if edges:
            note = f" (at depth {', '.join(map(str, edges))} it is the first or last rate tried, or beyond)"
        return f"{moved}: {said}{note}."

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON; None stands for a loss that is not finite."""
        optima = {str(best.depth): asdict(best) | {"regret": self.regret(best.depth)} for best in self.optima}
        plain = {
            **{name: getattr(self, name) for name in ("rule", "depths", "rates", "seeds")},
            "losses": self.losses.tolist(),
            "optima": optima,
            **{name: getattr(self, name) for name in ("shift", "shift_error", "span", "transfers")},
            "verdict": self.verdict(),
            "seconds": self.seconds,
        }
        return {name: for_json(value) for name, value in plain.items()}

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw loss against learning rate, one curve for each depth; the file's suffix says the format.

        Raises:
            ValueError: for a folder that is missing, or a suffix that matplotlib does not write.
        """
        return plot_transfers(path, self)

    def __rich__(self) -> Group:
        """Return a table with a row for each depth, and the verdict."""
        table = Table(title=f"Best learning rate by depth: {self.rule}", title_justify="left", box=SIMPLE_HEAD)
        for column in ("depth", "best rate", "95 %", "loss there", "lost (*)"):
            table.add_column(column, justify="right")
        found = {best.depth: best for best in self.optima}
        for depth in self.depths:
            if (best := found.get(depth)) is None:
                table.add_row(str(depth), "diverged", "", "", "")
                continue
            interval = "" if math.isnan(best.low) or best.at_edge else f"{best.low:.2e} to {best.high:.2e}"
            rate = f"{best.rate:.2e}" + (" (edge)" if best.at_edge else "")
            table.add_row(str(depth), rate, interval, f"{best.loss:.4f}", f"{self.regret(depth):.4f}")
        note = f"(*) by training at the rate that is best at depth {self.depths[0]}."
        return Group(table, Text(f"{self.verdict()}\n{note}"))

    def __str__(self) -> str:
        """Return the table as text."""
        return printed(self, width=120)


def learning_rate_transfer(
    build_model: Build,
    depths: Sequence[int],
    rates: Sequence[float],
    rule: str | Rule | None = None,
    train: Train | None = None,
    *,
    batch: Any = None,
    loss: Loss | None = None,
    steps: int = 100,
    seeds: int | Sequence[int] = 2,
    base_depth: int | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    blocks: Blocks | None = None,
    whole_blocks: bool = False,
    name: str = "",
    store: Store | None = None,
    engine: str = "local",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Transfer:
    """Train a network at several depths and learning rates, and see whether the best rates line up.

    Args:
        build_model: makes a fresh network of a depth from torch's random state.
        depths: at least two.
        rates: base learning rates, at least three; factors of 2 are usual.
        rule: of depth, by name or as an object; None applies none.
        train: `train(model, groups, seed) -> loss` trains a model with parameter groups that hold their learning
            rates, which a schedule may multiply, and returns the loss to compare. None trains for `steps` on
            `batch` with a linear warm-up over a tenth of the steps and a linear decay to 0, and gives the mean
            loss of the last tenth.
        batch: as in :func:`abyssal.scaling.depth_check`; also what the rule reads the model with.
        loss: as there.
        steps: of the trainings where `train` is None.
        seeds: of weights and data: a number of them, or the seeds. Two at least give intervals.
        base_depth: for rules that are relative to one; None is the least of `depths`.
        optimizer: "adamw" or "sgd": whose factors the groups hold.
        weight_decay: of the base network.
        blocks: as in `abyssal.scaling.apply`.
        whole_blocks: as there.
        name: what stands for `build_model`, `train`, `batch` and `loss` in the store; change it when they change.
        store: keeps every finished training; the same call goes on where it was. It needs a name.
        engine: as in `abyssal.sweep.run`.
        jobs: as there.
        progress: as there.

    Returns:
        The losses and what follows from them.

    Raises:
        TypeError, ValueError: for bad arguments, before any work.
        SweepError: if trainings failed; all others are finished then, and in the store.
    """
    deep = check_depths(depths, 2)
    pace = check_rates(rates)
    chosen = check_seeds(seeds)
    how = recipe(build_model, deep, rule, base_depth, optimizer, weight_decay, batch, loss, blocks, whole_blocks)
    whole("steps", steps)
    check_engine(engine, jobs)
    _check_training(train, batch, name, store)
    same = {
        "rule": repr(how.rule),
        "base_depth": how.base_depth if how.rule.relative else None,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "steps": steps if train is None else None,
    }
    cells = [{**same, "depth": depth, "rate": rate, "seed": seed} for seed in chosen for rate in pace for depth in deep]
    found = run(
        cells, _Training(how, train, steps), study=name or "learning-rate-transfer", version=VERSION, store=store,
        engine=engine, jobs=jobs, progress=progress,
    )  # fmt: skip
    losses = np.full((len(deep), len(pace), len(chosen)), math.inf)
    for outcome in found:
        p = outcome.parameters
        value = float(outcome.values["loss"])
        at = (deep.index(p["depth"]), pace.index(p["rate"]), chosen.index(p["seed"]))
        losses[at] = value if math.isfinite(value) else math.inf
    return Transfer(how.rule.name, deep, pace, chosen, losses, sum(outcome.seconds for outcome in found))


def _check_training(train: Train | None, batch: Any, name: str, store: Store | None) -> None:
    """Refuse a call that has nothing to train on, or whose store could not tell one training from another."""
    if train is None and batch is None:
        raise ValueError("There is nothing to train on: give batch=, or train=, a function that trains by itself.")
    if train is not None and (not callable(train) or not accepts(train, 3)):
        raise TypeError(f"train has to be a function train(model, groups, seed) -> loss, got {train!r}.")
    if store is not None and not name:
        raise ValueError(
            "A store needs a name for what is trained, such as name='gpt-width-64-100-steps': it cannot tell one "
            "build_model from another. Give another name when build_model, train or batch change."
        )
    if batch is not None:
        example_at(batch, 0)


@dataclass(frozen=True)
class _Training:
    """What one cell of the sweep computes."""

    recipe: Recipe
    train: Train | None
    steps: int

    def __call__(self, cell: Mapping[str, Any]) -> dict[str, float]:
        with seeded(cell["seed"]):
            model = self.recipe.model(cell["depth"])
            groups = self.recipe.groups(model, cell["rate"])
            if self.train is None:
                return {"loss": self._own(model, groups)}
            return {"loss": float(self.train(model, groups, cell["seed"]))}

    def _own(self, model: nn.Module, groups: list[dict[str, Any]]) -> float:
        optimizer = self.recipe.optimizer_for(groups)
        full = [group["lr"] for group in optimizer.param_groups]
        warm, last = max(1, round(self.steps * _WARM_UP)), max(1, round(self.steps * _LAST))
        losses = []
        for step in range(self.steps):
            part = min(1.0, (step + 1) / warm) * min(1.0, (self.steps - step) / max(1, self.steps - warm))
            for group, rate in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = rate * part
            loss = loss_of(model, example_at(self.recipe.batch, step), self.recipe.loss)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                return math.inf
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return sum(losses[-last:]) / last


def plot_transfers(path: str | os.PathLike[str], *transfers: Transfer) -> Path:
    """Draw several rules side by side on the same axes; the file's suffix says the format.

    Raises:
        ValueError: for no transfer, a folder that is missing, or a suffix that matplotlib does not write.
    """
    return draw_transfers(Path(path), transfers)
