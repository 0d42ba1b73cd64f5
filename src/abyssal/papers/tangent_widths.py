"""Tangent kernels against width, or along a short training: what `abyssal tangent` measures.

Three subjects. The two networks of the theory, many seeds at once (`of_papers_networks`); a family of one's own,
`build(width)`, by `abyssal.tangent.Hierarchy` (`of_family`); one model, by `abyssal.tangent.drift` (`of_training`). All
three keep every finished cell in the store of the `Work` they are given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from abyssal.models.batches import Example
from abyssal.models.load import LoadedModel
from abyssal.papers.experiment import Finding, Row, Work, chosen
from abyssal.papers.experiments.li2020 import drift as li2020_drift
from abyssal.papers.experiments.li2020 import truncation as li2020_truncation
from abyssal.papers.shared.lly import SHORT, as_width, samples
from abyssal.papers.shared.powers import by_size, power
from abyssal.papers.tangent_batches import fit_digits, inputs_of, loss_of, outputs_of, tensor_of
from abyssal.sweep import seed_of
from abyssal.util.randomness import seeded

__all__ = [
    "OF_FAMILY",
    "AgainstWidth",
    "Family",
    "Recipe",
    "Training",
    "of_family",
    "of_papers_networks",
    "of_training",
]

OF_FAMILY = "model"  # its name in the rows
_TIMES = (0.5, 1.0, 2.0, 4.0)  # n / lambda_max
_MOST = {4: 24, 3: 96}  # outputs of all samples up to which K4 and K3 are formed
_SHOWN = 10  # outputs of a model whose kernels are summed, where it has more


@dataclass(frozen=True)
class AgainstWidth:
    """What was measured against width.

    Attributes:
        subject: what was measured, in words.
        networks: names in the rows, with names to show.
        drift: settings of the part on drift.
        truncation: settings of the part on the truncated hierarchy.
        drift_rows: one for each network, width and seed.
        truncation_rows: one for each network, width, seed, order and time; empty where K3 would not fit.
        findings: what theory claims, and what came out.
        notes: what a reader has to know.
        seconds: CPU time of all cells.
    """

    subject: str
    networks: Mapping[str, str]
    drift: li2020_drift.Settings
    truncation: li2020_truncation.Settings
    drift_rows: list[Row] = field(repr=False)
    truncation_rows: list[Row] = field(repr=False)
    findings: list[Finding]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def orders(self) -> list[int]:
        """The orders of the truncations that were compared with the flow."""
        return sorted({int(row["order"]) for row in self.truncation_rows if row["order"]})


def of_papers_networks(settings: li2020_drift.Settings, work: Work) -> AgainstWidth:
    """Measure the residual network of Li, Luo and Yip beside the fully connected one of Huang and Yau."""
    same = chosen(settings, "depth n features data activation c_res")
    times = (1.0, max(settings.by_largest))
    cut = li2020_truncation.Settings(settings.widths, settings.seeds, times, "largest", **same)
    drift_rows = li2020_drift.run(settings, work)
    truncation_rows = li2020_truncation.run(cut, work)
    data = {
        "digits": "digits of scikit-learn (centred, norm 1; targets: odd or even)",
        "sphere": f"points of the unit sphere of dimension {settings.features} (targets standard normal)",
    }[settings.data]
    return AgainstWidth(
        f"Li, Luo and Yip's residual network beside Huang and Yau's fully connected one, {settings.activation}, L = "
        f"{settings.depth}, on {settings.n} {data}",
        SHORT,
        settings,
        cut,
        drift_rows,
        truncation_rows,
        li2020_drift.check(drift_rows, settings) + li2020_truncation.check(truncation_rows, cut),
        seconds=work.seconds,
    )


# ---------------------------------------------------------------------- a family of one's own


@dataclass(frozen=True)
class Family:
    """Networks of one's own, by their width.

    Attributes:
        build: makes the network of a width.
        name: what tells it from others, its file's hash included: part of the key of its cells.
        shown: its name on the page.
        data: "digits", or "own", the batch that comes with it.
        seeds: of each width: of weights and samples.
        samples: of digits; a batch of one's own has what it has.
    """

    build: Callable[[int], LoadedModel]
    name: str
    shown: str
    data: str
    seeds: int
    samples: int

    def model(self, width: int, seed: int) -> LoadedModel:
        """Build one network, the same each time; the global random state is left as it was."""
        with seeded(seed_of({"width": width, "seed": seed}, role="weights")):
            loaded = self.build(width)
        loaded.model.eval()
        return loaded

    def problem(self, loaded: LoadedModel, seed: int) -> tuple[Any, Tensor]:
        """Return samples that a network takes, and targets for its outputs.

        Raises:
            ValueError: if it takes neither form of the digits, or has no batch of its own.
        """
        random = torch.Generator().manual_seed(seed_of({"seed": seed}, role="targets"))
        if self.data == "own":
            x = inputs_of(loaded.own)
            return x, torch.randn(outputs_of(loaded.model, x).shape, generator=random, dtype=torch.float64)
        x, y = (part[0] for part in samples("digits", self.samples, 64, [seed]))
        x, found = fit_digits(loaded.model, x)
        if found.shape[1:].numel() == 1:
            return x, y.view(found.shape)
        # More outputs than one: each has odd against even with a sign of its own.
        signs = torch.randint(0, 2, found.shape[1:], generator=random) * 2 - 1
        return x, y.view(-1, *[1] * (found.ndim - 1)) * signs


def of_family(family: Family, widths: Sequence[int], work: Work) -> AgainstWidth:
    """Measure networks of one's own at several widths.

    Args:
        family: the networks.
        widths: ascending.
        work: computes, in this process: a function of the user's file lives here.

    Raises:
        ValueError: before any work, for a network that the samples do not fit.
    """
    first = family.model(widths[0], 0)
    y = family.problem(first, 0)[1]
    count = y.numel()
    order = next((order for order, most in _MOST.items() if count <= most), 2)
    cells: list[dict[str, Any]] = [
        {"model": family.name, "data": family.data, "samples": family.samples, "width": width, "seed": seed,
         "order": order, "times": list(_TIMES)}
        for width in widths
        for seed in range(family.seeds)
    ]  # fmt: skip

    def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
        return _of_member(family, cell)

    found = work.cells(measure, cells, phase="kernels")
    settings = li2020_drift.Settings(
        tuple(widths), family.seeds, n=len(y), data=family.data, by_largest=_TIMES, by_least=()
    )
    cut = li2020_truncation.Settings(tuple(widths), family.seeds, _TIMES, "largest", n=len(y), data=family.data)
    drift_rows: list[Row] = []
    truncation_rows: list[Row] = []
    for cell, values in zip(cells, found, strict=True):
        key: Row = {"network": OF_FAMILY, "width": cell["width"], "seed": cell["seed"]}
        sups = {f"K{p}": values.get(f"K{p}") for p in (2, 3, 4)}
        row: Row = {**key, "lambda_max": values["lambda_max"], "lambda_min": values["lambda_min"], **sups}
        for j, tau in enumerate(_TIMES):
            row |= {f"{name}_max_{tau:g}": float(values[name][j]) for name in ("drift", "loss", "least")}
        drift_rows.append(row)
        truncation_rows += [
            {**key, "order": int(p), "time": tau, "kernel_error": float(values["kernel"][a, b]),
             "output_error": float(values["outputs"][a, b]), "drift": float(values["drift"][b])}
            for a, p in enumerate(values["orders"])
            for b, tau in enumerate(_TIMES)
        ]  # fmt: skip
    what = (
        f"{len(y)} digits (odd or even)" if family.data == "digits" else f"its own batch of {len(y)} (random targets)"
    )
    notes = () if order == 4 else (
        f"{count} outputs of all samples: K4 is formed up to {_MOST[4]}, K3 up to {_MOST[3]}; fewer samples give them.",
    )  # fmt: skip
    return AgainstWidth(
        f"`{family.shown}` on {what}",
        {OF_FAMILY: family.shown.rpartition(":")[2]},
        settings,
        cut,
        drift_rows,
        truncation_rows,
        _findings(drift_rows, truncation_rows, settings, order),
        notes,
        work.seconds,
    )


def _of_member(family: Family, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one network: its kernels at the start, the true flow, and what the truncations make of it."""
    from abyssal.tangent.hierarchy.hierarchy import Hierarchy

    loaded = family.model(cell["width"], cell["seed"])
    x, y = family.problem(loaded, cell["seed"])
    hierarchy = Hierarchy(loaded.model, x, y)
    kernel = hierarchy.kernel(2)
    values = torch.linalg.eigvalsh(kernel)
    if not values[-1] > 0:
        raise ValueError(f"width {cell['width']}: the kernel is zero; no output depends on a parameter")
    times = torch.tensor([0.0, *cell["times"]], dtype=torch.float64) * (hierarchy.samples / values[-1])
    orders = list(range(2, cell["order"] + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a truncation that blows up has nan for its error, and the page says so
        flow = hierarchy.flow(times, rtol=1e-8, check=False)
        apart = [hierarchy.predict(times, order=p, rtol=1e-8).distance(flow) for p in orders]
    smallest = torch.linalg.eigvalsh(flow.kernel)[:, 0]
    drift = torch.linalg.matrix_norm(flow.kernel - kernel) / torch.linalg.matrix_norm(kernel)
    return {
        "lambda_max": float(values[-1]),
        "lambda_min": float(values[0]),
        **{f"K{p}": float(hierarchy.kernel(p).abs().max()) for p in orders},
        "drift": drift[1:].numpy(),
        "loss": (flow.loss / flow.loss[0])[1:].numpy(),
        "least": (smallest / smallest[0])[1:].numpy(),
        "orders": orders,
        "kernel": torch.stack([d.kernel[1:] for d in apart]).numpy(),
        "outputs": torch.stack([d.outputs[1:] for d in apart]).numpy(),
    }


def _findings(drift: list[Row], cut: list[Row], settings: li2020_drift.Settings, order: int) -> list[Finding]:
    last = max(_TIMES)
    claims: dict[str, tuple[list[Row], str, dict[str, Any]]] = {
        f"the kernel's drift falls with width (time {last:g} n / lambda_max)": (drift, f"drift_max_{last:g}", {})
    }
    for p in range(3, order + 1):
        claims[f"sup|K{p}| falls with width"] = (drift, f"K{p}", {})
    for p in range(2, order + 1):
        where = {"order": p, "time": last}
        claims[f"order {p}: the predicted kernel's error falls with width"] = (cut, "kernel_error", where)
    slopes = {claim: power(*by_size(rows, "width", column, **of)) for claim, (rows, column, of) in claims.items()}
    return [Finding(claim, as_width(slope), slope.below(0.0)) for claim, slope in slopes.items()]


# ---------------------------------------------------------------------- one model along a training


@dataclass(frozen=True)
class Recipe:
    """A short training.

    Attributes:
        steps: of the optimiser.
        lr: its learning rate.
        optimizer: "sgd" or "adamw".
        seed: of what is random in it.
    """

    steps: int = 20
    lr: float = 1e-3
    optimizer: str = "adamw"
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """The kernel of one model along a short training, on the samples it is trained on.

    Attributes:
        subject: the model and what it was trained on, in words.
        recipe: of the training.
        outputs: how many outputs of a sample the kernel sums, and how many there are.
        losses: before each step, and after the last one. [steps + 1]
        steps: at which the kernel was read; the first is 0. [readings]
        distance: `|K - K_0| / |K_0|`. [readings]
        alignment: `<K, K_0> / (|K| |K_0|)`. [readings]
        eigenvalues: descending. [readings, n]
        rounding: relative, of the kernel's entries.
        seconds: CPU time.
    """

    subject: str
    recipe: Recipe
    outputs: tuple[int, int]
    losses: list[float]
    steps: list[int]
    distance: list[float]
    alignment: list[float]
    eigenvalues: np.ndarray = field(repr=False)
    rounding: float
    seconds: float = 0.0

    def rows(self) -> list[Row]:
        """Return one row for each reading."""
        return [
            {"step": step, "loss": self.losses[step], "distance": distance, "alignment": alignment,
             "lambda_max": float(values[0]), "lambda_min": float(values[-1])}
            for step, distance, alignment, values in zip(
                self.steps, self.distance, self.alignment, self.eigenvalues, strict=True)
        ]  # fmt: skip


def of_training(loaded: LoadedModel, name: str, example: Example, recipe: Recipe, work: Work) -> Training:
    """Train one model for a few steps on one batch, and read its kernel on that batch's samples.

    Args:
        loaded: the model; it is trained in place.
        name: what tells it from others, its batch included: part of the key of its cell.
        example: batch and loss.
        recipe: of the training.
        work: computes, in this process.

    Raises:
        ValueError: for a batch without a loss.
    """

    def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
        return _train(loaded.model, example, recipe, work)

    found = work.cells(measure, [{"model": name, **vars(recipe)}], phase="training")[0]
    numbers = {key: found[key].tolist() for key in ("losses", "steps", "distance", "alignment", "outputs")}
    shown, total = numbers.pop("outputs")
    return Training(
        subject=f"`{loaded.name}` on {example.description}",
        recipe=recipe,
        outputs=(shown, total),
        eigenvalues=found["eigenvalues"],
        rounding=found["rounding"],
        seconds=work.seconds,
        **numbers,
    )


def _train(model: nn.Module, example: Example, recipe: Recipe, work: Work) -> dict[str, Any]:
    from abyssal.tangent.training.recorder import DriftRecorder

    x = inputs_of(example)
    total = outputs_of(model, x)[0].numel()
    chosen = torch.linspace(0, total - 1, min(total, _SHOWN)).round().long()

    def few(output: Any) -> Tensor:
        return tensor_of(output).flatten(1)[:, chosen]

    recorder = DriftRecorder(model, x, output=few)
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    optimizer = kinds[recipe.optimizer](model.parameters(), lr=recipe.lr)
    losses = []
    with seeded(recipe.seed):
        model.train()
        recorder.record(0)
        for step in range(1, recipe.steps + 1):
            loss = loss_of(model, example)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.record(step)
            work.progress("steps", step, recipe.steps)
        losses.append(loss_of(model, example).item())
    drift = recorder.result()
    first = drift.readings[0].spectrum
    assert first is not None and drift.eigenvalues is not None
    return {
        "losses": np.array(losses),
        "steps": np.array(drift.steps),
        "distance": drift.distance.numpy(),
        "alignment": drift.alignment.numpy(),
        "eigenvalues": drift.eigenvalues.numpy(),
        "outputs": np.array([len(chosen), total]),
        "rounding": float(first.rounding),
    }
