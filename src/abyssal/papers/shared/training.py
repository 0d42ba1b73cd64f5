"""Training one network by one way of getting gradients, which three experiments share, and how seeds are compared."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from abyssal.certify.drift import DriftWarning, NonFiniteError
from abyssal.engine.api import certificate, reconstruct, release
from abyssal.engine.policy import Code, Keep, PaperAdjoint, Policy, Reverse
from abyssal.nn import Euler, Heun, PreActivationResNet, ResidualStack, Scheme
from abyssal.papers.data import Dataset, dataset, minibatches
from abyssal.papers.experiment import Row
from abyssal.papers.shared.powers import by_seed
from abyssal.util.stats import Interval, mean

__all__ = [
    "METHODS",
    "SCHEMES",
    "VectorBranch",
    "VectorNetwork",
    "accuracy",
    "difference",
    "fine",
    "gradient_error",
    "images_of",
    "network",
    "points",
    "stored_bytes",
    "train",
]

METHODS = {"backprop": "backpropagation", "paper": "the paper's adjoint", "ours": "ours, by default"}
"""Ways of getting gradients, and their names in figures."""

POLICIES: dict[str, Policy] = {"paper": PaperAdjoint(), "reverse": Reverse(1), "code8": Code(8), "keep": Keep()}
"""What `abyssal.reconstruct` is called with for each; for others it does what it does by default."""

SCHEMES: dict[str, Scheme] = {"Euler": Euler(), "Heun": Heun()}


class VectorBranch(nn.Module):
    """The pre-activation residual function on vectors: (LayerNorm, ReLU, linear) twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner_norm, self.outer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, width] to the same shape."""
        hidden = self.inner(torch.relu(self.inner_norm(x)))
        return self.outer(torch.relu(self.outer_norm(hidden)))


class VectorNetwork(nn.Module):
    """A stem that flattens images, a residual stack of vectors, a head.

    Args:
        image: channels, height and width.
        width: of the state.
        functions: residual functions.
        tied: whether they share their weights.
        scheme: "Euler" or "Heun".
    """

    def __init__(self, image: tuple[int, int, int], width: int, functions: int, tied: bool, scheme: str) -> None:
        super().__init__()
        first = VectorBranch(width)
        branches = [first, *(first if tied else VectorBranch(width) for _ in range(functions - 1))]
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image), width))
        self.stack = ResidualStack(branches, SCHEMES[scheme])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Map [batch, channels, height, width] to logits [batch, 10]."""
        return self.head(self.stack(self.stem(images)))


def images_of(cell: Mapping[str, Any]) -> Dataset:
    """Return the images that a cell trains on: its `data`, no more than `images` of them where it says so."""
    found = dataset(cell["data"])
    return found.first(cell["images"]) if cell.get("images") else found


def network(cell: Mapping[str, Any], image: tuple[int, int, int], tied: bool = False) -> nn.Module:
    """Return a fresh network of a cell, from its `seed` alone: `kind`, `depth` (steps of a stage), `width`, `scheme`.

    "vector" is a network of vectors with LayerNorm, "image" a pre-activation network of `stages` with BatchNorm.
    """
    scheme = SCHEMES[cell["scheme"]]
    functions = cell["depth"] + scheme.functions_per_step - 1
    torch.manual_seed(cell["seed"])
    if cell["kind"] == "vector":
        return VectorNetwork(image, cell["width"], functions, tied, cell["scheme"])
    channels = [cell["width"] * 2**n for n in range(cell.get("stages", 1))]
    return PreActivationResNet(functions, channels, tied=tied, scheme=scheme, image_channels=image[0])


@contextmanager
def fine(model: nn.Module, method: str) -> Iterator[None]:
    """While a model is trained by a method; its warnings of drift are what the experiments measure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        if method != "backprop":
            reconstruct(model, POLICIES.get(method))
        try:
            yield
        finally:
            if method != "backprop":
                release(model)


def train(
    model: nn.Module,
    method: str,
    data: Dataset,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    optimiser: str = "adam",
) -> tuple[list[float], int | None]:
    """Train in place, the rate going to 0 by a cosine; return the loss of each step, and the bytes stored.

    A loss that is not a finite number ends the training: it then stands in the list for every step that is left.

    Returns:
        The losses [steps], and what the last step's certificate says is stored of the stream; None for
        backpropagation.
    """
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=rate)
    if optimiser == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    epochs = math.ceil(steps / (len(data.train_labels) // batch))
    batches = minibatches(data, batch, epochs, seed)
    losses: list[float] = []
    stored = None
    model.train()
    with fine(model, method):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            images, labels = next(batches)
            try:
                loss = cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
            except NonFiniteError:
                loss = torch.tensor(math.nan)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                losses += [math.nan] * (steps - len(losses))
                break
            optimizer.step()
        if method != "backprop" and math.isfinite(losses[-1]):
            stored = certificate(model).stored_bytes
    return losses, stored


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, batch: int = 512) -> tuple[float, float]:
    """Return accuracy and mean loss on the test images, in eval mode."""
    model.eval()
    right, total = 0, 0.0
    for start in range(0, len(data.test_labels), batch):
        labels = data.test_labels[start : start + batch]
        logits = model(data.test_images[start : start + batch])
        right += int((logits.argmax(1) == labels).sum())
        total += float(cross_entropy(logits, labels, reduction="sum"))
    model.train()
    return right / len(data.test_labels), total / len(data.test_labels)


def gradient_error(model: nn.Module, method: str, data: Dataset, batch: int) -> float:
    """Return |g - exact| / |exact| of the gradient that a method has of one test batch's loss."""
    images, labels = data.test_images[:batch], data.test_labels[:batch]

    def gradient(way: str) -> Tensor:
        with fine(model, way):
            found = torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))
        return torch.cat([g.flatten() for g in found]).double()

    try:
        exact = gradient("backprop")
        return float((gradient(method) - exact).norm() / exact.norm())
    except NonFiniteError:
        return math.nan


def stored_bytes(model: nn.Module, method: str, data: Dataset, batch: int) -> int:
    """Return what a method stores of the stream in one step on one training batch, exactly, by its certificate."""
    with fine(model, method):
        cross_entropy(model(data.train_images[:batch]), data.train_labels[:batch]).backward()
        stored = certificate(model).stored_bytes
    model.zero_grad()
    return stored


# ---------------------------------------------------------------------- seeds


def difference(rows: Sequence[Row], value: str, one: Mapping[str, object], other: Mapping[str, object]) -> Interval:
    """Return the interval of a column's difference, `one` minus `other`, paired by seed."""
    first, second = by_seed(rows, value, **one), by_seed(rows, value, **other)
    return mean([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def points(found: Interval) -> str:
    """Write a difference of accuracies in points: hundredths of all images."""
    return found.show(lambda value: f"{100 * value:+.1f}") + " points"
