"""Train with shared weights, untie, fine-tune without storing the stream; then deepen and fine-tune again.

One residual function used N times is trained by backpropagation, a discretised neural ODE. `untie` gives each layer its
own weights, without changing the function; the network is then trained on, once by backpropagation and once with
nothing of the stream kept, every state solved for from the one above (`Reverse(1)`). `deepen` makes it two and four
times as deep, and these are trained on in the same way. What is stored of the stream is what the certificate counts,
exactly; beside it, what keeping every state (activation checkpointing) stores.

Source: Sander, Ablin, Peyré 2022, arXiv 2205.14612, section 5 (trained with tied weights, then refined); deepening is
ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from abyssal.nn import ResidualStack, deepen, refinement, untie
from abyssal.papers.experiment import Experiment, Finding, Row, Work, grid, listed
from abyssal.papers.shared.powers import by_seed
from abyssal.papers.shared.training import accuracy, difference, images_of, network, points, stored_bytes, train
from abyssal.report.axes import COLOURS, new_figure
from abyssal.util.stats import Interval, every, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT"]

STAGES = ("tied", "tied, trained on", "untied, backpropagation", "untied", "deepened x2", "deepened x4")
AS_WELL = 0.02  # of accuracy
SAMPLES = 0.1  # of a state: more than the samples, which are at least 64 numbers of each
SAME = 1e-5  # of the output, relative: float32's rounding over the depth


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        depth: steps N of the tied network.
        width: of the state.
        steps: of training it.
        tuning: steps of every fine-tuning.
        seeds: of weights and batches.
        data: "digits" or "cifar10".
        kind: "vector" or "image".
        scheme: "Euler" or "Heun".
        batch: images per step.
        rate: of Adam, at the start; a third of it in fine-tuning.
        images: of training, at most; None is all.
    """

    depth: int
    width: int
    steps: int
    tuning: int
    seeds: int
    data: str = "digits"
    kind: str = "vector"
    scheme: str = "Euler"
    batch: int = 64
    rate: float = 3e-3
    images: int | None = None


