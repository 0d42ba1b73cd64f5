"""timm's ConvNeXt on scikit-learn's digits: plainly, with gradient checkpointing, and with abyssal.

    .venv/bin/python examples/convnext_digits.py            # two to four minutes on 2 cores
    .venv/bin/python examples/convnext_digits.py --quick    # half a minute; the default where CI=true

Trained from scratch, three times from the same start on the same batches. The LayerScale factors begin at 1, not at
timm's 1e-6, so that the branches are as large as in a trained network. The stages are four chains of blocks: what
stands between them, the downsampling, is left alone.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import abyssal
from abyssal.models.torchvision import import_torchvision
from abyssal.profiling.track import track

import_torchvision()  # only where PyPI's torchvision stands beside a CPU build of torch: its import fails there
from timm.models.convnext import ConvNeXt  # noqa: E402

console = Console(width=100, highlight=False)
progress = Console(stderr=True)


@dataclass(frozen=True)
class Settings:
    """Sizes of everything."""

    depths: tuple[int, ...] = (3, 3, 18, 3)
    widths: tuple[int, ...] = (24, 48, 96, 192)
    batch: int = 48
    steps: int = 90
    learning_rate: float = 1e-3


# The first stage's images are the largest: a step peaks there, and only that stage's depth shows in the peak.
QUICK = Settings(depths=(8, 2, 2, 2), widths=(16, 32, 48, 64), batch=32, steps=24, learning_rate=2e-3)


@dataclass(frozen=True)
class Run:
    """One way to train.

    Attributes:
        losses: per step.
        accuracy: on the held-out images.
        peak: of one more step's live tensor bytes, gradients allocated before.
        seconds: per step.
        certificate: of the last step; None without abyssal.
    """

    losses: list[float]
    accuracy: float
    peak: int
    seconds: float
    certificate: abyssal.Certificate | None


def images_and_labels() -> tuple[Tensor, Tensor]:
    """The digits as 32 x 32 colour images, shuffled. [images, 3, 32, 32] and [images]"""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(pixels, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return images, torch.as_tensor(labels)[order]


def network(settings: Settings) -> nn.Module:
    """A ConvNeXt with fresh weights and branches as large as they come."""
    torch.manual_seed(0)
    return ConvNeXt(num_classes=10, depths=settings.depths, dims=settings.widths, patch_size=2, ls_init_value=1.0)


def train(way: str, settings: Settings, tick: Any) -> Run:
    """Train in one of the three ways."""
    images, labels = images_and_labels()
    held_out, seen = slice(0, 300), slice(300, None)
    model = network(settings)
    if way == "gradient checkpointing":
        model.set_grad_checkpointing()
    if way == "abyssal":
        abyssal.reconstruct(model)  # this line is all; the blocks are found by themselves

    def loss_of(step: int) -> Tensor:
        chosen = torch.randint(len(labels[seen]), (settings.batch,), generator=torch.Generator().manual_seed(step))
        return F.cross_entropy(model(images[seen][chosen]), labels[seen][chosen])

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    losses, began = [], time.perf_counter()
    for step in range(settings.steps):
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay allocated, so that the peak is of activations
        losses.append(loss.item())
        tick()
    seconds = (time.perf_counter() - began) / settings.steps
    with track() as memory:
        loss_of(0).backward()
    certificate = abyssal.certificate(model) if way == "abyssal" else None
    with torch.no_grad():
        accuracy = (model.eval()(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    return Run(losses, accuracy, memory.peak, seconds, certificate)


def study(settings: Settings) -> dict[str, Run]:
    """Train three times; return the runs by their way."""
    ways = ("plain PyTorch", "gradient checkpointing", "abyssal")
    with Progress(console=progress, transient=True) as bar:
        task = bar.add_task("training", total=len(ways) * settings.steps)
        runs = {}
        for way in ways:
            bar.update(task, description=f"training, {way}")
            runs[way] = train(way, settings, lambda: bar.advance(task))
    return runs


def kept_inputs(settings: Settings) -> int:
    """Bytes of all blocks' inputs, which checkpointing each block keeps."""
    model = abyssal.reconstruct(network(settings), abyssal.Keep())
    model(torch.zeros(settings.batch, 3, 32, 32))
    return abyssal.certificate(model).stored_bytes


def show(settings: Settings, runs: dict[str, Run]) -> None:
    """Print the loss curves, the certificate and the summary."""
    console.print(
        f"ConvNeXt of {sum(settings.depths)} blocks in four stages on 32 x 32 digits: {settings.steps} steps, batch "
        f"{settings.batch}."
    )
    curves = Table(box=SIMPLE_HEAD, header_style="bold", title="Loss", title_justify="left")
    curves.add_column("step", justify="right")
    for way in runs:
        curves.add_column(way, justify="right")
    last = settings.steps - 1
    for step in sorted({*range(0, last, max(1, last // 5)), last}):
        curves.add_row(str(step), *[f"{run.losses[step]:.5f}" for run in runs.values()])
    console.print(curves)
    console.print(str(runs["abyssal"].certificate), markup=False)
    table = Table(box=SIMPLE_HEAD, header_style="bold", title="One step", title_justify="left")
    for column in ("", "held-out accuracy", "curves apart", "peak", "blocks' inputs", "time"):
        table.add_column(column, justify="left" if column == "" else "right")
    plain = runs["plain PyTorch"]
    for way, run in runs.items():
        apart = max(abs(a - b) for a, b in zip(run.losses, plain.losses, strict=True))
        stored = run.certificate.stored_bytes if run.certificate else 0 if run is plain else kept_inputs(settings)
        table.add_row(
            way,
            f"{run.accuracy:.1%}",
            "-" if run is plain else f"{apart:.1e}",
            f"{run.peak / 1e6:.1f} MB",
            f"{stored / 1e6:.2f} MB" if stored else "-",
            f"{run.seconds * 1e3:.0f} ms",
        )
    console.print(table)
    console.print(
        "Curves apart: largest difference from plain PyTorch's loss in any step. Peak: a step's live tensors."
    )


def main(
    quick: Annotated[bool, typer.Option("--quick/--full", help="Small sizes.")] = os.environ.get("CI") == "true",
) -> None:
    """Train a ConvNeXt on digits with and without abyssal."""
    settings = QUICK if quick else Settings()
    show(settings, study(settings))


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors as small as these, threads cost more than they give
    typer.run(main)
