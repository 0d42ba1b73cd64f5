"""Gradient errors of the default policy on unmodified models of Hugging Face, timm and torchvision, small.

The models, and the training that some of them get, are those of tests/toys/real_models.py.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

import abyssal
import report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toys.distributed import relative_error
from toys.real_models import REAL, Batch, gradients, trained

HELD_OUT = 1_000_000  # seed of a batch that training did not see
app = typer.Typer(add_completion=False)


def errors(model: nn.Module, batch: Batch, blocks: str | None) -> tuple[float, float, float, float]:
    """Gradient error of the default and of bfloat16 autocast, the worst state error, and the share of blocks kept."""
    exact = gradients(copy.deepcopy(model), batch)
    in_bf16 = relative_error(gradients(copy.deepcopy(model), batch, autocast=True), exact)
    found = relative_error(gradients(abyssal.reconstruct(model, blocks=blocks), batch), exact)
    certificate = abyssal.certificate(model)
    kept = [block.policy.startswith("Keep") for block in certificate.blocks]
    return found, in_bf16, certificate.error or 0.0, sum(kept) / len(kept)


@app.command()
def main(write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None) -> None:
    """Measure, print the table, and write it where asked."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows, machine = [], report.machine()
    for name, real in REAL.items():
        batch = real.batch(HELD_OUT)
        ours, bf16, state, kept = errors(trained(name), batch, real.blocks)
        torch.manual_seed(0)
        untrained, untrained_bf16, *_ = errors(real.make().train(), batch, real.blocks)
        label = f"{name} ({'all' if kept == 1 else f'{kept:.0%}'} kept)" if kept else name
        figures = [ours, bf16, untrained, untrained_bf16]
        rows.append([label, "exact" if state == 0 else f"{state:.1e}"])
        rows[-1] += ["exact" if figure == 0 else f"{figure:.1e}" for figure in figures]
        typer.echo(" | ".join(rows[-1]), err=True)
    head = [
        "model",
        "worst state error",
        "gradient error, trained",
        "bfloat16",
        "gradient error, untrained",
        "bfloat16",
    ]
    body = f"{report.header(machine)}\n\n{report.table(head, rows)}"
    report.publish(body, "real-models", write)


if __name__ == "__main__":
    app()