def refine(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Go through all stages with one seed; returns `<stage>/<figure>` for each."""
    data = images_of(cell)
    batch, seed = cell["batch"], cell["seed"]
    values: dict[str, Any] = {}

    def stage(name: str, model: Any, method: str, steps: int, rate: float, order: int) -> Any:
        """Measure a network, train it on, and measure it again."""
        before, _ = accuracy(model, data)
        last, _ = train(model, method, data, steps, batch, rate, order)
        after, loss = accuracy(model, data)
        depth = sum(len(stack) for stack in model.modules() if isinstance(stack, ResidualStack))
        kept = stored_bytes(copy.deepcopy(model), "keep", data, batch)
        mine = None if method == "backprop" else stored_bytes(copy.deepcopy(model), method, data, batch)
        report = refinement(model)
        values.update(
            {
                f"{name}/depth": depth,
                f"{name}/parameters": sum(p.numel() for p in model.parameters()),
                f"{name}/before": before,
                f"{name}/after": after,
                f"{name}/test_loss": loss,
                f"{name}/train_loss": sum(last[-10:]) / len(last[-10:]),
                f"{name}/change": report.change if report is not None and name in _REFINED else None,
                f"{name}/stored_bytes": mine,
                f"{name}/kept_bytes": kept,
            }
        )
        return model

    sample = data.train_images[:batch]
    tied = stage("tied", network(cell, data.image, tied=True), "backprop", cell["steps"], cell["rate"], seed)
    tuning, rate, order = cell["tuning"], cell["rate"] / 3, 1000 + seed
    stage("tied, trained on", copy.deepcopy(tied), "backprop", tuning, rate, order)
    free = untie(tied, batch=sample)
    stage("untied, backpropagation", copy.deepcopy(free), "backprop", tuning, rate, order)
    stage("untied", free, "reverse", tuning, rate, order)
    for factor in (2, 4):
        stage(f"deepened x{factor}", deepen(free, factor, batch=sample), "reverse", tuning, rate, order + 1000)
    return values


_REFINED = ("untied", "deepened x2", "deepened x4")


def run(settings: Settings, work: Work) -> list[Row]:
    """Go through the stages with every seed; a row for each stage and seed."""
    common = {name: value for name, value in vars(settings).items() if name != "seeds"}
    cells = grid(common, seed=range(settings.seeds))
    figures = (
        *("depth", "parameters", "before", "after", "test_loss", "train_loss", "change"),
        *("stored_bytes", "kept_bytes"),
    )
    return [
        {"stage": stage, "seed": cell["seed"], **{figure: values[f"{stage}/{figure}"] for figure in figures}}
        for cell, values in zip(cells, work.cells(refine, cells, phase="seeds"), strict=True)
        for stage in STAGES
    ]


def _after(rows: list[Row], one: str, other: str) -> Interval:
    return difference(rows, "after", {"stage": one}, {"stage": other})


def _gain(rows: list[Row], stage: str) -> Interval:
    before, after = by_seed(rows, "before", stage=stage), by_seed(rows, "after", stage=stage)
    return mean([after[seed] - before[seed] for seed in sorted(before)])


@listed
def check(rows: list[Row], settings: Settings) -> Iterator[Finding]:
    """Judge by accuracies paired by seed, and by exact bytes."""
    change = max(by_seed(rows, "change", stage="untied").values())
    gain, against = _gain(rows, "untied"), _after(rows, "untied", "untied, backpropagation")
    yield Finding(
        "untying leaves the function as it is", f"the output changes by {change:.0e} of itself", change < SAME
    )
    yield Finding(
        "fine-tuning the untied network with no stream in memory makes it better, or leaves it as good",
        f"test accuracy changes by {points(gain)}",
        gain.above(-AS_WELL),
    )
    yield Finding(
        "it does so as well as backpropagation",
        f"test accuracy differs by {points(against)}",
        against.above(-AS_WELL),
    )
    for factor in (2, 4):
        name = f"deepened x{factor}"
        before = by_seed(rows, "before", stage=name)
        free = by_seed(rows, "after", stage="untied")
        lost, tuned = mean([before[seed] - free[seed] for seed in sorted(free)]), _after(rows, name, "untied")
        yield Finding(
            f"a network made {factor} times as deep is as good, before and after fine-tuning",
            f"test accuracy differs by {points(lost)} before, {points(tuned)} after",
            every([lost.above(-AS_WELL), tuned.above(-AS_WELL)]),
        )
    yield _memory(rows)


def _memory(rows: list[Row]) -> Finding:
    """Return what each further layer stores, in units of what keeping its state takes."""
    stored, kept = (
        [max(by_seed(rows, column, stage=name).values()) for name in _REFINED]
        for column in ("stored_bytes", "kept_bytes")
    )
    share = (stored[-1] - stored[0]) / (kept[-1] - kept[0])
    shown = ", ".join(f"{value / 1e3:.0f}" for value in stored)
    usual = ", ".join(f"{value / 1e3:.0f}" for value in kept)
    return Finding(
        "nothing of the stream is stored for a further layer, but the certificate's samples",
        f"{shown} kB at depths N, 2N and 4N, where keeping every state stores {usual} kB: a further layer stores "
        f"{share:.1%} of its state",
        share < SAMPLES,
    )


def plot(rows: list[Row], settings: Settings) -> Figure:
    """Accuracy before and after each stage, every seed a dot; and bytes stored."""
    figure, (accuracies, memory) = new_figure(2)
    figure.set_size_inches(11, 4.2)
    for n, stage in enumerate(STAGES):
        for k, (column, label) in enumerate((("before", "before training on"), ("after", "after"))):
            values = np.array(list(by_seed(rows, column, stage=stage).values()))
            if column == "before" and stage == "tied":
                continue  # untrained
            accuracies.plot(
                np.full(len(values), n + 0.2 * (k - 0.5)), values, "o", ms=4, color=COLOURS[k], alpha=0.6, mew=0
            )
            accuracies.plot(
                [n + 0.2 * (k - 0.5) - 0.08, n + 0.2 * (k - 0.5) + 0.08],
                [values.mean()] * 2,
                color=COLOURS[k],
                lw=2,
                label=label if stage == "untied" else None,
            )
    labels = list(STAGES)
    for long, short in {", ": ",\n", "backpropagation": "backprop.", " x": "\nx"}.items():
        labels = [label.replace(long, short) for label in labels]
    accuracies.set_xticks(range(len(STAGES)), labels, fontsize=8)
    accuracies.set(ylabel="test accuracy", title="test accuracy")
    accuracies.legend(frameon=False, fontsize=8, loc="lower right")
    places = np.arange(len(_REFINED))
    for k, (column, label) in enumerate((("kept_bytes", "every state kept"), ("stored_bytes", "Reverse(1)"))):
        values = np.array([max(by_seed(rows, column, stage=stage).values()) for stage in _REFINED])
        bars = memory.bar(places + 0.38 * (k - 0.5), values / 1e3, 0.36, color=COLOURS[2 * k], label=label)
        memory.bar_label(bars, fmt="%.0f", fontsize=8)
    depths = [int(max(by_seed(rows, "depth", stage=stage).values())) for stage in _REFINED]
    memory.set_xticks(places, [f"{s}\nN = {n}" for s, n in zip(_REFINED, depths, strict=True)], fontsize=8)
    memory.set(ylabel="kB", title="stored of the stream, exactly")
    memory.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


EXPERIMENT = Experiment(
    name="sander2022/refine",
    paper="Sander, Ablin, Peyré 2022, arXiv 2205.14612",
    claim="A network trained with tied weights can be untied and fine-tuned without storing activations; the same "
    "holds for networks made deeper.",
    sizes={
        "tiny": Settings(4, 16, 30, 10, 2, images=512),
        "small": Settings(16, 32, 200, 100, 5),
        "paper": Settings(32, 16, 40_000, 10_000, 5, "cifar10", "image", "Heun", 128, 1e-3),
    },
    minutes={"tiny": 0.1, "small": 2.5, "paper": 50_000},
    run=run,
    check=check,
    plot=plot,
    hardware="CIFAR-10 and a GPU, days",
)
