"""Trained networks made deeper: what becomes of their loss, before and after fine-tuning.

    python benchmarks/deepen.py                         # gpt, convnext and resnet, 3 seeds (about 25 minutes on a core)
    python benchmarks/deepen.py --quick                 # small networks, a minute
    python benchmarks/deepen.py --write docs/refine.md
    python benchmarks/deepen.py --only gpt --way copied --steps 320 --write docs/refine.md     # a section of its own

The networks are those of trained.py: unscaled, as people build them, and deepened by `abyssal.nn.deepen`. The original
and each deepened one are then fine-tuned alike: the same batches, the same number of steps and learning rates.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import report
import trained
from abyssal.nn import Deepened, deepen, refinement

console = Console(stderr=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "copied": {"how": "copy"},
    "copied, all evenly": {"how": "copy", "tolerance": None},
    "interpolated": {"how": "interpolate"},
}
CHECKED = 12  # held-out batches
REFRESHED = 16  # training batches for running statistics


@dataclass(frozen=True)
class Settings:
    """How much is done."""

    seeds: int = 3
    steps: int = 80
    factor: int = 2
    quick: bool = False
    ways: tuple[str, ...] = tuple(VARIANTS)


def held_out_loss(network: trained.Trained, model: nn.Module) -> float:
    """Mean loss over held-out batches, in eval mode."""
    model.eval()
    with torch.no_grad():
        losses = [network.loss(model, batch).item() for batch in network.batches(CHECKED)]
    model.train()
    return statistics.fmean(losses)


def refresh_statistics(network: trained.Trained, model: nn.Module) -> None:
    """Estimate running statistics anew, where there are any."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over batches
    model.train()
    with torch.no_grad():
        for inputs, _ in network.batches(REFRESHED, held_out=False):
            model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def fine_tune(network: trained.Trained, model: nn.Module, steps: int) -> float:
    """Train on at a third of the rate it was trained with, to zero by a cosine; return the held-out loss."""
    recipe = network.recipe
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    model.train()
    for step in range(steps):
        rate = recipe.rate / 3 * (1 + math.cos(math.pi * step / steps)) / 2 * min(1.0, (step + 1) / 10)
        optimizer.param_groups[0]["lr"] = rate
        batch = recipe.draw(
            trained.HELD_OUT // 2 + step, False, recipe.batch
        )  # batches that it has not been trained on
        optimizer.zero_grad()
        network.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return held_out_loss(network, model)


def measure(name: str, seed: int, settings: Settings) -> list[dict[str, Any]]:
    """One row for each way of deepening one network."""
    network = trained.load(name, seed, settings.quick)
    inputs, targets = network.batches(1, held_out=False)[0]
    before = held_out_loss(network, network.model)
    alone = fine_tune(network, copy.deepcopy(network.model), settings.steps)
    rows = []
    for variant in settings.ways:
        options = VARIANTS[variant]
        begin = time.process_time()
        deep = deepen(
            network.model,
            settings.factor,
            batch=inputs,
            loss=lambda output: network.loss_of(output, targets),
            **options,
        )
        seconds = time.process_time() - begin
        done = refinement(deep)
        assert isinstance(done, Deepened)
        refresh_statistics(network, deep)
        after = held_out_loss(network, deep)
        tuned = fine_tune(network, deep, settings.steps)
        uneven = sum(len(set(section.shares)) > 1 for section in done.sections)
        flow = min(done.gradients) / statistics.median(done.gradients)
        rows.append(
            {
                "network": name,
                "variant": variant,
                "seed": seed,
                "depth": done.depth,
                "change": done.change,
                "uneven": uneven,
                "before": before,
                "after": after,
                "flow": flow,
                "silent": done.silent,
                "alone": alone,
                "tuned": tuned,
                "seconds": seconds,
            }
        )
        console.print(
            f"{name} {seed} {variant}: loss {before:.4f} -> {after:.4f}; after {settings.steps} steps "
            f"{alone:.4f} without, {tuned:.4f} with"
        )
    return rows


def show(rows: list[dict[str, Any]], settings: Settings) -> str:
    """The table, by network and variant, means over seeds."""
    head = [
        *("network", "how", "blocks", "uneven", "output changes by", "loss", "deepened", "change", "worst"),
        *("least gradient / median", "silent", "loss, fine-tuned", "deepened, fine-tuned", "difference"),
    ]
    lines = []
    for name, variant in dict.fromkeys((row["network"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["variant"]) == (name, variant)]
        mean = {
            key: statistics.fmean(row[key] for row in mine) for key in ("change", "before", "after", "alone", "tuned")
        }
        changes = [row["after"] / row["before"] - 1 for row in mine]
        gains = [row["tuned"] - row["alone"] for row in mine]
        spread = f" ± {statistics.stdev(gains):.3f}" if len(gains) > 1 else ""
        uneven = sorted({row["uneven"] for row in mine})
        lines.append(
            [
                name,
                variant,
                "{} to {}".format(*mine[0]["depth"]),
                " to ".join(str(n) for n in dict.fromkeys((uneven[0], uneven[-1]))),
                f"{mean['change']:.1%}",
                f"{mean['before']:.4f}",
                f"{mean['after']:.4f}",
                f"{statistics.fmean(changes):+.1%}",
                f"{max(changes):+.1%}",
                f"{min(row['flow'] for row in mine):.2f}",
                str(max(row["silent"][1] for row in mine)),
                f"{mean['alone']:.4f}",
                f"{mean['tuned']:.4f}",
                f"{statistics.fmean(gains):+.3f}{spread}",
            ]
        )
    facts = report.machine() | {
        "networks": ", ".join(dict.fromkeys(row["network"] for row in rows)) + (" (quick)" if settings.quick else ""),
        "seeds": str(settings.seeds),
        "fine-tuning": f"{settings.steps} steps at a third of the rate, cosine to 0",
    }
    return f"{report.table(head, lines)}\n\n{report.header(facts)}"


def main(
    only: Annotated[str, typer.Option(help="Comma-separated: gpt,convnext,resnet.")] = "gpt,convnext,resnet",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of fine-tuning.")] = 80,
    factor: Annotated[int, typer.Option(min=2)] = 2,
    way: Annotated[list[str] | None, typer.Option(help=f"One of {tuple(VARIANTS)}; again for more; all.")] = None,
    quick: Annotated[bool, typer.Option(help="Small networks, one seed, 10 steps at most.")] = False,
    write: Annotated[Path | None, typer.Option(help="Markdown file with deepen markers.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    settings = Settings(
        1 if quick else seeds, min(steps, 10) if quick else steps, factor, quick, tuple(way or VARIANTS)
    )
    rows = [row for seed in range(settings.seeds) for name in only.split(",") for row in measure(name, seed, settings)]
    text = show(rows, settings)
    longer = "" if quick or steps == Settings.steps else f"-{steps}-steps"
    report.publish(text, f"deepen-x{factor}{longer}", write)


if __name__ == "__main__":
    typer.run(main)
